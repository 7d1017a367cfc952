"""The job record from the worker's side: claim, renew, events, release, and the one fenced finish.

A claim raises the record's attempt by one; every later write names the attempt it was made under and does
nothing once the record has moved on, so a late twin of a job changes nothing.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from pellucid_shared import keyspace
from pellucid_shared.errors import JobError
from pellucid_shared.wire import JobState, ResultInfo, TokenizedInvoke

#: KEYS: record, leases, waiting, events. ARGV: job, now, lease seconds, most attempts, event data, kept, ttl.
#: Gives the attempt and 1 where the job is to be cancelled, or nil where it is not to be had.
_CLAIM = """
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'times', 'cancel')
local state, attempt = record[1], tonumber(record[2] or '0')
if state == 'running' then
  local lease = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0')
  if lease > tonumber(ARGV[2]) or attempt >= tonumber(ARGV[4]) then return nil end
elseif state ~= 'queued' then
  return nil
end
local times = cjson.decode(record[3] or '{}')
times['running'] = tonumber(ARGV[2])
redis.call('HSET', KEYS[1], 'state', 'running', 'attempt', attempt + 1, 'times', cjson.encode(times))
redis.call('ZADD', KEYS[2], ARGV[2] + ARGV[3], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[6], '*',
  'type', 'state', 'attempt', attempt + 1, 'time', ARGV[2], 'data', ARGV[5])
for _, key in ipairs({KEYS[1], KEYS[4]}) do redis.call('EXPIRE', key, ARGV[7]) end
return {attempt + 1, record[4] and 1 or 0}
"""

#: KEYS: record, leases. ARGV: job, attempt, expiry. Gives 0 lost, 1 renewed, 2 renewed and to be cancelled.
_RENEW = """
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'cancel')
if record[1] ~= 'running' or record[2] ~= ARGV[2] then return 0 end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
return record[3] and 2 or 1
"""

#: KEYS: record, events. ARGV: attempt, type, time, data, events kept, seconds to live.
_EVENT = """
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[1] then return nil end
local id = redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*',
  'type', ARGV[2], 'attempt', ARGV[1], 'time', ARGV[3], 'data', ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return id
"""

#: KEYS: record, events, leases. ARGV: job, attempt, state, now, field, field value, event data, kept, ttl.
#: The record, the lease and the event change together, or not at all.
_FINISH = """
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'times')
if record[1] ~= 'running' or record[2] ~= ARGV[2] then return 0 end
local times = cjson.decode(record[3] or '{}')
times[ARGV[3]] = tonumber(ARGV[4])
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'times', cjson.encode(times))
redis.call('HSET', KEYS[1], ARGV[5], ARGV[6])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[8], '*',
  'type', 'state', 'attempt', ARGV[2], 'time', ARGV[4], 'data', ARGV[7])
for _, key in ipairs({KEYS[1], KEYS[2]}) do redis.call('EXPIRE', key, ARGV[9]) end
return 1
"""


#: KEYS: record, events, leases, waiting. ARGV: job, attempt, now, event data, kept, ttl.
#: Gives 0 lost, 1 released, 2 held still since it is to be cancelled.
_RELEASE = """
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'times', 'cancel')
if record[1] ~= 'running' or record[2] ~= ARGV[2] then return 0 end
if record[4] then return 2 end
local times = cjson.decode(record[3])
times['queued'] = tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'state', 'queued', 'times', cjson.encode(times))
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*',
  'type', 'state', 'attempt', ARGV[2], 'time', ARGV[3], 'data', ARGV[4])
for _, key in ipairs({KEYS[1], KEYS[2]}) do redis.call('EXPIRE', key, ARGV[6]) end
return 1
"""

_KEPT, _TTL = keyspace.EVENTS_KEPT, keyspace.JOB_TTL_SECONDS


@dataclass(frozen=True, slots=True)
class Claim:
    """A job this worker holds, under one attempt. ``cancel``: its user had asked to cancel it by then."""

    job: str
    attempt: int
    cancel: bool = False


class Release(enum.IntEnum):
    """How a release ended: another attempt has the job; it is queued again; it is to be cancelled instead."""

    LOST, QUEUED, CANCEL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Work:
    """What a claimed job asks for."""

    graph: bytes
    inputs: tuple[TokenizedInvoke, ...]


class Jobs:
    """Job records in Redis."""

    def __init__(self, client: redis.Redis, model: str) -> None:
        self._redis, self._model = client, model
        self._claim = client.register_script(_CLAIM)
        self._renew = client.register_script(_RENEW)
        self._event = client.register_script(_EVENT)
        self._finish = client.register_script(_FINISH)
        self._release = client.register_script(_RELEASE)

    def claim(self, job: str) -> Claim | None:
        """Take a queued job, or one whose lease has expired; None where it is not to be had."""
        waiting, events = keyspace.model_waiting(self._model), keyspace.job_events(job)
        keys = [keyspace.job(job), keyspace.LEASES, waiting, events]
        limits = [keyspace.LEASE_SECONDS, keyspace.MAX_ATTEMPTS]
        data = json.dumps({"state": JobState.RUNNING.value})
        found = self._claim(keys, [job, time.time(), *limits, data, _KEPT, _TTL])
        return None if found is None else Claim(job, int(found[0]), bool(found[1]))

    def work(self, job: str) -> Work:
        """The graph and the tokenized inputs of a job.

        Raises:
            JobError: the record has lost one of them.
        """
        graph: Any = self._redis.get(keyspace.job_graph(job))
        inputs: Any = self._redis.hget(keyspace.job(job), "inputs")
        if graph is None or inputs is None:
            raise JobError("the record of this job lacks its graph or its inputs; send the job again")
        return Work(graph, tuple(TokenizedInvoke.model_validate(i) for i in json.loads(inputs)))

    def renew(self, claims: Iterable[Claim]) -> tuple[list[Claim], list[Claim]]:
        """Renew leases; the claims that are lost, and those whose user asked to cancel."""
        lost, cancelled = [], []
        for claim in claims:
            keys = [keyspace.job(claim.job), keyspace.LEASES]
            held = int(self._renew(keys, [claim.job, claim.attempt, time.time() + keyspace.LEASE_SECONDS]))
            if held == 0:
                lost.append(claim)
            elif held == 2:
                cancelled.append(claim)
        return lost, cancelled

    def event(self, claim: Claim, kind: str, data: dict[str, Any]) -> None:
        """Append to the job's event log."""
        keys = [keyspace.job(claim.job), keyspace.job_events(claim.job)]
        self._event(keys, [claim.attempt, kind, time.time(), json.dumps(data), _KEPT, _TTL])

    def release(self, claim: Claim) -> Release:
        """Give a running job back to the queue's record; its message is the caller's to send."""
        waiting = keyspace.model_waiting(self._model)
        keys = [keyspace.job(claim.job), keyspace.job_events(claim.job), keyspace.LEASES, waiting]
        data = json.dumps({"state": JobState.QUEUED.value})
        return Release(int(self._release(keys, [claim.job, claim.attempt, time.time(), data, _KEPT, _TTL])))

    def complete(self, claim: Claim, result: ResultInfo) -> bool:
        """Record the result; False where the job is no longer this claim's."""
        return self._end(claim, JobState.COMPLETED, "result", result.model_dump_json(), {})

    def fail(self, claim: Claim, problem: dict[str, Any]) -> bool:
        """Record why it failed; False where the job is no longer this claim's."""
        return self._end(claim, JobState.FAILED, "error", json.dumps(problem), {"error": problem})

    def cancelled(self, claim: Claim, problem: dict[str, Any]) -> bool:
        """Record that it was cancelled; False where the job is no longer this claim's."""
        return self._end(claim, JobState.CANCELLED, "error", json.dumps(problem), {"error": problem})

    def _end(self, claim: Claim, state: JobState, field: str, value: str, more: dict[str, Any]) -> bool:
        keys = [keyspace.job(claim.job), keyspace.job_events(claim.job), keyspace.LEASES]
        data = json.dumps({"state": state.value, **more})
        kept, ttl = keyspace.EVENTS_KEPT, keyspace.JOB_TTL_SECONDS
        arguments: list[str | float] = [
            claim.job,
            claim.attempt,
            state.value,
            time.time(),
            field,
            value,
            data,
            kept,
            ttl,
        ]
        return bool(self._finish(keys, arguments))

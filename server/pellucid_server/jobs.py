"""The job record from the gateway's side: create, show, cancel, requeue what a dead worker held."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from celery import Celery
from redis.asyncio import Redis

from pellucid_shared import keyspace
from pellucid_shared.errors import JobCancelledError, JobNotFoundError, WorkerLostError
from pellucid_shared.wire import JobRecord, JobState, ResultInfo

from .admission import Admitted

#: KEYS: record, events, waiting. ARGV: job, now, problem, event data, ttl.
#: Gives 'cancelled' at once for a queued job, 'asked' for a running one, else its state; nil for no job.
_CANCEL = """
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'times')
if not record[1] then return nil end
if record[1] == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', '1')
  return 'asked'
end
if record[1] ~= 'queued' and record[1] ~= 'received' then return record[1] end
local times = cjson.decode(record[3])
times['cancelled'] = tonumber(ARGV[2])
redis.call('HSET', KEYS[1], 'state', 'cancelled', 'times', cjson.encode(times), 'error', ARGV[3])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[2], '*', 'type', 'state', 'attempt', record[2], 'time', ARGV[2], 'data', ARGV[4])
for _, key in ipairs({KEYS[1], KEYS[2]}) do redis.call('EXPIRE', key, ARGV[5]) end
return 'cancelled'
"""

#: KEYS: record, events, waiting, leases. ARGV: job, now, most attempts, problem, ttl.
#: Gives 'queued' where the job goes back to the queue, 'failed' where it had its attempts, nil otherwise.
_REAP = """
local lease = tonumber(redis.call('ZSCORE', KEYS[4], ARGV[1]) or '')
if not lease or lease > tonumber(ARGV[2]) then return nil end
redis.call('ZREM', KEYS[4], ARGV[1])
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'times', 'cancel')
if record[1] ~= 'running' then return nil end
local state, data = 'queued', '{"state":"queued"}'
if tonumber(record[2]) >= tonumber(ARGV[3]) then state = 'failed' end
if record[4] then state = 'cancelled' end
local times = cjson.decode(record[3])
times[state] = tonumber(ARGV[2])
redis.call('HSET', KEYS[1], 'state', state, 'times', cjson.encode(times))
if state == 'queued' then
  redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
else
  redis.call('HSET', KEYS[1], 'error', ARGV[4])
  data = '{"state":"' .. state .. '","error":' .. ARGV[4] .. '}'
  for _, key in ipairs({KEYS[1], KEYS[2]}) do redis.call('EXPIRE', key, ARGV[5]) end
end
redis.call('XADD', KEYS[2], '*', 'type', 'state', 'attempt', record[2], 'time', ARGV[2], 'data', data)
return state
"""


class Jobs:
    """Job records in Redis, and the way to the workers."""

    def __init__(self, redis: Redis, broker_url: str) -> None:
        self._redis: Any = redis  # redis-py types every answer as a union of all it could be
        self._celery = Celery("pellucid", broker=broker_url)
        self._celery.conf.update(task_serializer="json", task_ignore_result=True)
        self._cancel = redis.register_script(_CANCEL)
        self._reap = redis.register_script(_REAP)

    @staticmethod
    def new_id() -> str:
        return uuid.uuid4().hex

    async def create(self, job: str, admitted: Admitted) -> JobRecord:
        """Write the record and hand the job to its model's queue."""
        model, now = admitted.graph.model, time.time()
        graph = admitted.graph.to_json()
        inputs = json.dumps([invoke.model_dump(exclude_none=True) for invoke in admitted.inputs])
        record = {
            "model": model,
            "state": JobState.QUEUED.value,
            "attempt": 0,
            "times": json.dumps({"received": now, "queued": now}),
            "graph_sha256": admitted.graph.sha256,
            "inputs": inputs,
        }
        ttl = keyspace.JOB_TTL_SECONDS
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keyspace.job(job), mapping=record)
            pipe.set(keyspace.job_graph(job), graph)
            pipe.zadd(keyspace.model_waiting(model), {job: now})
            for state in (JobState.RECEIVED, JobState.QUEUED):
                event = {
                    "type": "state",
                    "attempt": 0,
                    "time": now,
                    "data": json.dumps({"state": state.value}),
                }
                pipe.xadd(keyspace.job_events(job), event)
            for key in (keyspace.job(job), keyspace.job_graph(job), keyspace.job_events(job)):
                pipe.expire(key, ttl)
            await pipe.execute()
        await self._send(job, model)
        return await self.show(job)

    async def show(self, job: str) -> JobRecord:
        """The record; with its place in the queue while it waits.

        Raises:
            JobNotFoundError: no such job, or it is long over.
        """
        text: dict[str, str] = await self._redis.hgetall(keyspace.job(job))
        if not text:
            raise JobNotFoundError(f"there is no job {job[:80]}; jobs are kept for a day")
        state = JobState(text["state"])
        rank = None
        if state is JobState.QUEUED:
            rank = await self._redis.zrank(keyspace.model_waiting(text["model"]), job)
        return JobRecord(
            id=job,
            model=text["model"],
            state=state,
            attempt=int(text["attempt"]),
            times=json.loads(text["times"]),
            position=None if rank is None else int(rank) + 1,
            error=json.loads(text["error"]) if text.get("error") else None,
            result=ResultInfo.model_validate_json(text["result"]) if text.get("result") else None,
            graph_sha256=text["graph_sha256"],
        )

    async def cancel(self, job: str) -> JobRecord:
        """Cancel a job: one that waits at once, one that runs as soon as its worker hears of it.

        Raises:
            JobNotFoundError: no such job.
        """
        record = await self.show(job)
        keys = [keyspace.job(job), keyspace.job_events(job), keyspace.model_waiting(record.model)]
        problem = JobCancelledError("the job was cancelled before it ran").to_problem()
        data = json.dumps({"state": "cancelled", "error": problem})
        ttl = keyspace.JOB_TTL_SECONDS
        await self._cancel(keys, [job, time.time(), json.dumps(problem), data, ttl])
        return await self.show(job)

    async def resend(self) -> int:
        """Send again what waits at a model whose worker died: the dead one may have taken messages in that
        it never claimed. A message too many does nothing. Gives how many were sent."""
        count = 0
        for model in await self._redis.smembers(keyspace.MODELS):
            workers = keyspace.model_workers(model)
            dead = await self._redis.zrangebyscore(workers, 0, time.time() - keyspace.LEASE_SECONDS)
            if not dead:
                continue
            for job in await self._redis.zrange(keyspace.model_waiting(model), 0, -1):
                await self._send(job, model)
                count += 1
            await self._redis.zrem(workers, *dead)
        return count

    async def reap(self) -> int:
        """Requeue the jobs whose leases have run out; those that had their attempts fail. Gives how many."""
        now = time.time()
        count = 0
        for job in await self._redis.zrangebyscore(keyspace.LEASES, 0, now):
            model = await self._redis.hget(keyspace.job(job), "model")
            if model is None:
                await self._redis.zrem(keyspace.LEASES, job)
                continue
            problem = WorkerLostError(
                f"the worker died under this job {keyspace.MAX_ATTEMPTS} times; it is not tried again"
            ).to_problem()
            keys = [
                keyspace.job(job),
                keyspace.job_events(job),
                keyspace.model_waiting(model),
                keyspace.LEASES,
            ]
            arguments: list[Any] = [
                job,
                now,
                keyspace.MAX_ATTEMPTS,
                json.dumps(problem),
                keyspace.JOB_TTL_SECONDS,
            ]
            state = await self._reap(keys, arguments)
            if state == "queued":
                await self._send(job, model)
            count += state is not None
        return count

    async def _send(self, job: str, model: str) -> None:
        await asyncio.to_thread(
            self._celery.send_task, keyspace.TASK, args=[job], queue=keyspace.queue(model), retry=True
        )

"""A job's event log as server-sent events, from any point on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from pellucid_shared import keyspace
from pellucid_shared.errors import RequestError
from pellucid_shared.wire import Event, JobState

from .jobs import Jobs

_BLOCK_MS = 5_000
log = logging.getLogger("pellucid.gateway")
_STREAM_ID = re.compile(r"\d{1,20}-\d{1,20}")


def check_event_id(last: str | None) -> str:
    """The stream id to read after; raises RequestError where Last-Event-ID is none of ours."""
    if last is None or last == "":
        return "0-0"
    if not _STREAM_ID.fullmatch(last):
        raise RequestError(f"Last-Event-ID {last[:60]!r} is not the id of an event")
    return last


async def follow(redis: Redis, jobs: Jobs, job: str, after: str) -> AsyncIterator[dict[str, str]]:
    """As :func:`_events`; where Redis is lost it ends too, and the reader comes back."""
    try:
        async for message in _events(redis, jobs, job, after):
            yield message
    except RedisError as error:
        log.error("the events of job %s end: Redis does not answer: %s", job, error)


async def _events(redis: Redis, jobs: Jobs, job: str, after: str) -> AsyncIterator[dict[str, str]]:
    """Events after ``after``, as they come, to the job's final state; then it ends.

    A reader that comes later than the log keeps gets a ``gap`` event with the present state first.
    """
    if await _trimmed(redis, job, after):
        record = await jobs.show(job)
        state = {"state": record.state.value, "error": record.error}
        yield _message(Event(id=after, type="gap", attempt=record.attempt, time=0.0, data=state))
        if record.state.final:
            return
    while True:
        found: Any = await redis.xread({keyspace.job_events(job): after}, block=_BLOCK_MS, count=500)
        if not found and (await jobs.show(job)).state.final:
            entries: Any = await redis.xrange(keyspace.job_events(job), f"({after}")
            if not entries:
                return  # everything was sent, to an earlier reader perhaps
            found = [("", entries)]
        for identity, fields in found[0][1] if found else []:
            after = identity
            event = _event(after, fields)
            yield _message(event)
            if event.type == "state" and JobState(event.data["state"]).final:
                return


async def _trimmed(redis: Redis, job: str, after: str) -> bool:
    if after == "0-0":
        return False
    first: Any = await redis.xrange(keyspace.job_events(job), count=1)
    return bool(first) and _order(first[0][0]) > _order(after)


def _order(identity: str) -> tuple[int, int]:
    time, _, number = identity.partition("-")
    return int(time), int(number)


def _event(identity: str, text: dict[str, str]) -> Event:
    return Event(
        id=identity,
        type=text["type"],  # type: ignore[arg-type]
        attempt=int(text["attempt"]),
        time=float(text["time"]),
        data=json.loads(text["data"]),
    )


def _message(event: Event) -> dict[str, str]:
    return {"id": event.id, "event": event.type, "data": event.model_dump_json(exclude={"id"})}

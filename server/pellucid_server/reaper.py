"""The loop that gives back to the queue what dead workers held."""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import RedisError

from .jobs import Jobs

_EVERY_SECONDS = 2.0
log = logging.getLogger("pellucid.gateway")


async def reap_for_ever(jobs: Jobs) -> None:
    """Look for expired leases until cancelled; any number of gateways may do so at once."""
    while True:
        try:
            if count := await jobs.reap() + await jobs.resend():
                log.warning("%d jobs of dead workers were put back on their queues", count)
        except (RedisError, OSError) as error:
            log.error("the reaper cannot reach Redis: %s", error)
        await asyncio.sleep(_EVERY_SECONDS)

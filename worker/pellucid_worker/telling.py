"""From a run to its job's event log: the tokens it chooses, and what its graph logs."""

from __future__ import annotations

import logging
from typing import Any

import redis

from .jobs import Claim, Jobs

log = logging.getLogger("pellucid.worker")


class Telling:
    """The ``notify`` of one run. Each event is fenced by the claim's attempt. A Redis that does not answer
    costs the job its lease, and is no fault of the graph's: the events are dropped."""

    def __init__(self, jobs: Jobs, claim: Claim) -> None:
        self._jobs, self._claim = jobs, claim
        self._lost = False

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if self._lost:
            return
        try:
            self._jobs.event(self._claim, kind, data)
        except redis.RedisError:
            self._lost = True
            log.exception("job %s: Redis is lost, and so are this run's events", self._claim.job)

"""The heart of a worker: keeps its registration and leases alive, and ends the runs that should end."""

from __future__ import annotations

import enum
import logging
import threading
import time

import redis

from pellucid_shared import keyspace

from .jobs import Claim, Jobs
from .register import Registration

#: How long a worker that is told to stop lets the running job go on.
GRACE_SECONDS = 3.0

log = logging.getLogger("pellucid.worker")


class Reason(enum.Enum):
    """Why a run should end before it is done."""

    CANCELLED = "its user asked to cancel it"
    LOST = "another attempt has it"
    STOPPING = "the worker is told to stop"


class Hold:
    """One claimed job's line to its run: ``ended`` is set once the run should end, ``reason`` says why."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.reason: Reason | None = None

    def end(self, reason: Reason) -> None:
        """The first reason stands."""
        self.reason = self.reason or reason
        self.ended.set()


class Heart:
    """Beats once a second from ``start`` to ``stop``."""

    def __init__(self, jobs: Jobs, registration: Registration) -> None:
        self._jobs, self._registration = jobs, registration
        self._held: dict[Claim, Hold] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._cut = float("inf")
        self._thread = threading.Thread(target=self._run, name="pellucid-heart", daemon=True)

    @property
    def draining(self) -> bool:
        """The worker is told to stop: nothing is to be begun."""
        return self._cut < float("inf")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def drain(self) -> None:
        """Runs get some seconds to finish, then they are ended. Does not block."""
        self._cut = min(self._cut, time.monotonic() + GRACE_SECONDS)

    def hold(self, claim: Claim) -> Hold:
        """Renew this claim from now on."""
        hold = Hold()
        if claim.cancel:
            hold.end(Reason.CANCELLED)
        with self._lock:
            self._held[claim] = hold
        return hold

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._held.pop(claim, None)

    def _run(self) -> None:
        while not self._stopped.wait(keyspace.HEARTBEAT_SECONDS):
            try:
                self._beat()
            except redis.RedisError as error:  # the leases run out if it lasts; the jobs then run elsewhere
                log.warning("Redis does not answer: %s", error)
            except Exception:  # a worker whose heart stands still is taken for dead
                log.exception("the heart missed a beat")

    def _beat(self) -> None:
        with self._lock:
            held = dict(self._held)
        if time.monotonic() >= self._cut:
            for hold in held.values():
                hold.end(Reason.STOPPING)
        self._registration.beat()
        lost, cancelled = self._jobs.renew(held)
        for claim in lost:
            held[claim].end(Reason.LOST)
        for claim in cancelled:
            held[claim].end(Reason.CANCELLED)

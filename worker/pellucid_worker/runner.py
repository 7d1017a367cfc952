"""One job from claim to finish."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import redis

from pellucid_shared import keyspace
from pellucid_shared.errors import ExecutionError, JobCancelledError, JobError, PellucidError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import pack, unpack_tensors
from pellucid_shared.wire import ResultInfo

from .engine import Engine
from .heart import Heart, Hold, Reason
from .jobs import Claim, Jobs, Release
from .store import Store
from .telling import Telling
from .tensors import structure_to_wire

#: How often a job that waits its turn looks whether it should end.
_LOOK_SECONDS = 0.2

log = logging.getLogger("pellucid.worker")


class Runner:
    """Carries out jobs on one engine. Any number of threads may wait in ``run``; they take turns.

    Args:
        send: puts a job back on the model's queue.
    """

    def __init__(
        self, engine: Engine, jobs: Jobs, store: Store, heart: Heart, send: Callable[[str], None]
    ) -> None:
        self._engine, self._jobs, self._store, self._heart, self._send = engine, jobs, store, heart, send
        self._turn = threading.Lock()

    def run(self, job: str) -> None:
        """Claim a job, run it, store its result, and record how it ended. A job that is not to be had (its
        twin has it, or it was cancelled) is left alone; a worker that is told to stop gives its jobs back."""
        if self._heart.draining:
            self._send(job)
            return
        claim = self._jobs.claim(job)
        if claim is None:
            log.info("job %s is not to be had; left alone", job)
            return
        hold = self._heart.hold(claim)
        try:
            self._carry_out(claim, hold)
        except redis.RedisError:
            log.exception("job %s lost Redis; its lease will run out", job)
        finally:
            self._heart.release(claim)

    def _carry_out(self, claim: Claim, hold: Hold) -> None:
        try:
            result = self._compute(claim, hold)
        except JobCancelledError as error:
            self._ended(claim, hold.reason, error)
        except redis.RedisError:
            raise
        except PellucidError as error:
            self._jobs.fail(claim, error.to_problem())
            log.info("job %s failed: %s", claim.job, error)
        except Exception as error:  # whatever it is, the job ends and says so; the cause is the log's
            log.exception("job %s failed in the worker", claim.job)
            problem = ExecutionError(
                f"the worker failed with {type(error).__name__}; its log has more under job {claim.job}"
            )
            self._jobs.fail(claim, problem.to_problem())
        else:
            recorded = self._jobs.complete(claim, result)
            if not recorded:
                self._store.delete(result.key)
            said = "completed" if recorded else "was taken over; its result is dropped"
            log.info("job %s %s", claim.job, said)

    def _compute(self, claim: Claim, hold: Hold) -> ResultInfo:
        work = self._jobs.work(claim.job)
        graph = Graph.from_json(work.graph)
        with self._in_turn(hold):
            log.info("job %s runs, attempt %d", claim.job, claim.attempt)
            literals = self._literals(claim.job, graph)  # in turn: those of one job in memory at a time
            telling = Telling(self._jobs, claim)
            saved = self._engine.run(graph, work.inputs, literals, cancelled=hold.ended, notify=telling)
        data = pack(structure_to_wire(saved))
        key = keyspace.result(claim.job, claim.attempt)
        self._store.put(key, data)
        return ResultInfo(key=key, bytes=len(data), names=list(saved))

    @contextlib.contextmanager
    def _in_turn(self, hold: Hold) -> Iterator[None]:
        """Wait for the engine; raises JobCancelledError as soon as the job should end instead."""
        while not self._turn.acquire(timeout=_LOOK_SECONDS):
            _not_ended(hold)
        try:
            _not_ended(hold)
            yield
        finally:
            self._turn.release()

    def _literals(self, job: str, graph: Graph) -> dict[str, Any]:
        if not graph.literals():
            return {}
        try:
            return unpack_tensors(self._store.get(keyspace.upload(job)))
        except FileNotFoundError:
            raise JobError(
                "the tensors this job came with are not in the store any more; send it again"
            ) from None

    def _ended(self, claim: Claim, reason: Reason | None, error: JobCancelledError) -> None:
        """The run was ended from outside."""
        if reason is Reason.STOPPING:
            released = self._jobs.release(claim)
            if released is Release.QUEUED:
                self._send(claim.job)
                log.info("job %s was given back: the worker stops", claim.job)
            if released is not Release.CANCEL:
                return
        if reason is Reason.LOST:
            log.info("job %s was taken over by another attempt", claim.job)
            return
        self._jobs.cancelled(claim, error.to_problem())
        log.info("job %s was cancelled", claim.job)


def _not_ended(hold: Hold) -> None:
    if hold.ended.is_set():
        raise JobCancelledError("the job was cancelled before it ran")

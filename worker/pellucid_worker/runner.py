"""One job from claim to finish, and the heart that keeps claims alive."""

from __future__ import annotations

import logging
import threading
from typing import Any

import redis

from pellucid_shared import keyspace
from pellucid_shared.errors import ExecutionError, JobCancelledError, PellucidError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import pack, unpack_tensors
from pellucid_shared.wire import ResultInfo

from .engine import Engine
from .jobs import Claim, Jobs
from .register import Registration
from .store import Store
from .tensors import structure_to_wire

log = logging.getLogger("pellucid.worker")


class Heart:
    """A thread that keeps the worker registered and its leases alive, and passes on cancellations."""

    def __init__(self, jobs: Jobs, registration: Registration) -> None:
        self._jobs, self._registration = jobs, registration
        self._held: dict[Claim, threading.Event] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pellucid-heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def hold(self, claim: Claim) -> threading.Event:
        """Renew this claim from now on; the event is set once its run should end."""
        cancelled = threading.Event()
        with self._lock:
            self._held[claim] = cancelled
        return cancelled

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._held.pop(claim, None)

    def _beat(self) -> None:
        while not self._stopped.wait(1.0):
            try:
                self._registration.beat()
                with self._lock:
                    held = dict(self._held)
                for claim in (ended for group in self._jobs.renew(held) for ended in group):
                    held[claim].set()
            except redis.RedisError as error:  # the leases run out if it lasts; the jobs then run elsewhere
                log.warning("Redis does not answer: %s", error)


class Runner:
    """Carries out jobs on one engine. Any number of threads may wait in ``run``; the engine takes turns."""

    def __init__(self, engine: Engine, jobs: Jobs, store: Store, heart: Heart) -> None:
        self._engine, self._jobs, self._store, self._heart = engine, jobs, store, heart

    def run(self, job: str) -> None:
        """Claim a job, run it, store its result, and record how it ended. A job that is not to be had (its
        twin has it, or it was cancelled) is left alone."""
        claim = self._jobs.claim(job)
        if claim is None:
            log.info("job %s is not to be had; left alone", job)
            return
        cancelled = self._heart.hold(claim)
        try:
            result = self._compute(claim, cancelled)
            recorded = self._jobs.complete(claim, result)
            if not recorded:
                self._store.delete(result.key)
            log.info("job %s %s", job, "completed" if recorded else "was taken over; its result is dropped")
        except JobCancelledError as error:
            self._jobs.cancelled(claim, error.to_problem())
            log.info("job %s was cancelled", job)
        except PellucidError as error:
            self._jobs.fail(claim, error.to_problem())
            log.info("job %s failed: %s", job, error)
        except redis.RedisError:
            log.exception("job %s lost Redis; its lease will run out", job)
        except Exception as error:  # whatever it is, the job ends and says so; the cause is the log's
            log.exception("job %s failed in the worker", job)
            problem = ExecutionError(f"the worker failed: {type(error).__name__}").to_problem()
            self._jobs.fail(claim, problem)
        finally:
            self._heart.release(claim)

    def _compute(self, claim: Claim, cancelled: threading.Event) -> ResultInfo:
        work = self._jobs.work(claim.job)
        graph = Graph.from_json(work.graph)
        saved = self._engine.run(graph, work.inputs, self._literals(claim.job, graph), cancelled=cancelled)
        data = pack(structure_to_wire(saved))
        key = keyspace.result(claim.job, claim.attempt)
        self._store.put(key, data)
        return ResultInfo(key=key, bytes=len(data), names=list(saved))

    def _literals(self, job: str, graph: Graph) -> dict[str, Any]:
        return unpack_tensors(self._store.get(keyspace.upload(job))) if graph.names_literals() else {}

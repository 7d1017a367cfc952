"""A real worker in a process of its own, and jobs written as the gateway writes them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from celery import Celery

from pellucid_server.jobs import Jobs as GatewayJobs
from pellucid_shared import keyspace
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor, pack_tensors, unpack
from pellucid_shared.wire import JobState, TokenizedInvoke
from pellucid_worker.store import Store

DEADLINE_SECONDS = 120


def until(holds: Callable[[], Any], what: str) -> Any:
    """Poll until ``holds()`` is true, and give its value."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := holds()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


@dataclass
class Desk:
    """Redis, the store and the broker from the gateway's side."""

    redis_url: str
    store_url: str

    def __post_init__(self) -> None:
        self.redis: Any = redis.Redis.from_url(self.redis_url, decode_responses=True)
        self.store = Store(self.store_url)
        broker = self.redis_url.replace("unix://", "redis+socket://")
        self._celery = Celery("test", broker=broker, set_as_current=False)

    def close(self) -> None:
        self.redis.close()
        self._celery.close()

    def write(
        self, graph: Graph, inputs: list[list[list[int]]], tensors: Mapping[str, WireTensor] | None = None
    ) -> str:
        """The record of a queued job; it is not sent yet."""
        job, now = uuid.uuid4().hex, time.time()
        if tensors:
            self.store.put(keyspace.upload(job), pack_tensors(tensors))
        invokes = [TokenizedInvoke(ids=ids).model_dump(exclude_none=True) for ids in inputs]
        record = {
            "model": graph.model,
            "state": "queued",
            "attempt": 0,
            "times": json.dumps({"received": now, "queued": now}),
            "graph_sha256": graph.sha256,
            "inputs": json.dumps(invokes),
        }
        self.redis.hset(keyspace.job(job), mapping=record)
        self.redis.set(keyspace.job_graph(job), graph.to_json())
        self.redis.zadd(keyspace.model_waiting(graph.model), {job: now})
        return job

    def send(self, job: str, times: int = 1) -> None:
        model = self.redis.hget(keyspace.job(job), "model")
        for _ in range(times):
            self._celery.send_task(keyspace.TASK, args=[job], queue=keyspace.queue(model))

    def submit(self, graph: Graph, *inputs: list[list[int]], **more: Any) -> str:
        job = self.write(graph, list(inputs), **more)
        self.send(job)
        return job

    def cancel(self, job: str) -> None:
        """As the gateway does it."""

        async def ask() -> None:
            async with redis.asyncio.Redis.from_url(self.redis_url, decode_responses=True) as client:
                await GatewayJobs(client, self.redis_url).cancel(job)

        asyncio.run(ask())

    def expire(self, job: str) -> None:
        """Let the lease of a job run out now. A worker that is alive renews it within a second."""
        self.redis.zadd(keyspace.LEASES, {job: 0})

    def lease(self, job: str) -> float | None:
        """When a job's lease runs out, in Unix seconds."""
        found: float | None = self.redis.zscore(keyspace.LEASES, job)
        return found

    def field(self, job: str, name: str) -> Any:
        text = self.redis.hget(keyspace.job(job), name)
        return json.loads(text) if text and name in ("times", "error", "result") else text

    def state(self, job: str) -> JobState:
        return JobState(self.field(job, "state"))

    def ended(self, job: str) -> JobState:
        """The state a job ends in, once it has."""
        until(lambda: self.state(job).final, f"job {job} to end")
        return self.state(job)

    def result(self, job: str) -> Any:
        return unpack(self.store.get(self.field(job, "result")["key"]))

    def events(self, job: str) -> list[tuple[str, str, Any]]:
        """(type, attempt, data) of each event so far."""
        entries = self.redis.xrange(keyspace.job_events(job))
        return [(e["type"], e["attempt"], json.loads(e["data"])) for _, e in entries]

    def states(self, job: str) -> list[str]:
        return [data["state"] for kind, _, data in self.events(job) if kind == "state"]

    def deployment(self, model: str) -> dict[str, str]:
        fields: dict[str, str] = self.redis.hgetall(keyspace.model(model))
        return fields

    def workers(self, model: str) -> list[str]:
        alive: list[str] = self.redis.zrange(keyspace.model_workers(model), 0, -1)
        return alive


class WorkerProcess:
    """`pellucid worker NAME=SOURCE`, its output in a log."""

    def __init__(self, desk: Desk, name: str, source: Path | str, log: Path, **env: str) -> None:
        self.log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PELLUCID_REDIS_URL": desk.redis_url,
            "PELLUCID_STORE_URL": desk.store_url,
            **env,
        }
        command = [sys.executable, "-m", "pellucid", "worker", f"{name}={source}"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def output(self) -> str:
        return self.log.read_text()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it, if it lives; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

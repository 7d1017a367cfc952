"""Counters and gauges for Prometheus; each app has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from .deployments import Deployments


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pellucid_http_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.admitted = Counter("pellucid_jobs_admitted", "Jobs queued", ["model"], registry=self.registry)
        self._queued = Gauge("pellucid_jobs_queued", "Jobs waiting", ["model"], registry=self.registry)
        self._workers = Gauge("pellucid_workers", "Living workers", ["model"], registry=self.registry)

    async def text(self, deployments: Deployments) -> bytes:
        """The exposition, with the queues as they stand."""
        for each in await deployments.list():
            self._queued.labels(each.id).set(each.queued)
            self._workers.labels(each.id).set(each.workers)
        return generate_latest(self.registry)

"""Celery: a worker's queue, its one task, and the loop that takes messages until told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from celery import Celery
from celery.signals import setup_logging, worker_shutting_down

from pellucid_shared import keyspace

from .settings import Settings


def make_app(settings: Settings, model: str) -> Celery:
    """The Celery app of a model's workers: JSON only, acknowledged once run, no results, no chatter."""
    app = Celery("pellucid", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": 3600},
        task_acks_late=True,
        task_default_queue=keyspace.queue(model),
        task_ignore_result=True,
        task_serializer="json",
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
    )
    return app


def send(app: Celery, job: str) -> None:
    """Put a job back on the queue of the app's model."""
    app.send_task(keyspace.TASK, args=[job], ignore_result=True)


def take_jobs(app: Celery, run: Callable[[str], None], concurrency: int, on_stop: Callable[[], None]) -> int:
    """Call ``run(job)`` for each message, up to ``concurrency`` at once, until SIGTERM or SIGINT; in the
    main thread. Returns the exit code once every ``run`` has returned.

    Delivery may repeat (the broker redelivers what is not acknowledged within an hour); ``run`` must take
    that, and does: a job is claimed before it is run.

    Args:
        on_stop: called by the signal's handler; it must not block.
    """

    def stopping(**_: object) -> None:
        on_stop()

    setup_logging.connect(_keep_logging, weak=False)
    worker_shutting_down.connect(stopping, weak=False)
    app.task(run, name=keyspace.TASK)
    worker = app.Worker(
        hostname=f"pellucid-{os.getpid()}@{socket.gethostname()}",
        pool="threads",
        concurrency=concurrency,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _keep_logging(**_: object) -> None:
    """Connected, it keeps Celery from replacing the command's logging."""

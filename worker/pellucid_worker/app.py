"""The Celery app of a worker: one queue, one task, JSON only, late acknowledgement."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery
from celery.signals import setup_logging

from pellucid_shared import keyspace

from .settings import Settings


def make_app(settings: Settings, model: str, run: Callable[[str], None]) -> Celery:
    """A Celery app that calls ``run(job_id)`` for each message of the model's queue.

    Delivery may repeat (the broker redelivers what is not acknowledged within an hour); ``run`` must take
    that, and does: a job is claimed before it is run.
    """
    app = Celery("pellucid", broker=settings.broker_url)
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
    setup_logging.connect(_keep_logging, weak=False)
    app.task(name=keyspace.TASK)(run)
    return app


def _keep_logging(**_: object) -> None:
    """Connected, it keeps Celery from replacing the command's logging."""

"""`pellucid worker`: load a model, serve its queue until told to stop."""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from pellucid_shared.errors import ExecutionError, PellucidError

if TYPE_CHECKING:
    from .engine import Engine
    from .register import Registration

log = logging.getLogger("pellucid.worker")


@click.command()
@click.argument("deployment", metavar="NAME=SOURCE")
@click.option("--dtype", default=None, help="float32, bfloat16, ...; by default the checkpoint's own.")
@click.option("--revision", default=None, help="Revision of a hub model.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=64, show_default=True, help="Jobs taken in at once."
)
def worker(deployment: str, dtype: str | None, revision: str | None, concurrency: int) -> None:
    """Hold one model resident and run the jobs of its queue.

    SOURCE is a folder or a hub id. Reads PELLUCID_REDIS_URL and PELLUCID_STORE_URL from the environment.
    SIGTERM and SIGINT stop it within seconds; what it has not finished goes back to the queue.
    """
    _log_readably()
    name, _, source = deployment.partition("=")
    if not name or not source:
        raise click.UsageError(f"{deployment!r} is not NAME=SOURCE, e.g. smollm2=/models/smollm2")
    signal.signal(signal.SIGTERM, _exit)  # until Celery's own takes over, so that `finally` is run
    try:
        code = _serve(name, source, dtype, revision, concurrency)
    except PellucidError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(code)


def _serve(name: str, source: str, dtype: str | None, revision: str | None, concurrency: int) -> int:
    from .settings import Settings
    from .store import Store

    settings = Settings.from_env()  # what is wrong here is said before torch is imported, which takes seconds
    client, store = settings.connect(), Store(settings.store_url)

    from .app import make_app, send, take_jobs
    from .heart import Heart
    from .jobs import Jobs
    from .register import Registration
    from .runner import Runner

    registration = Registration(client, name, source)
    registration.loading(0.0)
    try:
        engine = _load(registration, name, source, dtype, revision)
        jobs, app = Jobs(client, name), make_app(settings, name)
        heart = Heart(jobs, registration)
        runner = Runner(engine, jobs, store, heart, lambda job: send(app, job))
        heart.start()
        log.info(
            "%s is ready: %s, %s parameters", name, engine.card.class_name, f"{engine.card.parameters:,}"
        )
        try:
            return take_jobs(app, runner.run, concurrency, heart.drain)
        finally:
            heart.stop()
    finally:
        registration.stopped()


def _load(
    registration: Registration, name: str, source: str, dtype: str | None, revision: str | None
) -> Engine:
    """The engine, registered as ready; a failure is registered too, and raised as a PellucidError."""
    from .loader import load

    log.info("loading %s from %s", name, source)
    try:
        engine = load(source, id=name, dtype=dtype, revision=revision, progress=registration.loading)
        registration.ready(engine)
    except PellucidError as error:
        registration.failed(error.message)
        raise
    except Exception as error:
        reason = f"{source} cannot be served: {type(error).__name__}: {_first_line(error)}"
        registration.failed(reason)
        raise ExecutionError(reason) from error
    return engine


def _log_readably() -> None:
    """One line an event on standard output; warnings of libraries, news of our own."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    log.setLevel(logging.INFO)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]

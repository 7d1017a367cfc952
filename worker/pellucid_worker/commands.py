"""`pellucid worker`: load a model, serve its queue until told to stop."""

from __future__ import annotations

import logging
import sys

import click

from pellucid_shared.errors import PellucidError

log = logging.getLogger("pellucid.worker")


@click.command()
@click.argument("deployment", metavar="NAME=SOURCE")
@click.option("--dtype", default=None, help="float32, bfloat16, ...; by default the checkpoint's own.")
@click.option("--revision", default=None, help="Revision of a hub model.")
@click.option("--concurrency", default=64, show_default=True, help="Jobs taken in at once.")
def worker(deployment: str, dtype: str | None, revision: str | None, concurrency: int) -> None:
    """Hold one model resident and run the jobs of its queue.

    Reads PELLUCID_REDIS_URL and PELLUCID_STORE_URL from the environment.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    name, _, source = deployment.partition("=")
    if not name or not source:
        raise click.UsageError(f"{deployment!r} is not NAME=SOURCE, e.g. smollm2=/models/smollm2")
    try:
        _serve(name, source, dtype, revision, concurrency)
    except PellucidError as error:
        raise click.ClickException(str(error)) from None


def _serve(name: str, source: str, dtype: str | None, revision: str | None, concurrency: int) -> None:
    import redis

    from .app import make_app
    from .jobs import Jobs
    from .loader import load
    from .register import Registration
    from .runner import Heart, Runner
    from .settings import Settings
    from .store import Store

    settings = Settings.from_env()
    client = redis.Redis.from_url(settings.redis_url)
    registration = Registration(client, name, source)
    try:
        registration.loading(0.0)
        log.info("loading %s from %s", name, source)
        engine = load(source, id=name, dtype=dtype, revision=revision, progress=registration.loading)
    except PellucidError as error:
        registration.failed(error.message)
        raise
    jobs = Jobs(client, name)
    heart = Heart(jobs, registration)
    runner = Runner(engine, jobs, Store(settings.store_url), heart)
    registration.ready(engine)
    heart.start()
    log.info("%s is ready: %s, %s parameters", name, engine.card.class_name, f"{engine.card.parameters:,}")
    try:
        app = make_app(settings, name, runner.run)
        app.worker_main(_arguments(concurrency))
    finally:
        heart.stop()
        registration.stopped()


def _arguments(concurrency: int) -> list[str]:
    return [
        "worker",
        "--pool=threads",
        f"--concurrency={concurrency}",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=WARNING",
    ]

"""The server's commands: `pellucid serve`, the gateway on its own, and `pellucid up`."""

from __future__ import annotations

import logging
import sys

import click

from pellucid_shared.errors import PellucidError

from .up import up as up


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8470, show_default=True)
def serve(host: str, port: int) -> None:
    """Run the HTTP gateway.

    Reads PELLUCID_REDIS_URL and PELLUCID_STORE_URL from the environment.
    """
    import uvicorn

    from .app import create_app
    from .settings import Settings

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        app = create_app(Settings.from_env())
    except PellucidError as error:
        raise click.ClickException(str(error)) from None
    # An event stream lasts as long as its job; a stop does not wait for it.
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)

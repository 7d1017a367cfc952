"""What the commands that ask a server share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ._http import Connection

host_option = click.option("--host", help="URL of the server; by default PELLUCID_HOST.")


def server(host: str | None) -> Connection:
    """The server that is asked."""
    from ._config import config
    from ._http import Connection

    url = host or config.host
    if url is None:
        raise click.ClickException("no server is named: set PELLUCID_HOST to its URL, or give --host")
    return Connection(url)

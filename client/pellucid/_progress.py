"""One live status line on a terminal: queued 3rd, running, downloading. Silent anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import click

from pellucid_shared.wire import Event

_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}


def printed(text: str) -> None:
    """Write what the user logs to stdout, as ``print`` would."""
    click.echo(text)


class StatusLine:
    """A context in which :meth:`show` replaces the line. Nothing is imported or written where it is off."""

    def __init__(self, wanted: bool) -> None:
        self._on = wanted and sys.stderr.isatty()
        self._status: Any = None

    def __enter__(self) -> StatusLine:
        if self._on:
            from rich.console import Console

            self._status = Console(stderr=True).status("sending")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def print(self, text: str) -> None:
        """Write a line to stdout, above the status line."""
        if self._status is not None:
            self._status.stop()
        printed(text)
        if self._status is not None:
            self._status.start()

    def event(self, event: Event) -> None:
        """Show what an event of a job says. What the user logs is printed whether or not there is a line."""
        data = event.data
        if event.type == "log":
            self.print(str(data.get("text", "")))
        elif event.type == "token":
            self.show(f"running, step {data.get('step')}")
        elif event.type == "progress":
            self.show(f"{data.get('what', 'working')} {100 * float(data.get('fraction', 0)):.0f} %")
        elif event.type in ("state", "gap"):
            position = data.get("position")
            place = f" {_ORDINALS.get(position, f'{position}th')}" if isinstance(position, int) else ""
            self.show(f"{data.get('state', '')}{place}")

    def downloaded(self, done: int, total: int | None) -> None:
        """Show how much of a result has arrived."""
        of = f"/{total / 2**20:.0f}" if total else ""
        self.show(f"downloading {done / 2**20:.0f}{of} MB")

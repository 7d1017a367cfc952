"""`pellucid status` and `cancel`: jobs by their ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._cli_server import host_option, server

if TYPE_CHECKING:
    from ._job import Job


@click.command()
@click.argument("id")
@host_option
def status(id: str, host: str | None) -> None:
    """Say how job ID stands."""
    record = _job(id, host).record()
    state = record.state.value
    if record.position is not None:
        state += f", number {record.position} in the queue"
    if record.error is not None:
        state += f": {record.error.get('detail', 'no reason was given')}"
    times = record.times
    seconds = ""
    if record.state.final and "received" in times:
        seconds = f" after {times[record.state.value] - times['received']:.1f} s"
    click.echo(f"job {record.id} on {record.model}: {state}{seconds}")


@click.command()
@click.argument("id")
@host_option
def cancel(id: str, host: str | None) -> None:
    """Cancel job ID. One that runs ends at the next module it touches."""
    job = _job(id, host)
    job.cancel()
    record = job.record()
    if record.state.value == "cancelled":
        said = "is cancelled"
    elif record.state.final:
        said = f"had {record.state.value} already"
    else:
        said = "was asked to end"
    click.echo(f"job {record.id} {said}")


def _job(id: str, host: str | None) -> Job:
    from ._job import Job

    return Job.on(server(host), id)

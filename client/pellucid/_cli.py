"""The command line. Commands of the server and the worker are loaded by name, when they are run."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import click

from pellucid_shared import __version__
from pellucid_shared.errors import PellucidError

from ._cli_experiments import diff, run, show
from ._cli_export import export
from ._cli_jobs import cancel, status
from ._cli_server import host_option, server

#: Package of a command -> (the part of pellucid it belongs to, the extra that brings what it imports).
_PARTS = {"pellucid_server": ("server", "server"), "pellucid_worker": ("worker", "worker")}
#: What `pellucid --help` says of commands it does not load for that.
_SUMMARIES = {
    "serve": "Run the HTTP gateway.",
    "up": "Serve models on this machine: Redis, workers and gateway in one.",
    "worker": "Hold one model resident and run the jobs of its queue.",
}


class _Commands(click.Group):
    """The client's own commands, and those in the entry-point group ``pellucid.commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_points()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        point = _points().get(name)
        if point is None:
            return super().get_command(ctx, name)
        try:
            command: click.Command = point.load()
        except ModuleNotFoundError as error:
            _say_which_extra(point, error)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:  # a command may import the heavy part only when it runs
            point = _points().get(ctx.invoked_subcommand or "")
            if point is None:
                raise
            _say_which_extra(point, error)
        except PellucidError as error:
            raise click.ClickException(str(error)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {name: command.get_short_help_str() for name, command in self.commands.items()}
        rows = [(name, own.get(name) or _SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="pellucid.commands")}


def _say_which_extra(point: EntryPoint, error: ModuleNotFoundError) -> NoReturn:
    """End with one line if a package that an extra brings is missing; anything else is a fault of ours."""
    package = point.module.partition(".")[0]
    name = error.name or ""
    missing = name.partition(".")[0]
    if package not in _PARTS or (name != package and missing.startswith("pellucid")):
        raise error
    part, extra = _PARTS[package]
    click.echo(
        f"pellucid {point.name} needs the {part} part ({missing} is not installed): "
        f"pip install 'pellucid[{extra}]'",
        err=True,
    )
    sys.exit(2)


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="pellucid")
def main() -> None:
    """Read and change any hidden state of a transformer, here or on a server.

    The client's commands ask the server that PELLUCID_HOST names.
    """


@main.command()
@host_option
def models(host: str | None) -> None:
    """List the models a server has."""
    rows = [("MODEL", "STATE", "CLASS", "PARAMETERS", "DTYPE", "QUEUED", "SOURCE")]
    for model in server(host).get_json("/v1/models"):
        state = f"loading {model['progress']:.0%}" if model["state"] == "loading" else model["state"]
        size = f"{model['parameters']:,}" if model["parameters"] else "-"
        names = (model["class_name"] or "-", size, model["dtype"] or "-")
        rows.append((model["id"], state, *names, str(model["queued"]), model["source"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@main.command()
@host_option
def whoami(host: str | None) -> None:
    """Say who the server takes you for."""
    asked = server(host)
    me = asked.get_json("/v1/whoami")
    who = "anonymous" if me["anonymous"] else me["key"]
    click.echo(f"{who} at {asked.url}, which runs pellucid {me['version']}")


for _command in (cancel, diff, export, run, show, status):
    main.add_command(_command)

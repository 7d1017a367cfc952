"""`pellucid run`, `show` and `diff`: experiments that lie in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pellucid_shared.errors import PellucidError

from ._cli_server import host_option, server

if TYPE_CHECKING:
    from pellucid_shared.graph import Graph
    from pellucid_shared.packing import WireTensor

    from ._job import Job

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Save the results as safetensors."
)
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run(file: Path, out: Path | None, host: str | None, as_json: bool) -> None:
    """Run an experiment's FILE on a server, and print what came back.

    The tensors it names lie beside it, in a file of the same name that ends in .safetensors. In the file of
    --out, members of structures are named by their place (pair.0), and numbers are in its metadata.
    """
    from ._files import beside, load_experiment
    from ._remote import RemoteModel

    if out is not None and out.resolve() in (file.resolve(), beside(file).resolve()):
        raise click.ClickException(f"{out} is part of the experiment; give --out another name")
    experiment = load_experiment(file)
    graph = experiment.graph
    jobs: list[Job] = []
    try:
        results = RemoteModel(server(host), graph.model).run(
            graph, (), experiment.literals, progress=True, started=jobs.append
        )
    except PellucidError as error:
        error.where = f"{file}, node {error.node}" if error.node is not None else None
        raise
    leaves = _named(results)
    if out is not None:
        _write(out, leaves)
    if as_json:
        saved = {
            name: {"dtype": leaf.dtype, "shape": list(leaf.shape)}
            if _is_tensor(leaf)
            else {"value": _plain(leaf)}
            for name, leaf in leaves.items()
        }
        click.echo(json.dumps({"job": jobs[0].id, "model": graph.model, "saved": saved}))
        return
    width = max(map(len, leaves), default=0)
    for name, leaf in leaves.items():
        click.echo(f"{name:<{width}}  {_kind(leaf) if _is_tensor(leaf) else _plain(leaf)}")


@click.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Print an experiment's FILE as code, and the tensors it names."""
    from pellucid_shared.show import show as as_code

    from ._files import read_graph

    graph = read_graph(file)
    click.echo(as_code(graph), nl=False)
    for line in _tensors(file, graph).values():
        click.echo(line)


@click.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
def diff(a: Path, b: Path) -> None:
    """Print what differs between the experiments in files A and B.

    Exits with 0 where they are the same experiment (one SHA-256), 1 where they are not, 2 where one cannot
    be read.
    """
    from pellucid_shared.diff import diff as differences

    from ._files import read_graph

    try:
        old, new = read_graph(a), read_graph(b)
        mine, theirs = _tensors(a, old), _tensors(b, new)
    except PellucidError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    lines = differences(old, new)
    for line in lines:
        click.echo(line)
    for sign, these, others in (("-", mine, theirs), ("+", theirs, mine)):
        for digest in sorted(set(these) - set(others)):
            click.echo(f"{sign} {these[digest]}")
    sys.exit(1 if lines else 0)


def _tensors(file: Path, graph: Graph) -> dict[str, str]:
    """A line for each tensor a graph names, by digest."""
    from pellucid_shared.show import tensor_name

    from ._files import beside, read_literals

    found = read_literals(file, graph)
    missing = f"not in {beside(file).name}"
    return {
        digest: f"{tensor_name(digest)}: {_kind(found[digest]) if digest in found else missing}"
        for digest in sorted(graph.literals())
    }


def _named(results: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a structure by their place, joined with dots."""
    found: dict[str, Any] = {}
    for name, leaf in _leaves(results, prefix):
        if name in found:
            raise click.ClickException(f"two saved values are called {name!r}; save them under other names")
        found[name] = leaf
    return found


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, list | tuple | dict):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


def _write(out: Path, leaves: dict[str, Any]) -> None:
    from pellucid_shared.packing import pack_tensors

    tensors = {name: leaf for name, leaf in leaves.items() if _is_tensor(leaf)}
    plain = {name: json.dumps(_plain(leaf)) for name, leaf in leaves.items() if not _is_tensor(leaf)}
    try:
        out.write_bytes(pack_tensors(tensors, plain))
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from None


def _is_tensor(leaf: Any) -> bool:
    from pellucid_shared.packing import WireTensor

    return isinstance(leaf, WireTensor)


def _kind(tensor: WireTensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}] {tensor.dtype}"


def _plain(leaf: Any) -> Any:
    """A number, string or None as JSON spells it."""
    return str(leaf) if isinstance(leaf, complex) else leaf

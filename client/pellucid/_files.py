"""Experiments as files: a graph's canonical JSON, and the tensors it names in a safetensors file beside it.

``patch.json`` holds the graph's canonical bytes and nothing else, so that its SHA-256 is the graph's.
``patch.safetensors`` beside it, there only where the graph names tensors of the user's, holds them by digest:
what a request carries in its two parts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid_shared.errors import InputError, PellucidError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor, pack_tensors, unpack_tensors

from ._lines import users_line

if TYPE_CHECKING:
    from ._tracer import Tracer


@dataclass(frozen=True)
class Experiment:
    """A graph and the tensors of the user's that it names.

    Attributes:
        graph: what is run; printing the experiment shows it as code.
        literals: its tensors by digest.
    """

    graph: Graph
    literals: Mapping[str, WireTensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        from pellucid_shared.show import show

        return show(self.graph)


def save_experiment(experiment: Tracer | Experiment, path: str | os.PathLike[str]) -> None:
    """Write an experiment to a file: what a trace has recorded, inside its block or after it.

        with model.trace("The Eiffel Tower is in") as tracer:
            ...
        pellucid.save_experiment(tracer, "patch.json")

    Args:
        experiment: a tracer, or what :func:`load_experiment` gave.
        path: ends in ``.json``. The user's own tensors go into a file of the same name that ends in
            ``.safetensors``.

    Raises:
        InputError: another ending.
    """
    file = Path(path)
    if file.suffix != ".json":
        raise InputError(f"an experiment's file ends in .json, found {file.name!r}", where=users_line())
    found = experiment if isinstance(experiment, Experiment) else experiment.experiment
    if found.literals:
        beside(file).write_bytes(pack_tensors(found.literals))
    file.write_bytes(found.graph.to_json())


def load_experiment(path: str | os.PathLike[str]) -> Experiment:
    """Read an experiment that :func:`save_experiment` wrote; ``model.run`` runs it.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: it is not a graph.
        InputError: the tensors it names are not beside it.
    """
    file = Path(path)
    graph = read_graph(file)
    literals = read_literals(file, graph)
    if missing := graph.literals() - set(literals):
        raise InputError(
            f"{file} names tensors that are not in {beside(file)}, which belongs to it; the first of "
            f"{len(missing)} is {min(missing)}",
            where=users_line(),
        )
    return Experiment(graph, literals)


def read_graph(file: Path) -> Graph:
    """The graph in a file, whatever lies beside it; raises GraphError, and LimitError past 8 MiB."""
    try:
        return Graph.from_json(file.read_bytes())
    except PellucidError as error:
        error.where = str(file)
        raise


def read_literals(file: Path, graph: Graph) -> dict[str, WireTensor]:
    """Those of the tensors a graph names that lie beside its file; raises RequestError for a broken file."""
    wanted, tensors = graph.literals(), beside(file)
    if not wanted or not tensors.is_file():
        return {}
    try:
        found = unpack_tensors(tensors.read_bytes())
    except PellucidError as error:
        error.where = str(tensors)
        raise
    return {digest: found[digest] for digest in sorted(wanted & set(found))}


def beside(file: Path) -> Path:
    """Where the tensors of an experiment lie."""
    return file.with_suffix(".safetensors")

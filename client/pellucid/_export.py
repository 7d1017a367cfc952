"""An experiment as a script of plain hooks: what :mod:`pellucid_shared.export` needs, asked of a target."""

from __future__ import annotations

from pathlib import Path

from pellucid_shared.export import hooks_script as script
from pellucid_shared.lint import lint

from ._files import Experiment, beside
from ._replay import tokenized
from ._target import Target


def hooks_script(experiment: Experiment, target: Target, file: Path, source: str | None = None) -> str:
    """The script of an experiment that lies in a file.

    Args:
        target: whose model card says where the model runs its modules, and which counts tokens.
        source: where the script loads the model from; by default the card's own source.

    Raises:
        GraphError: the experiment does not fit the model.
        ExportError: it has a part that is not exported.
    """
    graph = experiment.graph
    lint(graph)
    sizes = []
    for trace in graph.traces:
        for invoke in trace.invokes:
            rows = tokenized(invoke, target)
            sizes.append((len(rows), max(map(len, rows))))
    return script(
        graph,
        target.card,
        sizes,
        {digest: tensor.spec for digest, tensor in experiment.literals.items()},
        source=source or target.card.source,
        literals=beside(file).name,
    )

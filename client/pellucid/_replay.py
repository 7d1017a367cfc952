"""Running an experiment that is written already: one that was loaded from a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid_shared.errors import InputError, PellucidError
from pellucid_shared.graph import Graph, Invoke

from ._files import Experiment
from ._inputs import Prompt, prompt
from ._lines import users_line
from ._save import received
from ._target import Target


def replay(model: str, target: Target, given: Graph | Experiment, *, progress: bool) -> dict[str, Any]:
    """See :meth:`pellucid.LanguageModel.run`."""
    experiment = Experiment(given) if isinstance(given, Graph) else given
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"model.run takes a Graph, or what pellucid.load_experiment gave; found {type(given).__name__}",
            where=users_line(),
        )
    graph = replace(experiment.graph, model=model)
    if graph.literals() - set(experiment.literals):
        raise InputError(
            "this graph names tensors that are not with it; load it with pellucid.load_experiment(path), "
            "which reads those beside it",
            where=users_line(),
        )
    try:
        prompts = [_prompt(invoke, target) for trace in graph.traces for invoke in trace.invokes]
        results = target.run(graph, prompts, experiment.literals, progress=progress, started=lambda job: None)
    except PellucidError as error:
        error.where = error.where or users_line()
        raise
    return received(results)


def _prompt(invoke: Invoke, target: Target) -> Prompt:
    """An invoke as a trace would have it; a text becomes ids where the model is in this process."""
    found = prompt(
        invoke.input if invoke.mask is None else {"input_ids": invoke.input, "attention_mask": invoke.mask}
    )
    if found.tokens is None and not target.distant:
        found.tokenized(target.tokenize(found.texts))
    return found


def tokenized(invoke: Invoke, target: Target) -> list[list[int]]:
    """The rows of ids of an invoke, wherever its model is."""
    found = _prompt(invoke, target)
    if found.ids is None:
        found.tokenized(target.tokenize(found.texts))
    assert found.ids is not None
    return found.ids

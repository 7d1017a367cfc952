"""The engine beside hand-written hooks that do the same work, on one thread, and what a new graph costs.

The hooks start from the same token ids, copy what they save, and end the pass where the engine ends it: after
the last module anything is needed of. Seconds are those this thread has computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from measure import OWN, Figure, Pairs, pairs, seconds
from subject import Measure, Resident, Subject, graph_of

from pellucid_shared.wire import TokenizedInvoke

if TYPE_CHECKING:
    from pellucid import Graph, LanguageModel
    from pellucid_worker.engine import Engine

_PAIRS, _TINY_PAIRS = 40, 120
_EDITED = 25  # layers, at their output and at their MLP's: 50 edits
_NEW_GRAPHS = 16

#: Given a module's output, what goes on instead of it, or None.
Hook = Callable[[torch.Tensor], torch.Tensor | None]
#: Given where to put what is saved, the hooks by module path, in the order of the pass.
Hooks = Callable[[list[torch.Tensor]], dict[str, Hook]]
#: Writes an experiment inside a trace.
Write = Callable[["LanguageModel"], object]


class _EnoughError(BaseException):
    """Ends a pass."""


def by_hand(model: torch.nn.Module, ids: list[int], hooks: Mapping[str, Hook], last: str) -> None:
    """One pass with a hook on each path's output; it ends after the hook of ``last``."""

    def run(path: str, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        new = hooks[path](output)
        if path == last:
            raise _EnoughError
        return new

    handles = [
        model.get_submodule(path).register_forward_hook(functools.partial(run, path)) for path in hooks
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


# --- the same experiments twice ----------------------------------------------------------------------------


def _best_token(model: LanguageModel) -> None:
    model.lm_head.output[:, -1].argmax(-1).save()


def _best_token_by_hand(saved: list[torch.Tensor]) -> dict[str, Hook]:
    return {"lm_head": lambda output: saved.append(output[:, -1].argmax(-1))}


def _one_layer(model: LanguageModel) -> None:
    model.model.layers[-1].output.save()


def _one_layer_by_hand(saved: list[torch.Tensor]) -> dict[str, Hook]:
    return {"model.layers.29": lambda output: saved.append(output.clone())}


def _every_layer(model: LanguageModel) -> None:
    for layer in model.model.layers:
        layer.output.save()


def _every_layer_by_hand(saved: list[torch.Tensor]) -> dict[str, Hook]:
    return {f"model.layers.{i}": lambda output: saved.append(output.clone()) for i in range(30)}


def _one_edit(model: LanguageModel) -> None:
    model.model.layers[10].mlp.output[:, -1] = 0
    _best_token(model)


def _one_edit_by_hand(saved: list[torch.Tensor]) -> dict[str, Hook]:
    def zero(output: torch.Tensor) -> None:
        output[:, -1] = 0

    return {"model.layers.10.mlp": zero, **_best_token_by_hand(saved)}


def _fifty_edits(model: LanguageModel) -> None:
    for layer in model.model.layers[:_EDITED]:
        layer.mlp.output = layer.mlp.output * 0.9
        layer.output = layer.output + 0.1
    _best_token(model)


def _fifty_edits_by_hand(saved: list[torch.Tensor]) -> dict[str, Hook]:
    hooks: dict[str, Hook] = {}
    for index in range(_EDITED):
        hooks[f"model.layers.{index}.mlp"] = lambda output: output * 0.9
        hooks[f"model.layers.{index}"] = lambda output: output + 0.1
    return hooks | _best_token_by_hand(saved)


def _ratio(write: Write, hooks: Hooks) -> Measure:
    """How many times as long the engine takes."""

    def measure(subject: Subject) -> Figure:
        return _beside_hooks(subject.smollm2, write, hooks, subject.repeats(_PAIRS)).ratio()

    return measure


def _beside_hooks(resident: Resident, write: Write, hooks: Hooks, count: int) -> Pairs:
    """A graph the engine has compiled, and the same by hand; both give the same bits."""
    graph = graph_of(resident.model, resident.ids, write)
    inputs = [TokenizedInvoke(ids=[resident.ids])]
    saved: list[torch.Tensor] = []
    mine = hooks(saved)

    def hand() -> None:
        saved.clear()
        by_hand(resident.engine.model, resident.ids, mine, list(mine)[-1])

    def engine() -> list[torch.Tensor]:
        return list(resident.engine.run(graph, inputs, {}).values())

    found = engine()
    hand()
    for ours, theirs in zip(found, saved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return pairs(engine, hand, count, OWN)


# --- the engine's own time, on a model that hardly computes ------------------------------------------------


def own_run(subject: Subject) -> Figure:
    """Microseconds a run takes longer than by hand, one layer saved."""
    taken = _beside_hooks(subject.tiny, _one_layer, _one_layer_by_hand, subject.repeats(_TINY_PAIRS))
    return taken.difference(1e6)


def own_edit(subject: Subject) -> Figure:
    """Microseconds an edit takes longer than by hand: one of fifty, what a run takes included."""
    taken = _beside_hooks(subject.tiny, _fifty_edits, _fifty_edits_by_hand, subject.repeats(_TINY_PAIRS))
    return taken.difference(1e6 / (2 * _EDITED))


# --- new graphs --------------------------------------------------------------------------------------------


def _first_run(write: Write) -> Measure:
    """Milliseconds the first run of a graph takes longer than its second; each prompt makes a new graph."""

    def measure(subject: Subject) -> Figure:
        resident, count = subject.smollm2, subject.repeats(_NEW_GRAPHS)
        prompts = [[*resident.ids[:-1], token] for token in range(1000, 1000 + count)]
        graphs = [graph_of(resident.model, ids, write) for ids in prompts]
        extra = [_extra(resident.engine, *each) for each in zip(graphs, prompts, strict=True)]
        return Figure.median(extra, f"{len(graphs[0].nodes)} nodes")

    return measure


def _first_layer(model: LanguageModel) -> None:
    model.model.layers[0].output.save()


def _extra(engine: Engine, graph: Graph, ids: list[int]) -> float:
    def run() -> None:
        engine.run(graph, [TokenizedInvoke(ids=[ids])], {})

    return 1e3 * (seconds(run, OWN) - seconds(run, OWN))


MEASURES: dict[str, Measure] = {
    "forward": _ratio(_best_token, _best_token_by_hand),
    "one-layer": _ratio(_one_layer, _one_layer_by_hand),
    "every-layer": _ratio(_every_layer, _every_layer_by_hand),
    "one-edit": _ratio(_one_edit, _one_edit_by_hand),
    "fifty-edits": _ratio(_fifty_edits, _fifty_edits_by_hand),
    "own-run": own_run,
    "own-edit": own_edit,
    "compile": _first_run(_first_layer),
    "compile-edits": _first_run(_fifty_edits),
}

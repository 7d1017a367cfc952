"""The engine beside hand-written hooks that do the same work, on one thread, and what a new graph costs.

The hooks start from the same token ids, copy what they save, and end the pass where the engine ends it: after
the last module anything is needed of. Seconds are those this thread has computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from measure import OWN, Figure, pairs, seconds
from subject import Measure, Subject, graph_of

from pellucid_shared.wire import TokenizedInvoke

if TYPE_CHECKING:
    from pellucid import Graph, LanguageModel

_PAIRS = 40
_EDITED = 25  # layers, at their output and at their MLP's: 50 edits
_NEW_GRAPHS = 16

#: Given a module's output, what goes on instead of it, or None.
Hook = Callable[[torch.Tensor], torch.Tensor | None]


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


def _beside_hooks(
    write: Callable[[LanguageModel], object], hooks: Callable[[list[torch.Tensor]], dict[str, Hook]]
) -> Measure:
    def measure(subject: Subject) -> Figure:
        graph = graph_of(subject.local, subject.ids, write)
        inputs = [TokenizedInvoke(ids=[subject.ids])]
        saved: list[torch.Tensor] = []
        mine = hooks(saved)

        def hand() -> None:
            saved.clear()
            by_hand(subject.engine.model, subject.ids, mine, list(mine)[-1])

        def engine() -> list[torch.Tensor]:
            return list(subject.engine.run(graph, inputs, {}).values())

        found = engine()
        hand()
        for ours, theirs in zip(found, saved, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        return pairs(engine, hand, subject.repeats(_PAIRS), OWN).ratio()

    return measure


# --- new graphs --------------------------------------------------------------------------------------------


def _first_run(write: Callable[[LanguageModel], object]) -> Measure:
    """What the first run of a graph takes longer than its second; each prompt makes a new graph."""

    def measure(subject: Subject) -> Figure:
        count = subject.repeats(_NEW_GRAPHS)
        prompts = [[*subject.ids[:-1], token] for token in range(1000, 1000 + count)]
        graphs = [graph_of(subject.local, ids, write) for ids in prompts]
        extra = [_extra(subject, graph, ids) for graph, ids in zip(graphs, prompts, strict=True)]
        return Figure.median(extra, f"{len(graphs[0].nodes)} nodes")

    return measure


def _first_layer(model: LanguageModel) -> None:
    model.model.layers[0].output.save()


def _extra(subject: Subject, graph: Graph, ids: list[int]) -> float:
    def run() -> None:
        subject.engine.run(graph, [TokenizedInvoke(ids=[ids])], {})

    return 1e3 * (seconds(run, OWN) - seconds(run, OWN))


MEASURES: dict[str, Measure] = {
    "forward": _beside_hooks(_best_token, _best_token_by_hand),
    "one-layer": _beside_hooks(_one_layer, _one_layer_by_hand),
    "every-layer": _beside_hooks(_every_layer, _every_layer_by_hand),
    "one-edit": _beside_hooks(_one_edit, _one_edit_by_hand),
    "fifty-edits": _beside_hooks(_fifty_edits, _fifty_edits_by_hand),
    "compile": _first_run(_first_layer),
    "compile-edits": _first_run(_fifty_edits),
}

"""A torch module of the user's that runs graphs in their process, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from pellucid_shared.card import ModelCard
from pellucid_shared.check import check
from pellucid_shared.flat import split
from pellucid_shared.graph import Graph
from pellucid_shared.lint import lint
from pellucid_shared.packing import WireTensor
from pellucid_shared.tensor_input import TensorInput
from pellucid_shared.values import TensorRef, substitute

from .compile import compile_graph
from .emit import Runtime
from .interleave import Run
from .module_probe import Feed, module_card, tree_card
from .plan import Group
from .sites import WholeView, packed_view
from .skips import Around
from .tensors import from_wire


class ModuleEngine:
    """A module and its cards: one for each form of input.

    Attributes:
        module: in evaluation mode; its weights are never changed.
        card: the card used last; before the first input, the tree alone.
    """

    def __init__(self, module: torch.nn.Module, *, id: str) -> None:
        self.module, self.card = module.eval(), tree_card(module, id=id)
        self._id = id
        self._cards: dict[Any, ModelCard] = {}
        self._lock = threading.RLock()

    def card_for(self, given: TensorInput, tensors: Mapping[str, WireTensor]) -> tuple[ModelCard, Any]:
        """The card for an input, and the form it stands for: inputs of one form have one card.

        Raises:
            InputError: the module fails on this input.
        """
        feed = self.feed(given, tensors)
        with self._lock:
            for form in (_form(feed, open=True), _form(feed, open=False)):
                if form in self._cards:
                    self.card = self._cards[form]
                    return self.card, form
            card, of_any_size = module_card(self.module, feed, id=self._id)
            form = _form(feed, open=of_any_size)
            self._cards[form] = self.card = card
            return card, form

    def feed(self, given: TensorInput, tensors: Mapping[str, WireTensor]) -> Feed:
        """An input as new tensors on the module's device."""
        device = self._device

        def leaf(value: Any) -> Any:
            return from_wire(tensors[value.digest]).to(device) if isinstance(value, TensorRef) else value

        args = [substitute(value, leaf) for value in given.args]
        return Feed.of(args, {name: substitute(value, leaf) for name, value in given.kwargs.items()})

    def run(self, graph: Graph, card: ModelCard, tensors: Mapping[str, WireTensor]) -> dict[str, Any]:
        """Run a graph written with this card; waits for its turn.

        Args:
            tensors: the inputs, and the literals that nodes name, by digest.

        Returns, Raises: as for :meth:`pellucid_worker.engine.Engine.run`.
        """
        with self._lock, torch.no_grad():
            lint(graph)
            inputs = [invoke.tensors for trace in graph.traces for invoke in trace.invokes]
            feeds = [self.feed(given, tensors) for given in inputs if given is not None]
            specs = {name: tensor.spec for name, tensor in tensors.items()}
            checked = check(graph, card, [(feed.batch, feed.tokens) for feed in feeds], specs)
            runtime, device = Runtime(), self._device
            plan = compile_graph(checked, card, runtime)
            literals = {name: from_wire(tensors[name]).to(device) for name in plan.literals}
            own: list[Any] = list(split(plan.flat, feeds))
            run = _ModuleRun(self.module, plan, own, literals, [[]] * len(own), None, None)
            runtime.apply, runtime.device = run.apply, device
            runtime.generators = [torch.Generator(device).manual_seed(t.seed) for t in plan.flat.traces]
            saved = run.execute()
        return {name: saved[name] for name in graph.save_names().values() if name in saved}

    @property
    def _device(self) -> torch.device:
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")


class _ModuleRun(Run):
    """A run whose rows are feeds: invokes that share a pass lie behind each other on axis 0."""

    def _run_pass(self, group: Group) -> None:
        feeds: list[Any] = [self._rows[group.trace][i] for i in group.invokes]
        for each in group.passes:
            if len(feeds) == 1:
                size = feeds[0].batch, feeds[0].tokens
                self._forward(each, feeds[0], Around(WholeView, group.invokes, None, size, False))
                continue
            together = feeds[0]
            for feed in feeds[1:]:
                together = together + feed
            bounds = pairwise(accumulate((feed.batch for feed in feeds), initial=0))
            slices = {i: slice(*pair) for i, pair in zip(group.invokes, bounds, strict=True)}
            size = together.batch, together.tokens
            self._forward(each, together, Around(packed_view(slices), group.invokes, None, size, False))

    def _call(self, arguments: Any) -> Any:
        return arguments.call(self._model)


def constants(given: TensorInput, tensors: Mapping[str, WireTensor]) -> Sequence[str]:
    """The tensors of an input that do not follow its batch, by digest: those invokes must have in common to
    share a pass."""
    shapes = [(digest, tensors[digest].shape) for digest in given.digests()]
    batch = next((shape[0] for _, shape in shapes if shape), None)
    return [digest for digest, shape in shapes if not shape or shape[0] != batch]


def _form(feed: Feed, *, open: bool) -> Any:
    """What inputs of one card have in common: structure, dtypes and shapes; ``open``: the batch aside."""

    def shown(tensor: torch.Tensor) -> Any:
        shape = tuple(tensor.shape)
        return (("batch", *shape[1:]) if open and feed.follows(tensor) else shape), str(tensor.dtype)

    found, structure = tree_flatten(tree_map(shown, (feed.args, dict(feed.kwargs))), is_leaf=_is_shown)
    return str(structure), tuple(found)


def _is_shown(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)

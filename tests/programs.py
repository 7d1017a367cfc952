"""Random programs: reads, writes, edits through views, applied modules, literals, structures, over any sites.

``draw`` makes one from a seed; ``shrink`` makes a smaller one that fails alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pellucid_shared.card import ModelCard, TensorLeaf, leaves
from pellucid_shared.check import Scene, check_node
from pellucid_shared.errors import PellucidError
from pellucid_shared.graph import APPLY, GET, SAVE, SET, Graph, Invoke, Node, Trace
from pellucid_shared.packing import WireTensor, digest
from pellucid_shared.specs import TensorSpec
from pellucid_shared.values import ModuleRef, Ref, Site, TensorRef, substitute
from pellucid_worker.tensors import to_wire

#: Prompts of different lengths; one is a batch.
PROMPTS = ([[5, 9, 31, 7]], [[11, 3], [4, 4]], [[1, 2, 3]])
SIZES = [(len(rows), len(rows[0])) for rows in PROMPTS]


def _wire(tensor: torch.Tensor) -> tuple[TensorRef, WireTensor]:
    wire = to_wire(tensor)
    return TensorRef(digest(wire)), wire


_LITERALS = [
    _wire(torch.linspace(-1, 1, 32)),
    _wire(torch.tensor(0.5)),
    *(_wire(torch.linspace(-2, 2, b * t * 32).reshape(b, t, 32)) for b, t in SIZES),
]
LITERALS = {ref.digest: wire for ref, wire in _LITERALS}
_SPECS = {name: wire.spec for name, wire in LITERALS.items()}


@dataclass(frozen=True)
class Program:
    """Nodes in program order over the first ``invokes`` of ``PROMPTS``."""

    nodes: tuple[Node, ...]
    invokes: int

    @property
    def graph(self) -> Graph:
        return Graph("m", (Trace(tuple(Invoke(rows) for rows in PROMPTS[: self.invokes])),), self.nodes)

    @property
    def inputs(self) -> list[list[list[int]]]:
        return list(PROMPTS[: self.invokes])


@dataclass(frozen=True)
class _Place:
    """A site, without its invoke, and when the model comes to it."""

    site: Site
    when: int


def places(card: ModelCard) -> list[_Place]:
    """Every floating tensor that a packed pass can be cut at."""
    found = []
    for call in card.prefill:
        for kind, when in (("input", call.enter), ("output", call.exit)):
            for path, leaf in leaves(call.structure(kind)):
                if isinstance(leaf, TensorLeaf) and leaf.packable() and leaf.dtype == "float32":
                    found.append(_Place(Site(call.module, kind, path, call=call.call), when))
    return found


class _Draw:
    def __init__(self, card: ModelCard, sites: Sequence[_Place], modules: Sequence[str], seed: int) -> None:
        self.random = random.Random(seed)
        self.card, self.modules = card, modules
        self.invokes = self.random.choice([1, 1, 2, 3])
        self.scene = Scene(Trace(()), SIZES[: self.invokes])
        near = sorted(sites, key=lambda place: place.when)
        if self.random.random() < 0.7:  # sites that follow each other: these share tensors
            start = self.random.randrange(len(near) - 8)
            near = near[start : start + 8]
        self.sites = self.random.sample(near, self.random.randint(2, 5))
        self.nodes: list[Node] = []
        self.specs: list[Any] = []
        self.when: list[int] = []

    def program(self) -> Program:
        wanted = self.random.randint(5, 40)
        for _ in range(4 * wanted):
            if len(self.nodes) >= wanted:
                break
            self._step()
        for position in self.random.sample(self.values, min(4, len(self.values))):
            self._add(Node(SAVE, (Ref(position), f"value {position}")))
        for invoke in range(self.invokes):
            if self.random.random() < 0.8:
                self._add(Node(GET, (Site("lm_head", invoke=invoke),)))
                self._add(Node(SAVE, (Ref(len(self.nodes) - 1), f"logits {invoke}")))
        if self.values:
            pair = [Ref(self.random.choice(self.values)), {"n": 1, "x": Ref(self.random.choice(self.values))}]
            self._add(Node(SAVE, (pair, "pair")))
        return Program(tuple(self.nodes), self.invokes)

    @property
    def values(self) -> list[int]:
        return [i for i, spec in enumerate(self.specs) if isinstance(spec, TensorSpec)]

    def _step(self) -> None:
        choose, values = self.random.choice, self.values
        kind = self.random.random()
        if not values or kind < 0.22:
            self._get()
        elif kind < 0.30:
            self._set()
        elif kind < 0.50:
            self._edit()
        elif kind < 0.70:
            self._view()
        elif kind < 0.74:
            self._add(Node(APPLY, (ModuleRef(choice_of(self.random, self.modules)), self._value())))
        elif kind < 0.78:
            self._add(Node(*choose(_MADE)))
        else:
            self._fresh()

    def _site(self) -> Site:
        return replace(self.random.choice(self.sites).site, invoke=self.random.randrange(self.invokes))

    def _value(self) -> Ref:
        """Mostly a recent value."""
        values = self.values
        return Ref(self.random.choice(values[-4:] if self.random.random() < 0.5 else values))

    def _like(self, shape: tuple[Any, ...]) -> Any:
        """A value of a shape, a number, or a literal."""
        same = [i for i in self.values if self.specs[i].shape == shape]
        given = [ref for ref, wire in _LITERALS if tuple(wire.shape) == shape]
        chance = self.random.random()
        if same and chance < 0.8:
            return Ref(self.random.choice(same))
        if given and chance < 0.9:
            return self.random.choice(given)
        return self.random.choice([0, 0.5, 2.0, -1])

    def _operand(self, shape: tuple[Any, ...]) -> Any:
        """What can be broadcast to a shape."""
        chance = self.random.random()
        if chance < 0.25:
            return self.random.choice([2, -1, 0.5])
        if chance < 0.35:
            return self.random.choice(_LITERALS[:2])[0]
        if chance < 0.75:
            return self._like(shape)
        return self._value()

    def _get(self) -> None:
        self._add(Node(GET, (self._site(),)))

    def _set(self) -> None:
        site = self._site()
        node = Node(GET, (site,))
        spec, _, _ = check_node(node, self.specs, self.card, self.scene, _SPECS)
        self._add(Node(SET, (site, self._like(spec.shape))))

    def _edit(self) -> None:
        target = self._value()
        if self.random.random() < 0.2:
            target = Ref(self.random.choice([i for i in self.values if self.when[i] < 0] or [target.node]))
        shape = self.specs[target.node].shape
        kind = self.random.randrange(6)
        if kind == 0:
            self._add(Node(self.random.choice(["tensor.neg_", "tensor.tanh_", "tensor.zero_"]), (target,)))
        elif kind < 4:
            op = self.random.choice(["tensor.mul_", "tensor.add_", "tensor.sub_", "tensor.copy_"])
            operand = self._operand(shape)
            if op == "tensor.copy_" and not isinstance(operand, Ref):
                op = "tensor.add_"
            self._add(Node(op, (target, operand)))
        else:
            index = self._index(len(shape))
            self._add(Node("setitem", (target, index, self.random.choice([0.0, 1.5, self._operand(shape)]))))

    def _index(self, ndim: int) -> Any:
        options: list[Any] = [Ellipsis]
        if ndim >= 1:
            options += [0, -1, slice(0, 1), (Ellipsis, slice(0, 3)), (Ellipsis, 0), [0]]
        if ndim >= 2:
            options += [(slice(None), -1), (slice(None), slice(0, 1)), (slice(None), [0, -1])]
        return self.random.choice(options)

    def _view(self) -> None:
        value = self._value()
        shape = self.specs[value.node].shape
        kind = self.random.randrange(10)
        buffers = [i for i in self.values if self.when[i] < 0]
        if kind > 7 and buffers:  # a view of a buffer whose shape comes from the model
            op = self.random.choice(["tensor.expand_as", "tensor.expand_as", "tensor.view_as"])
            self._add(Node(op, (Ref(self.random.choice(buffers)), value)))
        elif kind < 3:
            self._add(Node("getitem", (value, self._index(len(shape)))))
        elif kind == 3 and len(shape) >= 2:
            self._add(Node("torch.transpose", (value, 0, 1)))
        elif kind == 4:
            self._add(Node(self.random.choice(["torch.reshape", "tensor.view"]), (value, (-1,))))
        elif kind == 5:
            op = self.random.choice(["tensor.expand_as", "tensor.view_as", "tensor.expand_as"])
            self._add(Node(op, (value, self._value())))
        elif kind == 6:
            self._add(Node("torch.unsqueeze", (value, 0)))
        else:
            self._add(Node("torch.detach", (value,)))

    def _fresh(self) -> None:
        value = self._value()
        shape = self.specs[value.node].shape
        kind = self.random.randrange(8)
        if kind < 3:
            op = self.random.choice(["torch.add", "torch.sub", "torch.mul", "torch.maximum"])
            operand = self._operand(shape)
            if op == "torch.maximum" and not isinstance(operand, Ref):
                op = "torch.add"
            self._add(Node(op, (value, operand)))
        elif kind == 3:
            self._add(Node(self.random.choice(["torch.neg", "torch.tanh", "torch.clone"]), (value,)))
        elif kind == 4:
            self._add(Node(self.random.choice(["torch.mean", "torch.sum"]), (value,)))
        elif kind == 5:
            self._add(Node("torch.mean", (value, -1), {"keepdim": True}))
        elif kind == 6:
            self._add(Node(self.random.choice(["torch.zeros_like", "torch.ones_like"]), (value,)))
        else:
            self._add(Node("torch.cat", ([value, self._like(shape)],), {"dim": -1}))

    def _add(self, node: Node) -> None:
        """Add a node, if its arguments fit and what it takes exists in time."""
        try:
            spec, _, _ = check_node(node, self.specs, self.card, self.scene, _SPECS)
        except PellucidError:
            return
        when = max((self.when[r] for r in node.refs()), default=-1)
        if node.op in (GET, SET):
            call = self.card.call_at(node.site)
            assert call is not None
            event = call.exit if node.site.kind == "output" else call.enter
            if when > event and self.random.random() < 0.98:
                return  # refused; few of these are wanted
            when = event
        if node.op != GET and isinstance(spec, TensorSpec) and spec.numel > 300_000:
            return
        self.nodes.append(node)
        self.specs.append(spec)
        self.when.append(when)


def choice_of(chance: random.Random, names: Sequence[str]) -> str:
    return chance.choice(list(names))


_MADE: list[Any] = [
    ("torch.zeros", ((1, 1, 32),)),
    ("torch.zeros", ((32,),)),
    ("torch.ones", ((3,),)),
    ("torch.zeros", ((1,),)),
]


def draw(card: ModelCard, sites: Sequence[_Place], modules: Sequence[str], seed: int) -> Program:
    """The program of a seed."""
    return _Draw(card, sites, modules, seed).program()


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program from which no node can be taken, with those that need it, without the failure going away."""
    smaller = True
    while smaller:
        smaller = False
        for position in reversed(range(len(program.nodes))):
            if position >= len(program.nodes):
                continue
            shorter = _without(program, position)
            if shorter.nodes and fails(shorter):
                program, smaller = shorter, True
    return program


def _without(program: Program, position: int) -> Program:
    """The program less a node; in place of its value stands the first tensor it takes, or it goes as well."""
    gone: set[int] = set()
    moved: dict[int, int] = {}
    nodes: list[Node] = []
    for index, node in enumerate(program.nodes):
        if index == position or any(r in gone for r in node.refs()):
            gone.add(index)
            continue
        moved[index] = len(nodes)

        def leaf(value: Any) -> Any:
            return Ref(moved[value.node]) if isinstance(value, Ref) else value

        args = tuple(substitute(v, leaf) for v in node.args)
        nodes.append(
            replace(node, args=args, kwargs={k: substitute(v, leaf) for k, v in node.kwargs.items()})
        )
    return replace(program, nodes=tuple(nodes))

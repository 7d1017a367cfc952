"""Instructions for what is no plain read, write, call or save: originals, logs and skips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pellucid_shared.card import ModelCard, Sequence, Structure, TensorLeaf, leaf_at, leaves
from pellucid_shared.graph import LOG, ORIGINAL, Node
from pellucid_shared.passing import calls_inside
from pellucid_shared.values import Ref, Site, TensorRef, Value

from . import emit
from .plan import Act, Slots
from .sites import member

Path = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Original(Act):
    """Copy the tensor at a site into slot ``out``, before anything else of the event."""

    site: Site
    out: int

    def carry_out(self, slots: Slots, view: Any, run: Any) -> None:
        slots[self.out] = view.get(self.site, False).clone()


@dataclass(frozen=True, slots=True)
class Log(Act):
    """Tell of values. ``site``: where the pass it is written about begins, or None."""

    trace: int
    site: Site | None
    build: Callable[[Slots], Any]
    sep: str

    def carry_out(self, slots: Slots, view: Any, run: Any) -> None:
        run.teller.log(self.trace, self.site, self.build(slots), self.sep)


@dataclass(frozen=True, slots=True)
class Skip(Act):
    """Keep a copy of what stands in for a module's output until the module would run.

    Attributes:
        value: its structure.
        build: makes it from the slots.
        leaves: path of each tensor in it -> the card's leaf at this step, and in the prefill.
        lists: path of each list or tuple in it -> whether the model makes a list.
        inside: the calls that do not happen.
    """

    site: Site
    value: Value
    build: Callable[[Slots], Any]
    leaves: Mapping[Path, tuple[TensorLeaf, TensorLeaf]]
    lists: Mapping[Path, bool]
    inside: frozenset[tuple[str, int]]

    def carry_out(self, slots: Slots, view: Any, run: Any) -> None:
        value = self.build(slots)
        parts = [(replace(self.site, path=path), _copied(member(value, path))) for path in self.leaves]
        own = run.skipped.setdefault((self.site.module, self.site.call), {})
        own[self.site.invoke] = self, parts


def act(position: int, node: Node, slot_of: Callable[[Ref | TensorRef], int], card: ModelCard) -> Act:
    """The instruction of an original, a log or a skip."""
    if node.op == ORIGINAL:
        return Original(position, (), node.site, position)
    if node.op == LOG:
        parts = emit.resolve(list(node.args[1:]), slot_of)
        sep = str(node.kwargs.get("sep", " "))
        return Log(position, emit.reads(parts), node.region, node.at, emit.builder(parts), sep)
    site, value = node.site, emit.resolve(node.args[1], slot_of)
    call, first = card.call_at(site), card.call_at(replace(site, step=0))
    assert call is not None
    found = {}
    for path, leaf in leaves(call.output):
        if isinstance(leaf, TensorLeaf):
            prefill = None if first is None else leaf_at(first.output, path)
            found[path] = leaf, prefill if isinstance(prefill, TensorLeaf) else leaf
    inside = frozenset(calls_inside(site, card))
    lists = dict(_lists(call.output))
    return Skip(position, emit.reads(value), site, value, emit.builder(value), found, lists, inside)


def _lists(structure: Structure, path: Path = ()) -> Any:
    if isinstance(structure, TensorLeaf) or not hasattr(structure, "items"):
        return
    items = structure.items
    if isinstance(structure, Sequence):
        yield path, structure.leaf == "list"
    for key, part in enumerate(items) if isinstance(items, tuple) else items.items():
        yield from _lists(part, (*path, key))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value

"""Which nodes of a graph matter: those a save or a log needs, by value, by storage, or by way of the model or
of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pellucid_shared.backward import backwards
from pellucid_shared.flat import Flat
from pellucid_shared.flow import BOUND
from pellucid_shared.graph import (
    APPLY,
    BACKWARD,
    GET,
    GRAD,
    LOG,
    ORIGINAL,
    SAVE,
    SET,
    SET_GRAD,
    SKIP,
    Node,
)
from pellucid_shared.storage import Root, Timeline

#: What is read in order: ("site", trace, invoke) the sites of an invoke, ("grad", number) a backward pass.
Stream = tuple[Any, ...]


def needed_nodes(flat: Flat, timeline: Timeline) -> set[int]:
    """Positions of the nodes that any save or log depends on.

    An in-place op is needed where a needed value may lie in the storage it overwrites. A write to the model
    (a replacement, an in-place op on a site's tensor, or a skip) is needed where the same invoke of the same
    trace reads a site then or later; a write to a gradient where its backward pass makes one then or later.
    """
    saves = (i for i, node in enumerate(flat.nodes) if node.op in (SAVE, LOG, BOUND))
    return Needs(flat, timeline, saves).nodes


class Needs:
    """All that some nodes depend on.

    Args:
        through: whether what an op takes is needed with it.

    Attributes:
        nodes: positions of the nodes needed.
        roots: the storages their values may lie in.
        reads: the last clock position at which each stream is read.
    """

    def __init__(
        self,
        flat: Flat,
        timeline: Timeline,
        goals: Iterable[int],
        through: Callable[[Node], bool] = lambda node: True,
    ) -> None:
        self.nodes: set[int] = set()
        self.roots: set[Root] = set()
        self.reads: dict[Stream, int] = {}
        self._flat, self._timeline = flat, timeline
        passes = backwards(flat)
        stack = list(goals)
        while stack:
            while stack:
                position = stack.pop()
                if position in self.nodes:
                    continue
                self.nodes.add(position)
                node = flat.nodes[position]
                if not through(node):
                    continue
                stack.extend(flat.needs(position))
                self.roots |= timeline.roots[position]
                if node.op in (GET, ORIGINAL):
                    self._read(("site", node.region, node.site.invoke), position)
                elif node.op == GRAD:
                    self._read(("grad", node.args[1]), position)
                    stack.append(passes[node.args[1]].node)
            for position in range(len(flat.nodes)):
                if position not in self.nodes and self._matters(position):
                    stack.append(position)

    def read_from(self, root: Root, when: int) -> bool:
        """Whether the stream that a storage is part of is read at a position or later."""
        stream = root[: 3 if root[0] == "site" else 2]
        return root[0] != "node" and when <= self.reads.get(stream, -1)

    def _read(self, stream: Stream, position: int) -> None:
        self.reads[stream] = max(self._timeline.ready[position], self.reads.get(stream, -1))

    def _matters(self, position: int) -> bool:
        node, when = self._flat.nodes[position], self._timeline.ready[position]
        if node.op in (SET, SET_GRAD):
            return any(self.read_from(root, when) for root in self._timeline.roots[position])
        if node.op == SKIP:
            return when <= self.reads.get(("site", node.region, node.site.invoke), -1)
        written = self._timeline.effects[position]
        if node.op in (GET, GRAD, BACKWARD, APPLY, SAVE) or not written:
            return False
        return bool(written & self.roots) or any(self.read_from(root, when) for root in written)

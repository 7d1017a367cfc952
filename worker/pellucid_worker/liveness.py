"""Which nodes of a graph matter: those a save needs, by value, by storage, or by way of the model."""

from __future__ import annotations

from pellucid_shared.flat import Flat
from pellucid_shared.flow import BOUND
from pellucid_shared.graph import APPLY, GET, SAVE, SET
from pellucid_shared.storage import Root, Timeline


def needed_nodes(flat: Flat, timeline: Timeline) -> set[int]:
    """Positions of the nodes that any save depends on.

    An in-place op is needed where a needed value may lie in the storage it overwrites. A write to the model
    (a replacement, or an in-place op on a site's tensor) is needed where the same invoke of the same trace
    reads a site then or later.
    """
    needed: set[int] = set()
    stack = [i for i, node in enumerate(flat.nodes) if node.op in (SAVE, BOUND)]
    roots: set[Root] = set()
    reads: dict[tuple[int, int], int] = {}  # (trace, invoke) -> the last clock position at which it reads
    while stack:
        while stack:
            position = stack.pop()
            if position in needed:
                continue
            needed.add(position)
            node = flat.nodes[position]
            stack.extend(flat.needs(position))
            roots |= timeline.roots[position]
            if node.op == GET:
                invoke, when = (node.region, node.site.invoke), timeline.ready[position]
                reads[invoke] = max(when, reads.get(invoke, -1))
        for position in range(len(flat.nodes)):
            if position not in needed and _matters(flat, timeline, position, roots, reads):
                stack.append(position)
    return needed


def _matters(
    flat: Flat, timeline: Timeline, position: int, roots: set[Root], reads: dict[tuple[int, int], int]
) -> bool:
    node, when = flat.nodes[position], timeline.ready[position]
    if node.op == SET:
        return when <= reads.get((node.region, node.site.invoke), -1)
    written = timeline.effects[position]
    if node.op in (GET, APPLY, SAVE) or not written:
        return False
    if written & roots:
        return True
    return any(root[0] == "site" and when <= reads.get(root[1:3], -1) for root in written)

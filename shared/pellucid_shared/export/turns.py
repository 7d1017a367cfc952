"""The order in which a script runs a trace's invokes, each in a forward pass of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..card import ModelCard
from ..check import Checked, Scene, check, check_flat
from ..errors import ExportError, OrderError
from ..flat import Flat, split
from ..graph import GET, SET, Graph
from ..specs import TensorSpec
from ..storage import Root


@dataclass(frozen=True, slots=True)
class InTurns:
    """A graph whose invokes run one after another.

    Attributes:
        checked: the graph with its invokes in the order in which they run.
        orders: per trace, the number each of its invokes has in the graph, in that order.
    """

    checked: Checked
    orders: tuple[tuple[int, ...], ...]


def in_turns(
    graph: Graph, card: ModelCard, sizes: Sequence[tuple[int, int]], tensors: Mapping[str, TensorSpec]
) -> InTurns:
    """Check a graph, and put the invokes of each trace into an order in which values reach their writes.

    Raises:
        GraphError: as :func:`pellucid_shared.check.check`.
        ExportError: two invokes each write what the other one makes.
    """
    together = check(graph, card, sizes, tensors)
    flat = together.flat
    orders = tuple(_order(together, trace) for trace in range(len(flat.traces)))
    place = [{old: new for new, old in enumerate(order)} for order in orders]
    nodes = tuple(
        replace(
            node,
            args=(replace(node.site, invoke=place[node.region][node.site.invoke]), *node.args[1:]),
        )
        if node.op in (GET, SET)
        else node
        for node in flat.nodes
    )
    traces = tuple(
        replace(trace, invokes=tuple(trace.invokes[i] for i in order))
        for trace, order in zip(flat.traces, orders, strict=True)
    )
    scenes = [
        Scene(trace, [own[i] for i in order])
        for trace, own, order in zip(traces, split(flat, list(sizes)), orders, strict=True)
    ]
    apart = card.model_copy(update={"packs": False})
    try:
        return InTurns(check_flat(replace(flat, nodes=nodes, traces=traces), apart, scenes, tensors), orders)
    except OrderError as error:
        raise _exchange(error.node) from None


def _order(checked: Checked, trace: int) -> tuple[int, ...]:
    """Each invoke behind those that make what it writes; else as in the graph."""
    flat, timeline = checked.flat, checked.timeline
    needs: list[set[int]] = []  # per node: the invokes whose passes it waits for
    edits: dict[Root, set[int]] = defaultdict(set)  # storage -> those that its edits wait for
    behind: dict[int, set[int]] = defaultdict(set)
    for position, node in enumerate(flat.nodes):
        found = {invoke for ref in node.refs() for invoke in needs[ref]}
        found |= {i for ref in node.refs() for root in timeline.roots[ref] for i in edits[root]}
        if node.op == SET and node.region == trace:
            behind[node.site.invoke] |= found
        for root in timeline.effects[position]:
            edits[root] |= found
            if root[:2] == ("site", trace):
                behind[root[2]] |= found
        if node.op == GET:
            found = {node.site.invoke} if node.region == trace else set()
        needs.append(found)
    left, order = list(range(len(flat.traces[trace].invokes))), list[int]()
    while left:
        free = [i for i in left if not behind[i] & (set(left) - {i})]
        if not free:
            raise _exchange(_first_write(flat, trace, left))
        order.append(free[0])
        left.remove(free[0])
    return tuple(order)


def _first_write(flat: Flat, trace: int, invokes: Sequence[int]) -> int | None:
    for position, node in enumerate(flat.nodes):
        if node.op == SET and node.region == trace and node.site.invoke in invokes:
            return flat.origin[position]
    return None


def _exchange(node: int | None) -> ExportError:
    return ExportError(
        "this experiment cannot be exported: its invokes write values of each other both ways, which only "
        "one shared forward pass can do, and a script of plain hooks runs them one after another. Give each "
        "direction a trace of its own",
        node=node,
    )

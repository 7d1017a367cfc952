"""A graph without its repeating regions: each body written out for each of its steps.

What checks, orders, compiles and runs a graph sees this form. Positions here are those of the written-out
nodes; ``origin`` leads back to the user's. Lists are gone too: where one was named, its members stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .errors import LimitError
from .graph import APPEND, LIST, SAVE, Each, Graph, Node, Trace
from .values import Ref, Value, contains, substitute

MAX_FLAT_NODES = 1_000_000


@dataclass(frozen=True, slots=True)
class SaveTo:
    """Where a save's value goes.

    Attributes:
        name: the name it comes back under.
        entry: its place in the list that has this name; None: it is no entry of a list.
        grown: lists in it grew step by step: what steps that never ran would have added is left out.
    """

    name: str
    entry: int | None = None
    grown: bool = False


@dataclass(frozen=True, slots=True)
class Flat:
    """A graph as it runs.

    Attributes:
        nodes: in program order; the saves of lists come last, since they wait for every append. A node's
            region is the number of its trace among ``traces``, and its site's step counts from the prefill.
        origin: per node, its position in the graph.
        traces: the forward passes and generations, in order.
        saves: per save node, where its value goes.
        optional: nodes that need not run where a generation ends before their step.
    """

    nodes: tuple[Node, ...]
    origin: tuple[int, ...]
    traces: tuple[Trace, ...]
    saves: dict[int, SaveTo]
    optional: frozenset[int]


def flatten(graph: Graph) -> Flat:
    """Write out a linted graph.

    Raises:
        LimitError: more than a million nodes.
    """
    return _Flattener(graph).flat()


@dataclass(frozen=True, slots=True)
class _List:
    """Stands for the list a node of the graph makes, until its members are known."""

    node: int


class _Flattener:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        indices = [i for i, region in enumerate(graph.regions) if isinstance(region, Trace)]
        self.number = {index: n for n, index in enumerate(indices)}
        self.nodes: list[Node] = []
        self.origin: list[int] = []
        self.saves: dict[int, SaveTo] = {}
        self.optional: set[int] = set()
        self.names = graph.save_names()
        self.lists: dict[int, list[Value]] = {}  # node that makes a list -> its members
        self.late: list[tuple[int, Value]] = []  # saves of lists, and what they save

    def flat(self) -> Flat:
        self._require_bounded()
        at: dict[int, int] = {}  # node -> its flat position, or the last of them
        position, nodes = 0, self.graph.nodes
        while position < len(nodes):
            end = position + 1
            region = self.graph.regions[nodes[position].region]
            if isinstance(region, Each):
                while end < len(nodes) and nodes[end].region == nodes[position].region:
                    end += 1
                trace = self.graph.regions[region.parent]
                assert isinstance(trace, Trace)
                for turn, step in enumerate(region.of(trace.steps)):
                    for inside in range(position, end):
                        self._add(inside, at, step, region, turn)
            else:
                self._add(position, at, 0, None, 0)
            position = end
        for position, value in self.late:
            listed = self._emit(position, Node(SAVE, (self._members(value),)), None)
            self.saves[listed] = SaveTo(self.names[position], grown=True)
        return Flat(
            tuple(self.nodes),
            tuple(self.origin),
            self.graph.traces,
            self.saves,
            frozenset(self.optional),
        )

    def _add(self, position: int, at: dict[int, int], step: int, each: Each | None, turn: int) -> None:
        node = self.graph.nodes[position]

        def leaf(value: Value) -> Any:
            if not isinstance(value, Ref):
                return value
            return _List(value.node) if value.node in self.lists else Ref(at[value.node])

        if node.op == LIST:
            self.lists[position] = []
            return
        args = tuple(substitute(v, leaf) for v in node.args)
        if node.op == APPEND:
            self.lists[args[0].node].append(args[1])
            return
        if node.op == SAVE and contains(args[0], _List):
            self.late.append((position, args[0]))
            return
        args = tuple(self._members(v) for v in args)
        kwargs = {k: self._members(substitute(v, leaf)) for k, v in node.kwargs.items()}
        if node.at is not None and step:
            args = (replace(node.at, step=node.at.step + step), *args[1:])
        if node.op == SAVE:
            args = args[:1]
        made = self._emit(position, replace(node, args=args, kwargs=kwargs), each)
        at[position] = made
        if node.op == SAVE:
            entry = turn if each is not None and not each.single else None
            self.saves[made] = SaveTo(self.names[position], entry)

    def _require_bounded(self) -> None:
        turns = {}
        for index, region in enumerate(self.graph.regions):
            if isinstance(region, Each):
                trace = self.graph.regions[region.parent]
                assert isinstance(trace, Trace)
                turns[index] = len(region.of(trace.steps))
        count = sum(turns.get(node.region, 1) for node in self.graph.nodes)
        if count > MAX_FLAT_NODES:
            raise LimitError(
                f"the graph has {count} nodes once its bodies are written out step by step; at most "
                f"{MAX_FLAT_NODES} are taken"
            )

    def _emit(self, position: int, node: Node, each: Each | None) -> int:
        made = len(self.nodes)
        trace = self.graph.trace_of(self.graph.nodes[position].region)
        self.nodes.append(replace(node, region=self.number[trace]))
        self.origin.append(position)
        if each is not None and (each.optional or not each.single):
            self.optional.add(made)
        return made

    def _members(self, value: Value) -> Value:
        """A value with lists in place of what stands for them, as long as they are by now."""

        def leaf(part: Value) -> Any:
            return [self._members(v) for v in self.lists[part.node]] if isinstance(part, _List) else part

        return substitute(value, leaf)


def split(flat: Flat, items: list[Any]) -> Iterator[list[Any]]:
    """One item an invoke, parted by trace."""
    start = 0
    for trace in flat.traces:
        yield items[start : start + len(trace.invokes)]
        start += len(trace.invokes)

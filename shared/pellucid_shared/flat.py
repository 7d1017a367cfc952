"""A graph without its repeating regions: each body written out for each of its steps or turns.

What checks, orders, compiles and runs a graph sees this form. Positions here are those of the written-out
nodes; ``origin`` leads back to the user's. Lists are gone too: where one was named, its members stand; and so
are the numbers that each turn knows. Branches, and the ends of loops, are guards on nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from .errors import GraphError, LimitError
from .flow import (
    BOUND,
    CARRIED,
    CARRY,
    CARRY_SET,
    EITHER,
    FLAG,
    FLOW_OPS,
    INDEX,
    KEPT,
    PICK,
    UNTIL,
    WHILE,
    calculate,
    outer_loop,
    pick,
)
from .graph import APPEND, GET, LIST, ORIGINAL, SAVE, Each, Graph, Node, Trace
from .regions import Cond, Loop, above, traces
from .values import Ref, TensorRef, Value, contains, substitute

MAX_FLAT_NODES = 1_000_000

#: What runs under no guards: it changes nothing.
READS = (GET, ORIGINAL)

#: (a ``cond.flag`` node, what it must be) for each condition. Where such a node did not run, it is neither.
Guards: TypeAlias = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class SaveTo:
    """Where a save's value goes.

    Attributes:
        name: the name it comes back under.
        turns: it is an entry of a list of that name; the number of the step or turn of each body it stands
            in, from outside to inside: its place in the list, and in the lists inside it.
        grown: lists in it grew step by step: what steps that never ran would have added is left out.
    """

    name: str
    turns: tuple[int, ...] = ()
    grown: bool = False


@dataclass(frozen=True, slots=True)
class Flat:
    """A graph as it runs.

    Attributes:
        nodes: in program order; the saves of lists come last, since they wait for every append. A node's
            region is the number of its trace among ``traces``, and its site's step counts from the prefill.
        origin: per node, its position in the graph.
        traces: the forward passes and generations, in order.
        starts: per trace, the position of its first invoke among all of the graph's; in a loop, one trace of
            the graph is several.
        saves: per save node, where its value goes.
        optional: nodes that need not run where a generation ends before their step.
        guards: the conditions of nodes that run under any. A read is under none: it changes nothing.
    """

    nodes: tuple[Node, ...]
    origin: tuple[int, ...]
    traces: tuple[Trace, ...]
    starts: tuple[int, ...]
    saves: dict[int, SaveTo]
    optional: frozenset[int]
    guards: Mapping[int, Guards] = field(default_factory=dict)

    def needs(self, position: int) -> Iterator[int]:
        """The nodes that a node takes values from, or waits for as its conditions."""
        yield from self.nodes[position].refs()
        for flag, _ in self.guards.get(position, ()):
            yield flag

    def exclude(self, one: int, other: int) -> bool:
        """Whether two nodes stand in branches of which one alone runs."""
        conditions = self.guards.get(other, ())
        return any((flag, not wanted) in conditions for flag, wanted in self.guards.get(one, ()))


def flatten(graph: Graph) -> Flat:
    """Write out a linted graph.

    Raises:
        LimitError: more than a million nodes.
        OpArgumentError: a number of some turn has no value.
    """
    return _Flattener(graph).flat()


@dataclass(frozen=True, slots=True)
class _List:
    """Stands for a list of the graph, until its members are known."""

    number: int


@dataclass(slots=True)
class _Carry:
    """What a loop carries: its value now, and the guards under which it is always set."""

    value: Value
    guards: Guards


class _Flattener:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.origin: list[int] = []
        self.guards: dict[int, Guards] = {}
        self.saves: dict[int, SaveTo] = {}
        self.optional: set[int] = set()
        self.names = graph.save_names()
        self.at: dict[int, Value] = {}  # node -> the value it has now: that of a flat node, or a constant
        self.lists: list[tuple[list[Value], Guards]] = []  # members, and guards under which it was made
        #: Saves of lists: node, what it saves, where to, its guards.
        self.late: list[tuple[int, Value, SaveTo, Guards]] = []
        self.carries: dict[int, _Carry] = {}
        self.each: Each | None = None  # the body for steps that is being written out
        self.step = 0
        self.turns: list[int] = []
        self.turn: dict[int, int] = {}  # loop -> its turn
        #: Loop that is being written out -> what holds while it goes on; None: it has ended for sure.
        self.going_on: dict[int, Guards | None] = {}
        self.traces: list[tuple[int, Trace]] = []  # start and trace, in the order they run
        self.numbers: dict[int, int] = {}  # region of a trace -> its number now
        self.starts: dict[int, int] = {}  # region of a trace -> position of its first invoke
        for index, _ in traces(graph.regions):
            self.starts[index] = sum(len(t.invokes) for _, t in traces(graph.regions[:index]))

    def flat(self) -> Flat:
        _require_room(self.graph)
        self._write(0, len(self.graph.nodes), None)
        self._open_traces(None, len(self.graph.regions))
        if not self.traces:  # all of them stand in loops that hold no node
            self.traces = [(self.starts[i], trace) for i, trace in traces(self.graph.regions)]
        for position, value, to, guards in self.late:
            listed = self._emit(position, Node(SAVE, (self._members(value),)), guards)
            self.saves[listed] = to
        return Flat(
            tuple(self.nodes),
            tuple(self.origin),
            tuple(trace for _, trace in self.traces),
            tuple(start for start, _ in self.traces),
            self.saves,
            frozenset(self.optional),
            self.guards,
        )

    # --- bodies --------------------------------------------------------------------------------------------

    def _write(self, start: int, end: int, within: int | None) -> None:
        """Write out some nodes, all of them inside the region ``within``."""
        position = start
        while position < end:
            inner = self._inner(position, within)
            if inner is None:
                self._add(position)
                position += 1
                continue
            stop = position + 1
            while stop < end and self._inner(stop, within) == inner:
                stop += 1
            region = self.graph.regions[inner]
            if isinstance(region, Loop):
                self._loop(inner, region, position, stop)
            elif isinstance(region, Each):
                self._steps(inner, region, position, stop)
            position = stop

    def _inner(self, position: int, within: int | None) -> int | None:
        """The outermost body inside ``within`` that a node stands in."""
        found = None
        for region in above(self.graph.regions, self.graph.nodes[position].region):
            if region == within:
                break
            if isinstance(self.graph.regions[region], Each | Loop):
                found = region
        return found

    def _steps(self, index: int, each: Each, start: int, stop: int) -> None:
        trace = self.graph.regions[each.parent]
        assert isinstance(trace, Trace)
        for turn, step in enumerate(each.of(trace.steps)):
            self.each, self.step = each, step
            if not each.single:
                self.turns.append(turn)
            self._write(start, stop, index)
            if not each.single:
                self.turns.pop()
        self.each, self.step = None, 0

    def _loop(self, index: int, loop: Loop, start: int, stop: int) -> None:
        own, nodes = range(start, stop), self.graph.nodes
        guards = self._guards(loop.parent)
        if guards is None:
            return
        if holds_traces := self.graph.trace_of(index) < 0:
            self._open_traces(outer_loop(self.graph, loop.parent), index)
        for position in own:
            if nodes[position].op == CARRY and nodes[position].region == index:
                self._carry(position, guards)
        self.going_on[index] = guards
        for turn in range(loop.count):
            if self.going_on[index] is None:
                break
            self.turn[index] = turn
            self.turns.append(turn)
            self._write(start, stop, index)
            self.turns.pop()
            if holds_traces:
                self._open_traces(index, len(self.graph.regions))
                self._forget_traces(index)
        if loop.bounded and self.going_on[index] is not None:
            self._bound(index, loop, own)
        del self.going_on[index]

    def _bound(self, index: int, loop: Loop, own: range) -> None:
        """Behind the last turn: the condition once more, and an error where the loop would still go on."""
        nodes = self.graph.nodes
        condition = next((p for p in own if nodes[p].op == WHILE and nodes[p].region == index), None)
        if condition is not None:
            self.turn[index] = loop.count
            self.turns.append(loop.count)
            self._write(own.start, condition + 1, index)
            self.turns.pop()
        guards = self.going_on[index]
        if guards is not None:
            made_by = own.start if condition is None else condition
            self._emit(made_by, Node(BOUND, (loop.count,)), guards)

    def _open_traces(self, loop: int | None, before: int) -> None:
        """Number the traces that stand in a loop (None: in none) and are written before a region."""
        for index, trace in traces(self.graph.regions):
            if index < before and index not in self.numbers and trace.parent == loop:
                self.numbers[index] = len(self.traces)
                self.traces.append((self.starts[index], trace))

    def _forget_traces(self, loop: int) -> None:
        """The next turn has the traces of a loop anew."""
        regions = self.graph.regions
        self.numbers = {t: n for t, n in self.numbers.items() if loop not in above(regions, t)}

    # --- conditions ----------------------------------------------------------------------------------------

    def _guards(self, region: int) -> Guards | None:
        """The conditions under which a region's nodes run here; None: they do not."""
        found = self.graph.regions[region]
        if isinstance(found, Loop) and region in self.going_on:
            return self.going_on[region]
        parent = getattr(found, "parent", None)
        around = () if parent is None else self._guards(parent)
        if not isinstance(found, Cond) or around is None:
            return around
        own: list[tuple[int, bool]] = []
        branch, wanted = found, True
        while True:
            if branch.flag is not None:
                flag = self.at[branch.flag]
                if isinstance(flag, Ref):
                    own.append((flag.node, wanted))
                elif flag is not wanted:
                    return None
            if branch.after is None:
                break
            before = self.graph.regions[branch.after]
            assert isinstance(before, Cond)
            branch, wanted = before, False
        own.reverse()
        if own and all(self.guards.get(flag, ()) == around for flag, _ in own):
            around = ()  # a flag that is there at all was taken under these
        return (*around, *own)

    # --- nodes ---------------------------------------------------------------------------------------------

    def _add(self, position: int) -> None:
        node = self.graph.nodes[position]
        guards = self._guards(node.region)
        if guards is None:
            return
        if node.op in FLOW_OPS:
            self._flow(position, node, guards)
            return
        if node.op == LIST:
            self.at[position] = _List(len(self.lists))
            self.lists.append(([], guards))
            return
        args = tuple(self._value(v) for v in node.args)
        if node.op == APPEND:
            members, made = self.lists[args[0].number]
            value = args[1]
            if guards != made:
                value = Ref(self._emit(position, Node(KEPT, (self._members(value),)), guards))
            members.append(value)
            return
        to = SaveTo(self.names.get(position, ""), tuple(self.turns))
        if node.op == SAVE and contains(args[0], _List):
            self.late.append((position, args[0], replace(to, grown=True), guards))
            return
        args = tuple(self._members(v) for v in args)
        kwargs = {k: self._members(self._value(v)) for k, v in node.kwargs.items()}
        if node.at is not None and self.step:
            args = (replace(node.at, step=node.at.step + self.step), *args[1:])
        if node.op == SAVE:
            args = args[:1]
        made_at = self._emit(position, replace(node, args=args, kwargs=kwargs), guards)
        self.at[position] = Ref(made_at)
        if node.op == SAVE:
            self.saves[made_at] = to

    def _flow(self, position: int, node: Node, guards: Guards) -> None:
        if node.op == CARRY:
            return  # made before the first turn
        try:
            self._carry_on(position, node, [self._value(v) for v in node.args], guards)
        except GraphError as error:
            raise type(error)(error.message, node=position) from None

    def _carry_on(self, position: int, node: Node, args: list[Any], guards: Guards) -> None:
        if node.op == INDEX:
            loop = outer_loop(self.graph, node.region)
            assert loop is not None
            self.at[position] = self.turn[loop]
        elif node.op == PICK:
            self.at[position] = pick(*args)
        elif node.op == FLAG:
            constant = not isinstance(args[0], Ref | TensorRef)
            self.at[position] = (
                bool(args[0]) if constant else Ref(self._emit(position, Node(FLAG, (args[0],)), guards))
            )
        elif node.op in (WHILE, UNTIL):
            wanted = node.op == WHILE
            if isinstance(args[0], Ref):
                own = ((args[0].node, wanted),)
                around = () if self.guards.get(args[0].node, ()) == guards else guards
                self.going_on[node.region] = (*around, *own)
            elif args[0] is not wanted:
                self.going_on[node.region] = None
        elif node.op == CARRIED:
            self.at[position] = self.carries[self._carry_node(node)].value
        elif node.op == CARRY_SET:
            self._set_carry(position, self.carries[self._carry_node(node)], args[1], guards)
        else:
            self.at[position] = calculate(node.op, args)

    def _carry_node(self, node: Node) -> int:
        carry = node.args[0]
        assert isinstance(carry, Ref)
        return carry.node

    def _carry(self, position: int, guards: Guards) -> None:
        """Begin to carry a value."""
        value = self._held(position, self._value(self.graph.nodes[position].args[0]), guards)
        self.at[position] = value
        self.carries[position] = _Carry(value, guards)

    def _set_carry(self, position: int, carry: _Carry, value: Value, guards: Guards) -> None:
        value = self._held(position, value, guards)
        if guards != carry.guards:
            flags = [(Ref(flag), wanted) for flag, wanted in guards]
            value = Ref(self._emit(position, Node(EITHER, (flags, value, carry.value)), carry.guards))
        carry.value = value

    def _held(self, position: int, value: Value, guards: Guards) -> Value:
        """A value that may be edited: a number or a tensor of the user's becomes one of the run's own."""
        if isinstance(value, TensorRef):
            return Ref(self._emit(position, Node("torch.clone", (value,)), guards))
        if isinstance(value, bool | int | float):
            return Ref(self._emit(position, Node("torch.full", ((), value)), guards))
        return value

    def _emit(self, position: int, node: Node, guards: Guards) -> int:
        made = len(self.nodes)
        trace = self.graph.trace_of(self.graph.nodes[position].region)
        if trace >= 0 and trace not in self.numbers:
            found = self.graph.regions[trace]
            assert isinstance(found, Trace)
            self._open_traces(found.parent, trace + 1)
        number = max(0, len(self.traces) - 1) if trace < 0 else self.numbers[trace]
        self.nodes.append(replace(node, region=number))
        self.origin.append(position)
        if guards and node.op not in READS:
            self.guards[made] = guards
        if (guards and node.op in READS) or (
            self.each is not None and (self.each.optional or not self.each.single)
        ):
            self.optional.add(made)
        return made

    # --- values --------------------------------------------------------------------------------------------

    def _value(self, value: Value) -> Value:
        """A value of the graph as it is now."""
        return substitute(value, lambda part: self.at[part.node] if isinstance(part, Ref) else part)

    def _members(self, value: Value) -> Value:
        """A value with lists in place of what stands for them, as long as they are by now."""

        def leaf(part: Value) -> Any:
            return [self._members(v) for v in self.lists[part.number][0]] if isinstance(part, _List) else part

        return substitute(value, leaf)


def _require_room(graph: Graph) -> None:
    """Raise LimitError, before anything is written, where that would be too many nodes."""
    times: dict[int, int] = {}
    for index, region in enumerate(graph.regions):
        parent = getattr(region, "parent", None)
        own = 1
        if isinstance(region, Loop):
            own = region.count + region.bounded
        elif isinstance(region, Each):
            trace = graph.regions[region.parent]
            assert isinstance(trace, Trace)
            own = len(region.of(trace.steps))
        times[index] = own * (1 if parent is None else times[parent])
    total = sum(times[node.region] for node in graph.nodes)
    if total > MAX_FLAT_NODES:
        raise LimitError(
            f"the graph has {total} nodes once its bodies are written out step by step and turn by turn; at "
            f"most {MAX_FLAT_NODES} are taken: let its loops take fewer turns"
        )


def split(flat: Flat, items: list[Any]) -> Iterator[list[Any]]:
    """One item an invoke of the graph, parted by trace."""
    for start, trace in zip(flat.starts, flat.traces, strict=True):
        yield items[start : start + len(trace.invokes)]

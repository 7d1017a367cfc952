"""Compiling a checked graph into a plan.

Each needed node becomes one instruction at the first event where everything it needs exists; within an
event, instructions keep the program's order. Where an in-place op runs before a node that still wants the
older version, a copy is made just before the op, and that node reads the copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from pellucid_shared.card import ModelCard
from pellucid_shared.check import Checked
from pellucid_shared.clock import Place
from pellucid_shared.graph import (
    APPLY,
    BACKWARD,
    GET,
    GRAD,
    LOG,
    ORIGINAL,
    PARAM,
    SAVE,
    SET,
    SET_GRAD,
    SKIP,
    Node,
)
from pellucid_shared.ops import Alias, lookup
from pellucid_shared.storage import Root, keeps_literals
from pellucid_shared.values import RESULT, Ref, TensorRef, tensors

from . import acts, emit
from .backward import Gradients
from .guards import guarded
from .liveness import needed_nodes
from .plan import Backward, Event, Get, Gradient, Group, Instruction, Pass, Plan, Save, Set


def compile_graph(checked: Checked, card: ModelCard, runtime: emit.Runtime) -> Plan:
    """The plan of a checked graph; its instructions draw on ``runtime`` when they run."""
    return _Compiler(checked, card, runtime).plan()


class _Slot:
    """A slot that is there once its number is asked for; ``made`` is told it then."""

    def __init__(self, new: Callable[[], int], made: Callable[[int], None]) -> None:
        self._new, self._made = new, made

    @cached_property
    def number(self) -> int:
        number = self._new()
        self._made(number)
        return number


class _Compiler:
    def __init__(self, checked: Checked, card: ModelCard, runtime: emit.Runtime) -> None:
        self.flat, self.card, self.runtime = checked.flat, card, runtime
        self.timeline, self.bound = checked.timeline, checked.bound
        self.needed = sorted(needed_nodes(self.flat, self.timeline))
        self.gradients = Gradients(self.flat, self.timeline, card, self.needed)
        self.effects = [i for i in self.needed if self.timeline.effects[i]]
        self.editors: dict[Root, list[int]] = defaultdict(list)  # storage -> the in-place ops on it
        for effect in self.effects:
            for root in self.timeline.effects[effect]:
                self.editors[root].append(effect)
        saves = (self.flat.nodes[save] for save in self.flat.saves)
        self.shown = Counter(ref for save in saves for ref in save.refs())
        self.slots = len(self.flat.nodes)
        self.literals: dict[str, int] = {}
        self.own: dict[tuple[int, str], int] = {}  # (node, digest) -> slot of its own copy of that literal
        self.older: dict[tuple[int, int], int] = {}  # (reader, node it reads) -> slot of the version it wants
        #: View -> the same view of an older version: (what it is a view of, slot of the older version, slot).
        self.views: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.fallbacks: dict[int, int] = {}  # what may be a view or a copy -> slot of the older version of it
        #: Node -> copies made before it: (slot, slot of its copy).
        self.copies: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def plan(self) -> Plan:
        self._keep_older_versions()
        self._copy_literals()
        timed: list[tuple[int, int, Instruction]] = []  # (when, order within the event, instruction)
        for position in self.needed:
            node, when = self.flat.nodes[position], self._when(position)
            timed += [(when, position, emit.copy(position, *pair)) for pair in self.copies[position]]
            conditions = self.flat.guards.get(position, ())
            made = [self._view(position, *view) for view in self.views[position]]
            timed += [(when, position, guarded(i, conditions)) for i in made]
            # A save shows the last version, so it comes after everything else of its event; an original is
            # from before everything.
            late = len(self.flat.nodes) * ((node.op == SAVE) - (node.op == ORIGINAL))
            timed.append((when, position + late, guarded(self._instruction(position, node), conditions)))
            tracked = self.gradients.track(position)
            timed += [(when, position, guarded(i, conditions)) for i in tracked]
            if (early := self.gradients.early(position, self.slots)) is not None:
                self._new_slot()
                timed += [(early[0], -1, instruction) for instruction in early[1]]
        timed.sort(key=lambda entry: entry[:2])
        by_time: dict[int, list[Instruction]] = defaultdict(list)
        for (when, _, _), instruction in zip(timed, self._freeing([i for _, _, i in timed]), strict=True):
            by_time[when].append(instruction)
        before = tuple(by_time.pop(-1, ()))
        groups, last = self._groups(by_time), self.gradients.last_trace
        mutates = last >= 0 and (bool(self.effects) or self._scatters(last))
        return Plan(self.flat, before, groups, self.slots, self.literals, last, mutates)

    def _scatters(self, last: int) -> bool:
        """Whether invokes share a pass in one of the traces up to ``last``."""
        traces = zip(self.timeline.packed[: last + 1], self.flat.traces[: last + 1], strict=True)
        return any(packed and len(trace.invokes) > 1 for packed, trace in traces)

    # --- order and versions --------------------------------------------------------------------------------

    def _when(self, position: int) -> int:
        """When a node runs; a save waits for every edit of what it saves."""
        ready = self.timeline.ready
        if self.flat.nodes[position].op != SAVE:
            return ready[position]
        return max([ready[position], *(ready[e] for e in self._edits_of(self._roots_read(position)))])

    def _edits_of(self, roots: frozenset[Root]) -> set[int]:
        return {e for root in roots for e in self.editors.get(root, ())}

    def _roots_read(self, position: int) -> frozenset[Root]:
        found: frozenset[Root] = frozenset()
        return found.union(*(self.timeline.roots[r] for r in self.flat.nodes[position].refs()))

    def _keep_older_versions(self) -> None:
        """Give each node that runs after an edit the program places behind it a copy of the older version."""
        ready = self.timeline.ready
        readers: dict[int, list[int]] = defaultdict(list)
        holders: dict[Root, list[int]] = defaultdict(list)  # storage -> nodes whose value may lie in it
        for reader in self.needed:
            for source in dict.fromkeys(self.flat.nodes[reader].refs()):
                if not readers[source]:
                    for root in self.timeline.roots[source]:
                        holders[root].append(source)
                if self.flat.nodes[reader].op != SAVE:
                    readers[source].append(reader)
        for effect in sorted(self.effects, key=lambda e: (ready[e], e)):
            sources = {s for root in self.timeline.effects[effect] for s in holders[root]}
            for source in sorted(s for s in sources if (ready[s], s) < (ready[effect], effect)):
                copied = _Slot(self._new_slot, partial(self._copy, effect, source))
                self._read_older(effect, source, copied, readers)

    def _read_older(
        self, effect: int, source: int, older: _Slot, readers: Mapping[int, Sequence[int]]
    ) -> None:
        """Let what stands before an edit and runs after it read an older version of ``source``. A view goes
        with what it is a view of; those that read it get the same view of the older version."""
        ready = self.timeline.ready
        for reader in readers[source]:
            if reader >= effect or ready[reader] <= ready[effect]:
                continue
            if self.timeline.bases[reader] == source:
                again = _Slot(self._new_slot, partial(self._view_again, reader, source, older))
                if self._may_copy(reader):
                    self.fallbacks.setdefault(reader, again.number)
                self._read_older(effect, reader, again, readers)
            elif (reader, source) not in self.older:
                self.older[reader, source] = older.number

    def _copy(self, effect: int, source: int, slot: int) -> None:
        self.copies[effect].append((source, slot))

    def _view_again(self, view: int, source: int, older: _Slot, slot: int) -> None:
        self.views[view].append((source, older.number, slot))

    def _may_copy(self, position: int) -> bool:
        """Whether a node's value is a view of what it takes, or a copy of it: torch decides."""
        node, bound = self.flat.nodes[position], self.bound[position]
        return node.op != APPLY and bound is not None and lookup(node.op).alias_of(bound) is Alias.MAYBE_VIEW

    def _copy_literals(self) -> None:
        """Give each node in whose value a literal may live on a copy of it."""
        for position in self.needed:
            node = self.flat.nodes[position]
            if keeps_literals(node, self.bound[position]):
                for digest in dict.fromkeys(tensors([*node.args, *node.kwargs.values()])):
                    self.own[position, digest] = self._new_slot()
                    self.copies[position].append((self._literal(digest), self.own[position, digest]))

    def _freeing(self, instructions: list[Instruction]) -> list[Instruction]:
        """The same instructions, each freeing the slots it is the last to read (or to fill in vain)."""
        seen: set[int] = set()
        result: list[Instruction] = []
        for instruction in reversed(instructions):
            touched = {*instruction.reads, *([instruction.out] if hasattr(instruction, "out") else [])}
            result.append(replace(instruction, frees=tuple(sorted(touched - seen))))
            seen |= touched
        return result[::-1]

    # --- instructions --------------------------------------------------------------------------------------

    def _instruction(self, position: int, node: Node) -> Instruction:
        slot_of = self._slots_for(position)
        if node.op in (GET, GRAD):
            when, roots = self.timeline.ready[position], self.timeline.roots[position]
            edited = any(self.timeline.ready[e] == when for e in self._edits_of(roots))
            if node.op == GRAD:
                return Get(position, Gradient(node.args[0].node), position, edited)
            # What gradients are to reach must be on the model's way, so it is written back.
            return Get(position, node.site, position, edited or position in self.gradients.roots)
        if node.op in (SET, SET_GRAD):
            value, apart = emit.resolve(node.args[-1], slot_of), self._edited_apart(position)
            site = node.site if node.op == SET else Gradient(node.args[0].node)
            return Set(position, site, emit.builder(value), apart, emit.reads(value))
        if node.op == BACKWARD:
            loss, *given = (emit.resolve(v, slot_of) for v in node.args)
            build = emit.builder(given[0]) if given else None
            return Backward(position, loss.node, build, (), (), False, (), emit.reads([loss, *given]))
        if node.op == SAVE:
            value = emit.resolve(node.args[0], slot_of)
            shared = self._shares_memory(position)
            return Save(position, self.flat.saves[position], emit.builder(value), shared, emit.reads(value))
        if node.op in (ORIGINAL, LOG, SKIP):
            return acts.act(position, node, slot_of, self.card)
        if node.op == PARAM:
            return emit.parameter(position, node, self._leaves_the_graph(position), self.runtime)
        made = emit.call(position, node, slot_of, self.runtime)
        older = self.fallbacks.get(position)
        return made if older is None else emit.view_or(made, self.timeline.bases[position], older)

    def _view(self, position: int, source: int, older: int, out: int) -> Instruction:
        """A view that a node makes, made of an older version of what it is a view of."""
        slot_of = self._slots_for(position)

        def with_older(value: Ref | TensorRef) -> int:
            return older if isinstance(value, Ref) and value.node == source else slot_of(value)

        return replace(emit.call(position, self.flat.nodes[position], with_older, self.runtime), out=out)

    def _leaves_the_graph(self, position: int) -> bool:
        """Whether a value's storage is edited, or reaches the model, where it might be."""
        own = ("node", position)
        takers = (i for i in self.needed if self.flat.nodes[i].op in (SET, APPLY))
        return own in self.editors or any(own in self._roots_read(taker) for taker in takers)

    def _edited_apart(self, position: int) -> bool:
        """Whether a value written to a site is edited later, and not by way of the site."""
        when, site = self.timeline.ready[position], self.timeline.roots[position]
        edits = self._edits_of(self._roots_read(position))
        return any(self.timeline.ready[e] > when and not self.timeline.effects[e] & site for e in edits)

    def _slots_for(self, reader: int) -> Callable[[Ref | TensorRef], int]:
        def slot_of(value: Ref | TensorRef) -> int:
            if isinstance(value, Ref):
                return self.older.get((reader, value.node), value.node)
            own = self.own.get((reader, value.digest))
            return self._literal(value.digest) if own is None else own

        return slot_of

    def _literal(self, digest: str) -> int:
        if digest not in self.literals:
            self.literals[digest] = self._new_slot()
        return self.literals[digest]

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _shares_memory(self, save: int) -> bool:
        """Whether a saved tensor may share memory with the model's, a literal's, or another value's."""
        return bool(self.given & self._roots_read(save)) or any(
            self.shown[r] > 1
            or self.flat.nodes[r].op in (APPLY, PARAM)
            or self.timeline.roots[r] != {("node", r)}
            for r in self.flat.nodes[save].refs()
        )

    # --- events --------------------------------------------------------------------------------------------

    def _groups(self, by_time: Mapping[int, list[Instruction]]) -> tuple[Group, ...]:
        clock, packed = self.timeline.clock, self.timeline.packed
        passes: dict[tuple[int, int], dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
        after: dict[int, dict[int, list[Instruction]]] = defaultdict(dict)
        for when in sorted(by_time):
            place, instructions = clock.place(when), by_time[when]
            if place.within < 0:
                after[place.trace][when] = instructions
                continue
            event = self._event(place, instructions)
            passes[place.trace, place.turn][place.step].append(event)
        for trace, results in self._results().items():  # passes that only the result needs
            for turn in {0} if packed[trace] else results:
                passes.setdefault((trace, turn), defaultdict(list))
        for trace in after:  # a trace may have nothing but a backward pass
            if not any(key[0] == trace for key in passes):
                passes[trace, 0] = defaultdict(list)
        groups = []
        for trace, turn in sorted(passes):
            invokes = tuple(range(len(self.flat.traces[trace].invokes))) if packed[trace] else (turn,)
            whole = bool(self._results().get(trace, set()) & set(invokes))
            own = [Pass(step, tuple(events)) for step, events in sorted(passes[trace, turn].items())]
            if own and not whole:
                *others, final = own[-1].events
                own[-1] = replace(own[-1], events=(*others, replace(final, last=True)))
            ends = (trace, turn) == max(key for key in passes if key[0] == trace)
            behind = self.gradients.nested(after[trace]) if ends else ()
            groups.append(Group(trace, invokes, tuple(own), whole, behind, trace in self.eager))
        return tuple(groups)

    def _event(self, place: Place, instructions: list[Instruction]) -> Event:
        within, inside = divmod(place.within, self.card.insides.scale)
        if inside:
            found = self.card.insides.at(place.step, place.within)
            own = tuple(instructions)
            return Event(found.module, found.kind, found.call, False, own, found.name, found.names)
        return Event(*self.places[bool(place.step)][within], False, tuple(instructions))

    def _results(self) -> dict[int, set[int]]:
        """Trace -> the invokes whose result is needed."""
        found: dict[int, set[int]] = defaultdict(set)
        for position in self.needed:
            node = self.flat.nodes[position]
            if node.op == GET and node.site.kind == RESULT:
                found[node.region].add(node.site.invoke)
        return found

    @cached_property
    def eager(self) -> frozenset[int]:
        """The traces that touch what is there only under eager attention."""
        nodes = [self.flat.nodes[i] for i in self.needed if self.flat.nodes[i].op in (GET, SET)]
        return frozenset(node.region for node in nodes if self.card.insides.is_eager(node.site))

    @cached_property
    def given(self) -> frozenset[Root]:
        """The storages of values that replace the model's own."""
        found: frozenset[Root] = frozenset()
        return found.union(*(self._roots_read(i) for i in self.needed if self.flat.nodes[i].op == SET))

    @cached_property
    def places(self) -> tuple[dict[int, tuple[str, str, int]], ...]:
        """Of a prefill and of a decode step: position within the pass -> module, kind, and call."""
        found: tuple[dict[int, tuple[str, str, int]], ...] = ({}, {})
        for phase, calls in zip(found, (self.card.prefill, self.card.decode), strict=True):
            for call in calls:
                phase[call.enter] = (call.module, "input", call.call)
                phase[call.exit] = (call.module, "output", call.call)
        return found

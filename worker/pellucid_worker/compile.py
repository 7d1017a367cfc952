"""Compiling a checked graph into a plan.

Each needed node becomes one instruction at the first event where everything it needs exists; within an
event, instructions keep the program's order. Where an in-place op runs before a node that still wants the
older version, a copy is made just before the op, and that node reads the copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

from pellucid_shared.card import ModelCard
from pellucid_shared.check import Checked
from pellucid_shared.clock import Place
from pellucid_shared.graph import APPLY, GET, SAVE, SET, Node
from pellucid_shared.storage import Root
from pellucid_shared.values import RESULT, Ref, TensorRef

from . import emit
from .guards import guarded
from .liveness import needed_nodes
from .plan import Call, Event, Get, Group, Instruction, Pass, Plan, Save, Set


def compile_graph(checked: Checked, card: ModelCard, runtime: emit.Runtime) -> Plan:
    """The plan of a checked graph; its instructions draw on ``runtime`` when they run."""
    return _Compiler(checked, card, runtime).plan()


class _Compiler:
    def __init__(self, checked: Checked, card: ModelCard, runtime: emit.Runtime) -> None:
        self.flat, self.card, self.runtime = checked.flat, card, runtime
        self.timeline = checked.timeline
        self.needed = sorted(needed_nodes(self.flat, self.timeline))
        self.effects = [i for i in self.needed if self.timeline.effects[i]]
        self.editors: dict[Root, list[int]] = defaultdict(list)  # storage -> the in-place ops on it
        for effect in self.effects:
            for root in self.timeline.effects[effect]:
                self.editors[root].append(effect)
        saves = (self.flat.nodes[save] for save in self.flat.saves)
        self.shown = Counter(ref for save in saves for ref in save.refs())
        self.slots = len(self.flat.nodes)
        self.literals: dict[str, int] = {}
        self.older: dict[tuple[int, int], int] = {}  # (reader, node it reads) -> slot of the version it wants
        self.copies: dict[int, list[tuple[int, int]]] = defaultdict(
            list
        )  # effect -> [(node, slot of its copy)]

    def plan(self) -> Plan:
        self._keep_older_versions()
        timed: list[tuple[int, int, Instruction]] = []  # (when, order within the event, instruction)
        for position in self.needed:
            node, when = self.flat.nodes[position], self._when(position)
            timed += [(when, position, emit.copy(position, *pair)) for pair in self.copies[position]]
            # A save shows the last version, so it comes after everything else of its event.
            late = len(self.flat.nodes) if node.op == SAVE else 0
            made = self._instruction(position, node)
            conditions = self.flat.guards.get(position)
            timed.append((when, position + late, guarded(made, conditions) if conditions else made))
        timed.sort(key=lambda entry: entry[:2])
        by_time: dict[int, list[Instruction]] = defaultdict(list)
        for (when, _, _), instruction in zip(timed, self._freeing([i for _, _, i in timed]), strict=True):
            by_time[when].append(instruction)
        before = tuple(by_time.pop(-1, ()))
        return Plan(self.flat, before, self._groups(by_time), self.slots, self.literals)

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
                copied: int | None = None
                for reader in readers[source]:
                    late = reader < effect and ready[reader] > ready[effect]
                    if late and (reader, source) not in self.older:
                        if copied is None:
                            copied = self._new_slot()
                            self.copies[effect].append((source, copied))
                        self.older[reader, source] = copied

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

    def _instruction(self, position: int, node: Node) -> Call | Get | Set | Save:
        slot_of = self._slots_for(position)
        if node.op == GET:
            when, roots = self.timeline.ready[position], self.timeline.roots[position]
            edited = any(self.timeline.ready[e] == when for e in self._edits_of(roots))
            return Get(position, node.site, position, edited)
        if node.op == SET:
            value = emit.resolve(node.args[1], slot_of)
            return Set(
                position, node.site, emit.builder(value), self._edited_apart(position), emit.reads(value)
            )
        if node.op == SAVE:
            value = emit.resolve(node.args[0], slot_of)
            shared = self._shares_memory(position)
            return Save(position, self.flat.saves[position], emit.builder(value), shared, emit.reads(value))
        return emit.call(position, node, slot_of, self.runtime)

    def _edited_apart(self, position: int) -> bool:
        """Whether a value written to a site is edited later, and not by way of the site."""
        when, site = self.timeline.ready[position], self.timeline.roots[position]
        edits = self._edits_of(self._roots_read(position))
        return any(self.timeline.ready[e] > when and not self.timeline.effects[e] & site for e in edits)

    def _slots_for(self, reader: int) -> Callable[[Ref | TensorRef], int]:
        def slot_of(value: Ref | TensorRef) -> int:
            if isinstance(value, Ref):
                return self.older.get((reader, value.node), value.node)
            if value.digest not in self.literals:
                self.literals[value.digest] = self._new_slot()
            return self.literals[value.digest]

        return slot_of

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _shares_memory(self, save: int) -> bool:
        """Whether a saved tensor may share memory with the model's, a literal's, or another value's."""
        return bool(self.given & self._roots_read(save)) or any(
            self.shown[r] > 1 or self.flat.nodes[r].op == APPLY or self.timeline.roots[r] != {("node", r)}
            for r in self.flat.nodes[save].refs()
        )

    # --- events --------------------------------------------------------------------------------------------

    def _groups(self, by_time: Mapping[int, list[Instruction]]) -> tuple[Group, ...]:
        clock, packed = self.timeline.clock, self.timeline.packed
        passes: dict[tuple[int, int], dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
        after: dict[int, list[Instruction]] = {}
        for when in sorted(by_time):
            place, instructions = clock.place(when), by_time[when]
            if place.within < 0:
                after[place.trace] = instructions
                continue
            event = self._event(place, instructions)
            passes[place.trace, place.turn][place.step].append(event)
        for trace, results in self._results().items():  # passes that only the result needs
            for turn in {0} if packed[trace] else results:
                passes.setdefault((trace, turn), defaultdict(list))
        groups = []
        for trace, turn in sorted(passes):
            invokes = tuple(range(len(self.flat.traces[trace].invokes))) if packed[trace] else (turn,)
            whole = bool(self._results().get(trace, set()) & set(invokes))
            own = [Pass(step, tuple(events)) for step, events in sorted(passes[trace, turn].items())]
            if own and not whole:
                *others, final = own[-1].events
                own[-1] = replace(own[-1], events=(*others, replace(final, last=True)))
            ends = (trace, turn) == max(key for key in passes if key[0] == trace)
            behind = tuple(after.get(trace, ())) if ends else ()
            groups.append(Group(trace, invokes, tuple(own), whole, behind))
        return tuple(groups)

    def _event(self, place: Place, instructions: list[Instruction]) -> Event:
        phase = self.places[bool(place.step)]
        return Event(*phase[place.within], False, tuple(instructions))

    def _results(self) -> dict[int, set[int]]:
        """Trace -> the invokes whose result is needed."""
        found: dict[int, set[int]] = defaultdict(set)
        for position in self.needed:
            node = self.flat.nodes[position]
            if node.op == GET and node.site.kind == RESULT:
                found[node.region].add(node.site.invoke)
        return found

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

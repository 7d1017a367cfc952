"""Compiling a checked graph into a plan.

Each needed node becomes one instruction at the first event where everything it needs exists; within an
event, instructions keep the program's order. Where an in-place op runs before a node that still wants the
older version, a copy is made just before the op, and that node reads the copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from pellucid_shared.card import ModelCard
from pellucid_shared.check import Checked
from pellucid_shared.graph import APPLY, GET, SAVE, SET, Graph, Node
from pellucid_shared.storage import Root, pass_length
from pellucid_shared.values import Ref, TensorRef

from . import emit
from .liveness import needed_nodes
from .plan import Event, Get, Instruction, Pass, Plan, Save, Set


def compile_graph(graph: Graph, checked: Checked, card: ModelCard, runtime: emit.Runtime) -> Plan:
    """The plan of a graph that passed ``check``; its instructions draw on ``runtime`` when they run."""
    return _Compiler(graph, checked, card, runtime).plan()


class _Compiler:
    def __init__(self, graph: Graph, checked: Checked, card: ModelCard, runtime: emit.Runtime) -> None:
        self.graph, self.card, self.runtime = graph, card, runtime
        self.timeline = checked.timeline
        self.needed = sorted(needed_nodes(graph, self.timeline))
        self.effects = [i for i in self.needed if self.timeline.effects[i]]
        self.names = graph.save_names()
        self.shown = Counter(r for save in self.names for r in graph.nodes[save].refs())
        self.slots = len(graph.nodes)
        self.literals: dict[str, int] = {}
        self.older: dict[tuple[int, int], int] = {}  # (reader, node it reads) -> slot of the version it wants
        self.copies: dict[int, list[tuple[int, int]]] = defaultdict(
            list
        )  # effect -> [(node, slot of its copy)]

    def plan(self) -> Plan:
        self._keep_older_versions()
        timed: list[tuple[int, int, Instruction]] = []  # (when, order within the event, instruction)
        for position in self.needed:
            node, when = self.graph.nodes[position], self._when(position)
            timed += [(when, position, emit.copy(position, *pair)) for pair in self.copies[position]]
            # A save shows the last version, so it comes after everything else of its event.
            late = len(self.graph.nodes) if node.op == SAVE else 0
            timed.append((when, position + late, self._instruction(position, node)))
        timed.sort(key=lambda entry: entry[:2])
        by_time: dict[int, list[Instruction]] = defaultdict(list)
        for (when, _, _), instruction in zip(timed, self._freeing([i for _, _, i in timed]), strict=True):
            by_time[when].append(instruction)
        before = tuple(by_time.pop(-1, ()))
        return Plan(before, self._passes(by_time), self.slots, self.literals)

    # --- order and versions --------------------------------------------------------------------------------

    def _when(self, position: int) -> int:
        """When a node runs; a save waits for every edit of what it saves."""
        ready = self.timeline.ready
        if self.graph.nodes[position].op != SAVE:
            return ready[position]
        return max([ready[position], *(ready[e] for e in self._edits_of(self._roots_read(position)))])

    def _edits_of(self, roots: frozenset[Root]) -> list[int]:
        return [e for e in self.effects if self.timeline.effects[e] & roots]

    def _roots_read(self, position: int) -> frozenset[Root]:
        found: frozenset[Root] = frozenset()
        return found.union(*(self.timeline.roots[r] for r in self.graph.nodes[position].refs()))

    def _keep_older_versions(self) -> None:
        """Give each node that runs after an edit the program places behind it a copy of the older version."""
        ready = self.timeline.ready
        for effect in sorted(self.effects, key=lambda e: (ready[e], e)):
            copied: dict[int, int] = {}
            for reader in self.needed:
                node = self.graph.nodes[reader]
                if reader >= effect or ready[reader] <= ready[effect] or node.op == SAVE:
                    continue
                for source in node.refs():
                    shares = self.timeline.roots[source] & self.timeline.effects[effect]
                    existed = (ready[source], source) < (ready[effect], effect)
                    if shares and existed and (reader, source) not in self.older:
                        if source not in copied:
                            copied[source] = self._new_slot()
                            self.copies[effect].append((source, copied[source]))
                        self.older[reader, source] = copied[source]

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
            return Save(position, self.names[position], emit.builder(value), shared, emit.reads(value))
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
        roots = self._roots_read(save)
        given = any(self.graph.nodes[i].op == SET and self._roots_read(i) & roots for i in self.needed)
        return given or any(
            self.shown[r] > 1 or self.graph.nodes[r].op == APPLY or self.timeline.roots[r] != {("node", r)}
            for r in self.graph.nodes[save].refs()
        )

    # --- events --------------------------------------------------------------------------------------------

    def _passes(self, by_time: Mapping[int, list[Instruction]]) -> tuple[Pass, ...]:
        length = pass_length(self.card)
        places = {}
        for call in self.card.prefill:
            places[call.enter] = (call.module, "input", call.call)
            places[call.exit] = (call.module, "output", call.call)
        groups: dict[int, list[Event]] = defaultdict(list)
        for when in sorted(by_time):
            turn, within = (0, when) if self.timeline.packed else divmod(when, length)
            groups[turn].append(Event(*places[within], False, tuple(by_time[when])))
        everyone = tuple(range(len(self.graph.regions[0].invokes)))
        return tuple(
            Pass(
                everyone if self.timeline.packed else (turn,),
                (*events[:-1], replace(events[-1], last=True)),
            )
            for turn, events in groups.items()
        )

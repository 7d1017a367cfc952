"""Compiling backward passes: which tensors gradients must reach, and what happens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from pellucid_shared.backward import backwards, name_of
from pellucid_shared.card import ModelCard, TensorLeaf, leaves
from pellucid_shared.errors import GradientError
from pellucid_shared.flat import Flat
from pellucid_shared.graph import GET, GRAD, SET_GRAD, Node
from pellucid_shared.storage import Root, Timeline, site_leaf
from pellucid_shared.values import RESULT, Site

from .liveness import Needs
from .plan import Arrival, Backward, Get, Gradient, Instruction, Set, Track


class Gradients:
    """The needed backward passes of a job.

    Attributes:
        passes: numbers of those that are needed, in order.
        roots: nodes at whose tensors tracking begins, unless it has before.
    """

    def __init__(self, flat: Flat, timeline: Timeline, card: ModelCard, needed: Iterable[int]) -> None:
        self._flat, self._timeline, self._card = flat, timeline, card
        self._all = backwards(flat)
        self._values: dict[
            int, dict[int, int]
        ] = {}  # pass -> value -> the first node that names its gradient
        for position in sorted(needed):
            node = flat.nodes[position]
            if node.op in (GRAD, SET_GRAD):
                self._values.setdefault(node.args[1], {}).setdefault(node.args[0].node, position)
        self.passes = sorted(self._values)
        self._overwritten = frozenset[Root]().union(*timeline.effects)
        self._watched = {value for values in self._values.values() for value in values}
        self.roots = self._watched | {origin for v in self._watched for origin in self._origins(v)}
        for number in self.passes:
            self._require_dependence(number)

    @property
    def last_trace(self) -> int:
        """Number of the last trace with a backward pass; -1: there is none."""
        return max((self._all[number].trace for number in self.passes), default=-1)

    # --- tracking ------------------------------------------------------------------------------------------

    def track(self, position: int) -> Iterator[Instruction]:
        """What follows a node's own instruction."""
        if position in self.roots:
            node = self._flat.nodes[position]
            own = node.op == GET and self._in_a_pass(node)
            site = node.site if own else None
            yield Track(
                position, position, site, position in self._watched, self._edited(position, site), (position,)
            )

    def early(self, position: int, slot: int) -> tuple[int, tuple[Instruction, ...]] | None:
        """Where a tensor of the model is touched before the event that a node reads it at, gradients must
        reach it there: when, and what is done. ``slot`` is a new one."""
        node = self._flat.nodes[position]
        if position not in self.roots or node.op != GET or not self._in_a_pass(node):
            return None
        leaf = site_leaf(self._card, node.site)
        if leaf is None or leaf.object is None:
            return None
        site = self._first_site(node.site, leaf.object)
        when = self._timeline.clock.at(node.region, site)
        if when >= self._timeline.ready[position]:
            return None
        edited = self._edited(position, site)
        return when, (Get(position, site, slot, True), Track(position, slot, site, False, edited, (slot,)))

    def _edited(self, position: int, site: Site | None) -> bool:
        roots = self._timeline.roots[position]
        returned = site is not None and site.kind == "output"
        return returned and bool(roots & self._overwritten)

    def _in_a_pass(self, node: Node) -> bool:
        return node.site.kind != RESULT and self._flat.traces[node.region].generation is None

    def _first_site(self, site: Site, number: int) -> Site:
        """Where the model first has the tensor it has at a site."""
        found: tuple[int, Site] | None = None
        for call in self._card.prefill:
            for kind, when in (("input", call.enter), ("output", call.exit)):
                if found is not None and when >= found[0]:
                    continue
                for path, leaf in leaves(call.structure(kind)):
                    if isinstance(leaf, TensorLeaf) and leaf.object == number:
                        found = when, replace(site, module=call.module, kind=kind, path=path, call=call.call)
                        break
        assert found is not None
        return found[1]

    def _origins(self, value: int) -> Iterator[int]:
        """The nodes that made the storage a value may lie in."""
        for root in self._timeline.roots[value]:
            if root[0] == "node":
                yield root[1]
            for position in range(value) if root[0] == "site" else ():
                if self._flat.nodes[position].op == GET and root in self._timeline.roots[position]:
                    yield position

    def _require_dependence(self, number: int) -> None:
        """Raise GradientError where the loss cannot depend on a value whose gradient is asked."""
        loss = self._flat.nodes[self._all[number].node].args[0].node
        needs = Needs(self._flat, self._timeline, [loss], lambda node: node.op not in _CUT)
        for value, asked in self._values[number].items():
            roots, when = self._timeline.roots[value], self._timeline.ready[value]
            reached = value in needs.nodes or roots & needs.roots
            if not reached and not any(needs.read_from(root, when) for root in roots):
                raise no_dependence(self._flat, value, loss, asked)

    # --- passes --------------------------------------------------------------------------------------------

    def nested(self, by_time: Mapping[int, Sequence[Instruction]]) -> tuple[Instruction, ...]:
        """What comes behind the forward passes of a trace; what happens in a backward pass is inside it."""
        begins = {self._timeline.clock.backward(number): number for number in self.passes}
        result: list[Instruction] = []
        arrivals: list[Sequence[Instruction]] = []
        for when in sorted(by_time, reverse=True):
            if when in begins:
                (started,) = by_time[when]
                assert isinstance(started, Backward)
                result[:0] = [self._whole(begins[when], started, arrivals)]
                arrivals = []
            elif self._timeline.clock.in_backward(when):
                arrivals.insert(0, by_time[when])
            else:
                result[:0] = by_time[when]
        return tuple(result)

    def _whole(self, number: int, started: Backward, arrivals: Sequence[Sequence[Instruction]]) -> Backward:
        start, values = self._timeline.clock.backward(number), tuple(self._values[number])
        later = {v for other in self.passes if other > number for v in self._values[other]}
        # Arrivals may happen in another order than they are listed in, so what they free is freed at the end.
        frees = {*started.frees, *(slot for own in arrivals for i in own for slot in i.frees)}
        own = [self._arrival(i, arrivals) for i in range(len(arrivals))]
        return replace(
            started,
            values=values,
            arrivals=tuple(own),
            retain=any(self._timeline.ready[v] < start for v in later),
            done=tuple(v for v in values if v not in later),
            frees=tuple(sorted(frees)),
        )

    def _arrival(self, index: int, arrivals: Sequence[Sequence[Instruction]]) -> Arrival:
        own = [replace(instruction, frees=()) for instruction in arrivals[index]]
        changes = {
            i.site.value
            for i in own
            if isinstance(i, Get | Set) and isinstance(i.site, Gradient) and (isinstance(i, Set) or i.edited)
        }
        needs = tuple(i for i in range(index) if self._depends(own, arrivals[i]))
        return Arrival(tuple(sorted(changes)), needs, tuple(own))

    def _depends(self, later: Sequence[Instruction], earlier: Sequence[Instruction]) -> bool:
        made = {i.out for i in earlier if hasattr(i, "out")}
        if any(made & set(i.reads) for i in later):
            return True
        written, over = self._written(earlier), self._written(later)
        return bool(written & (self._read(later) | over) or over & self._read(earlier))

    def _written(self, instructions: Sequence[Instruction]) -> set[Root]:
        return {root for i in instructions for root in self._timeline.effects[i.node]}

    def _read(self, instructions: Sequence[Instruction]) -> set[Root]:
        nodes = (self._flat.nodes[i.node] for i in instructions)
        return {root for node in nodes for ref in node.refs() for root in self._timeline.roots[ref]}


#: Ops that gradients do not pass.
_CUT = ("torch.detach", GRAD)


def no_dependence(flat: Flat, value: int, loss: int, asked: int) -> GradientError:
    """The error for the gradient of a value that the loss does not depend on."""
    return GradientError(
        f"{name_of(flat, value)} has no gradient: the loss, {name_of(flat, loss)}, does not depend on it",
        node=flat.origin[asked],
    )

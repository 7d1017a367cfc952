"""Which values may share storage, and when each node can run: the ground of ordering and of versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .apply import returns_its_input
from .backward import Made, Schedule, name_of
from .card import ModelCard, TensorLeaf, leaves
from .clock import Clock
from .errors import GradientError, OrderError
from .flat import Flat
from .flow import EITHER, FLAT_OPS, KEPT
from .graph import (
    APPLY,
    BACKWARD,
    CORE_OPS,
    GET,
    GRAD,
    GRADIENT_OPS,
    LOG,
    ORIGINAL,
    SET,
    SKIP,
    STOP,
    Node,
)
from .ops import Alias, lookup
from .passing import Passing, skipped_sites
from .values import RESULT, Ref, Site, refs

#: A storage: ("node", position) for what a node allocates, ("site", trace, invoke, step, object) for the
#: model's own, ("grad", backward pass, when the value was made) for a gradient.
Root = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """When and on what each node works.

    Attributes:
        ready: per node, the clock position at which everything it needs exists.
        roots: per node, the storages its value may lie in.
        effects: per node, the storages it overwrites (in-place ops only, else empty).
        bases: per node, the node whose tensor its value is, or may be a view of; None where it is neither.
        packed: per trace, whether its invokes share passes.
        clock: what the positions in ``ready`` mean.
    """

    ready: tuple[int, ...]
    roots: tuple[frozenset[Root], ...]
    effects: tuple[frozenset[Root], ...]
    bases: tuple[int | None, ...]
    packed: tuple[bool, ...]
    clock: Clock


def shares_pass(flat: Flat, trace: int, card: ModelCard) -> bool:
    """Whether all invokes of a trace can share packed passes: the card certifies packing, and every site the
    trace touches is a slice of its packed tensor."""
    if len(flat.traces[trace].invokes) == 1:
        return True
    nodes = [n for n in flat.nodes if n.region == trace]
    sites = [n.site for n in nodes if n.op in (GET, SET, ORIGINAL)]
    sites += [site for n in nodes if n.op == SKIP for site in skipped_sites(n.site, card)]
    if card.takes == "tensors":
        return card.packs is True and _by_rows([site_leaf(card, site) for site in sites])
    return card.packs is not False and all(_packable(card, site) for site in sites if site.kind != RESULT)


def _by_rows(leaves: Sequence[TensorLeaf | None]) -> bool:
    """Whether each site follows the batch with its axis 0, and none is another view of the memory of one."""
    objects: dict[int | None, int | None] = {}
    return all(
        leaf is not None
        and leaf.shape is not None
        and leaf.shape[:1] == ("batch",)
        and objects.setdefault(leaf.storage, leaf.object) == leaf.object
        for leaf in leaves
    )


def _packable(card: ModelCard, site: Site) -> bool:
    if not card.insides.packs(site):
        return False
    prefill = site_leaf(card, replace(site, step=0))
    if prefill is None or not prefill.packable():
        return False
    leaf = site_leaf(card, site) if site.step else prefill
    if leaf is None or leaf.shape is None:
        return False
    return leaf is prefill or leaf.shape[:1] == ("batch",)


def site_leaf(card: ModelCard, site: Site) -> TensorLeaf | None:
    """The card's leaf for a site, or None where there is none or it is no tensor."""
    call = card.call_at(site)
    leaf = call and card.insides.part(call, site)
    return leaf if isinstance(leaf, TensorLeaf) else None


def timeline(flat: Flat, card: ModelCard, bound: Sequence[dict[str, Any] | None]) -> Timeline:
    """Order every node of a graph whose sites are known to exist.

    Args:
        bound: per node of a registry op its bound arguments (specs for tensors), else None.

    Raises:
        OrderError: a write needs a value the model makes only later; names both.
        GradientError: a gradient of a value that is made after its backward pass.
    """
    schedule = Schedule(flat)
    if schedule.passes:  # gradients come in the reverse of an order that must be known first
        first = _Builder(flat, card, schedule)
        first.build(bound)
        schedule = Schedule(flat, first.made)
    return _Builder(flat, card, schedule).build(bound)


@dataclass(frozen=True, slots=True)
class _Write:
    """A ``site.set``: where the model shows the value set, and what that value is."""

    position: int
    event: int
    until: int
    roots: frozenset[Root]
    gets: frozenset[int]

    def shows_at(self, event: int, position: int) -> bool:
        return (self.event, self.position) < (event, position) and event <= self.until


class _Builder:
    """Walks the nodes in program order; again, where a read meets a write that the program has later."""

    def __init__(self, flat: Flat, card: ModelCard, schedule: Schedule) -> None:
        self.flat, self.card, self.schedule = flat, card, schedule
        self.packed = tuple(shares_pass(flat, i, card) for i in range(len(flat.traces)))
        self.clock = Clock(card, flat.traces, self.packed, schedule.stretches())
        self.first_reads = self._first_reads()
        self.ahead: dict[int, list[_Write]] = {}  # read -> writes behind it in the program, before it in time

    def build(self, bound: Sequence[dict[str, Any] | None]) -> Timeline:
        while True:
            self._walk(bound)
            found = self._written_ahead()
            if found == self.ahead:
                break
            self.ahead = found
        return Timeline(
            tuple(self.ready),
            tuple(self.roots),
            tuple(self.effects),
            tuple(self.bases),
            self.packed,
            self.clock,
        )

    def _written_ahead(self) -> dict[int, list[_Write]]:
        found: dict[int, list[_Write]] = {}
        for root, reads in self.reads.items():
            for position, event in reads:
                shown = [w for w in self.writes.get(root, ()) if w.shows_at(event, position)]
                if ahead := [w for w in shown if w.position > position]:
                    found[position] = ahead
        return found

    def _walk(self, bound: Sequence[dict[str, Any] | None]) -> None:
        self.passing = Passing(self.flat, self.card, self.clock)
        self.made: list[Made] = []  # when each node's tensor was made, as far as gradients' order goes
        self.ready: list[int] = []
        self.roots: list[frozenset[Root]] = []
        self.effects: list[frozenset[Root]] = []
        self.bases: list[int | None] = []
        self.gets: list[frozenset[int]] = []  # the site.get and grad.get nodes a value may be the tensor of
        self.waits: list[set[int]] = []  # what a node runs after: the values it takes, and edits of them
        self.writes: dict[Root, list[_Write]] = {}  # storage of a site -> what is set there
        self.reads: dict[Root, list[tuple[int, int]]] = {}  # storage of a site -> its reads, and their events
        self.changed: dict[
            Root, frozenset[Root]
        ] = {}  # storage of a gradient -> those of the values set there
        self.last_set: dict[Root, int] = {}  # storage of a site or gradient -> the latest write to it
        self.last_edit: dict[Root, int] = {}  # storage -> the in-place op that made its latest version
        self.chosen: dict[Root, list[int]] = {}  # storage -> nodes that name it or another
        for position, node in enumerate(self.flat.nodes):
            needs = set(self.flat.needs(position))
            edits = {self.last_edit[root] for r in needs for root in self.roots[r] if root in self.last_edit}
            self.waits.append(needs | edits)
            when = max((self.ready[w] for w in self.waits[position]), default=-1)
            roots: frozenset[Root] = frozenset([("node", position)])
            gets: frozenset[int] = frozenset()
            edited: frozenset[Root] = frozenset()
            made: Made | None = None
            base: int | None = None
            if node.op in (GET, SET, ORIGINAL):
                when, roots, gets = self._site(position, node, when)
                if node.op == GET:
                    made = self._made(_site_root(self.card, node.region, node.site))
            elif node.op in GRADIENT_OPS:
                when, roots, gets = self._gradient(position, node, when)
            elif node.op in (SKIP, LOG, STOP):
                needs_until, when = when, self.passing.when(position, node, when)
                if node.op == SKIP and needs_until > when:
                    raise self._too_late(position)
            elif node.op in (EITHER, KEPT):
                roots, gets = self._chosen(position, node)
            elif node.op not in CORE_OPS and node.op not in FLAT_OPS:
                source, alias = aliased(node, bound[position])
                if source is not None and alias is not Alias.FRESH:
                    roots = self.roots[source] | (roots if alias is Alias.MAYBE_VIEW else frozenset())
                    gets, base = self.gets[source], source
                if source is not None and alias is Alias.INPLACE:
                    edited = roots
                    # What may name it by now has to, before it is edited.
                    self.waits[position] |= {c for root in roots for c in self.chosen.get(root, ())}
                    when = max([when, *(self.ready[w] for w in self.waits[position])])
                    self._edit_in_time(position, when, gets)
                    self.last_edit.update(dict.fromkeys(edited, position))
            elif node.op == APPLY and returns_its_input(node.args[0].path, self.card):
                base = next(node.refs(), None)
                if base is not None:
                    roots, gets = self.roots[base], self.gets[base]
            self.ready.append(when)
            self.made.append(made or (when, position))
            self.roots.append(roots)
            self.gets.append(gets)
            self.effects.append(edited)
            self.bases.append(base)
        self.passing.require_no_site_inside_a_skipped_module()

    def _site(self, position: int, node: Node, when: int) -> tuple[int, frozenset[Root], frozenset[int]]:
        event = self.passing.touch(position, node)
        if node.op == ORIGINAL:
            return event, frozenset([("node", position)]), frozenset()
        site = _site_root(self.card, node.region, node.site)
        roots = frozenset([site])
        gets = frozenset([position])
        if node.op == GET:  # after a write it names the tensor written
            self.reads.setdefault(site, []).append((position, event))
            before = [w for w in self.writes.get(site, ()) if w.shows_at(event, position)]
            for write in (*before, *self.ahead.get(position, ())):
                roots, gets = roots | write.roots, gets | write.gets
            return event, roots, gets
        if when > event:
            raise self._too_late(position)
        given = frozenset().union(*(self.roots[r] for r in node.refs()))
        named = frozenset().union(*(self.gets[r] for r in node.refs()))
        write = _Write(position, event, self._until(node, event), given, named)
        self.writes.setdefault(site, []).append(write)
        self.last_set[site] = position
        return event, roots, gets

    def _until(self, node: Node, event: int) -> int:
        """The last event at which the model may show what was set at a site: what a module is given, only it
        sees, unless it gives it back."""
        call = self.card.call_at(node.site)
        assert call is not None
        leaf = site_leaf(self.card, node.site)
        given_back = any(
            isinstance(found, TensorLeaf) and leaf is not None and found.object in (None, leaf.object)
            for _, found in leaves(call.output)
        )
        if node.site.kind != "input" or given_back:
            return self.clock.end
        return event + (call.exit - call.enter) * self.card.insides.scale

    def _gradient(self, position: int, node: Node, when: int) -> tuple[int, frozenset[Root], frozenset[int]]:
        if node.op == BACKWARD:
            start = self.clock.backward(self.schedule.number[position])
            if when > start:
                raise OrderError(
                    f"this loss needs {self._latest(position)}, which its own backward pass makes; a "
                    "gradient written before backward() belongs to the pass behind it",
                    node=self.flat.origin[position],
                )
            return start, frozenset([("node", position)]), frozenset()
        value, number = node.args[0].node, node.args[1]
        start = self.clock.backward(number)
        if self.ready[value] > start:
            raise GradientError(
                f"{name_of(self.flat, value)} is made only after the backward pass that this gradient is of; "
                "write loss.backward() behind it",
                node=self.flat.origin[position],
            )
        event = start + 1 + self.schedule.rank(number, value)
        root: Root = ("grad", number, self.made[value])
        roots = frozenset([root])
        if node.op == GRAD:
            return event, roots | self.changed.get(root, roots), frozenset([position])
        if when > event:
            raise OrderError(
                f"the gradient of {name_of(self.flat, value)} is set to a value that needs "
                f"{self._latest(position)}, which the backward pass makes only later",
                node=self.flat.origin[position],
            )
        self.last_set[root] = position
        given = [self.roots[r] for r in refs(node.args[-1])]
        self.changed[root] = self.changed.get(root, roots).union(*given)
        return event, roots, frozenset([position])

    def _first_reads(self) -> dict[Root, Made]:
        """Of each tensor of the model that is read, where it is first: it was made before all of the graph's
        there."""
        found: dict[Root, Made] = {}
        if self.schedule.passes:
            for position, node in enumerate(self.flat.nodes):
                if node.op == GET:
                    root = _site_root(self.card, node.region, node.site)
                    first = (self.clock.at(node.region, node.site), position - len(self.flat.nodes))
                    found[root] = min(first, found.get(root, first))
        return found

    def _made(self, site: Root) -> Made | None:
        """When the tensor was made that is at a site now."""
        edit, replaced = self.last_edit.get(site, -1), self.last_set.get(site, -1)
        if edit > replaced:
            return self.ready[edit], edit
        if replaced >= 0:
            given = next(self.flat.nodes[replaced].refs(), None)
            return (self.ready[replaced], replaced) if given is None else self.made[given]
        return self.first_reads.get(site)

    def _chosen(self, position: int, node: Node) -> tuple[frozenset[Root], frozenset[int]]:
        """A node that is one of its last two arguments."""
        values = set(refs(list(node.args[-2:])))
        roots = frozenset([("node", position)]).union(*(self.roots[v] for v in values))
        for root in roots:
            self.chosen.setdefault(root, []).append(position)
        return roots, frozenset[int]().union(*(self.gets[v] for v in values))

    def _edit_in_time(self, position: int, when: int, gets: frozenset[int]) -> None:
        for get in gets:
            node = self.flat.nodes[get]
            moved = "the backward pass" if node.op == GRAD else "the model"
            event = self.ready[get] if node.op == GRAD else self.clock.at(node.region, node.site)
            if when > event:
                remedy = "Edit a copy instead: take .clone() of the value first"
                if self._waits_for_condition(position, event):
                    remedy = "Its condition can use only what exists when it is edited"
                    if node.op != GRAD:
                        remedy = "Its condition can use only what exists when the model reaches it"
                raise OrderError(
                    f"this edits {name_of(self.flat, get)} in place, but can run only after {moved} has "
                    f"moved on: it needs {self._latest(position)}. {remedy}",
                    node=self.flat.origin[position],
                )

    def _waits_for_condition(self, position: int, event: int) -> bool:
        """Whether it is a node's conditions, and not its values, that come too late."""
        return all(self.ready[r] <= event for r in self.flat.nodes[position].refs())

    def _too_late(self, position: int) -> OrderError:
        why = (
            ""
            if self.packed[self.flat.nodes[position].region]
            else " (these invokes run one after another: they touch sites that cannot share a pass)"
        )
        needed = self._latest(position)
        if needed.startswith("the gradient"):
            why = " (gradients exist only once the forward pass has ended)"
        node = self.flat.nodes[position]
        site = replace(node.site, kind="input") if node.op == SKIP else node.site
        late = self._waits_for_condition(position, self.clock.at(node.region, site))
        how = "under a condition" if late else "with a value"
        what = f"{node.site} is written"
        if node.op == SKIP:
            what = f"{node.site.module} is skipped"
        return OrderError(
            f"{what} {how} that needs {needed}, "
            f"which the model makes only later{why}. "
            f"{'Its condition' if late else 'A write'} can use only what exists when the model reaches it",
            node=self.flat.origin[position],
        )

    def _latest(self, position: int) -> str:
        """The site that a node waits for longest."""
        reached, stack = {position}, [position]
        best: tuple[int, str] = (-1, "a later value")
        while stack:
            for wait in self.waits[stack.pop()] - reached:
                reached.add(wait)
                stack.append(wait)
                node = self.flat.nodes[wait]
                if node.op in (GET, ORIGINAL, GRAD) and self.ready[wait] > best[0]:
                    best = (self.ready[wait], name_of(self.flat, wait))
        return best[1]


def keeps_literals(node: Node, bound: dict[str, Any] | None) -> bool:
    """Whether a literal that a node takes may live on in what it gives, where a later edit would meet it:
    each use of a literal is a tensor of its own."""
    if node.op in CORE_OPS or node.op in FLAT_OPS:
        return node.op in (SET, APPLY)
    source, alias = aliased(node, bound)
    return source is None and alias is not Alias.FRESH


def _site_root(card: ModelCard, trace: int, site: Site) -> Root:
    leaf = site_leaf(card, site) if site.kind != RESULT else None
    if leaf is not None and leaf.object is not None:
        memory = leaf.object if leaf.storage is None else leaf.storage
        return ("site", trace, site.invoke, site.step, memory)
    return ("site", trace, site.invoke, site.step, site.module, site.kind, site.path, site.call)


def aliased(node: Node, bound: dict[str, Any] | None) -> tuple[int | None, Alias]:
    """The node whose storage an op's result relates to, and how."""
    op = lookup(node.op)
    if bound is None:
        return None, op.alias
    alias = op.alias_of(bound)
    if alias is Alias.FRESH:
        return None, alias
    names = [p.name for p in op.params]
    value = node.kwargs.get(op.aliases)
    index = names.index(op.aliases)
    if value is None and index < len(node.args):
        value = node.args[index]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return (value.node, alias) if isinstance(value, Ref) else (None, alias)

"""Which values may share storage, and when each node can run: the ground of ordering and of versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .apply import returns_its_input
from .card import ModelCard, TensorLeaf, leaf_at, leaves
from .clock import Clock
from .errors import OrderError
from .flat import Flat
from .graph import APPLY, GET, SAVE, SET, Node
from .ops import Alias, lookup
from .values import RESULT, Ref, Site

#: A storage: ("node", position) for what a node allocates, ("site", trace, invoke, step, object) for the
#: model's own.
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
    sites = (n.site for n in flat.nodes if n.op in (GET, SET) and n.region == trace)
    return card.packs and all(_packable(card, site) for site in sites if site.kind != RESULT)


def _packable(card: ModelCard, site: Site) -> bool:
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
    leaf = call and leaf_at(call.structure(site.kind), site.path)
    return leaf if isinstance(leaf, TensorLeaf) else None


def timeline(flat: Flat, card: ModelCard, bound: Sequence[dict[str, Any] | None]) -> Timeline:
    """Order every node of a graph whose sites are known to exist.

    Args:
        bound: per node of a registry op its bound arguments (specs for tensors), else None.

    Raises:
        OrderError: a write needs a value the model makes only later; names both.
    """
    return _Builder(flat, card).build(bound)


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

    def __init__(self, flat: Flat, card: ModelCard) -> None:
        self.flat, self.card = flat, card
        self.packed = tuple(shares_pass(flat, i, card) for i in range(len(flat.traces)))
        self.clock = Clock(card, flat.traces, self.packed)
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
        self.ready: list[int] = []
        self.roots: list[frozenset[Root]] = []
        self.effects: list[frozenset[Root]] = []
        self.bases: list[int | None] = []
        self.gets: list[frozenset[int]] = []  # the site.get nodes whose tensor a value may be
        self.waits: list[set[int]] = []  # what a node runs after: the values it takes, and edits of them
        self.writes: dict[Root, list[_Write]] = {}  # storage of a site -> what is set there
        self.reads: dict[Root, list[tuple[int, int]]] = {}  # storage of a site -> its reads, and their events
        self.last_edit: dict[Root, int] = {}  # storage -> the in-place op that made its latest version
        for position, node in enumerate(self.flat.nodes):
            needs = set(node.refs())
            edits = {self.last_edit[root] for r in needs for root in self.roots[r] if root in self.last_edit}
            self.waits.append(needs | edits)
            when = max((self.ready[w] for w in self.waits[position]), default=-1)
            roots: frozenset[Root] = frozenset([("node", position)])
            gets: frozenset[int] = frozenset()
            edited: frozenset[Root] = frozenset()
            base: int | None = None
            if node.op in (GET, SET):
                when, roots, gets = self._site(position, node, when)
            elif node.op not in (APPLY, SAVE):
                source, alias = _aliased(node, bound[position])
                if source is not None and alias is not Alias.FRESH:
                    roots = self.roots[source] | (roots if alias is Alias.MAYBE_VIEW else frozenset())
                    gets, base = self.gets[source], source
                if source is not None and alias is Alias.INPLACE:
                    edited = roots
                    self._edit_in_time(position, when, gets)
                    self.last_edit.update(dict.fromkeys(edited, position))
            elif node.op == APPLY and returns_its_input(node.args[0].path, self.card):
                base = next(node.refs(), None)
                if base is not None:
                    roots, gets = self.roots[base], self.gets[base]
            self.ready.append(when)
            self.roots.append(roots)
            self.gets.append(gets)
            self.effects.append(edited)
            self.bases.append(base)

    def _site(self, position: int, node: Node, when: int) -> tuple[int, frozenset[Root], frozenset[int]]:
        event = self.clock.at(node.region, node.site)
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
        if node.site.kind == "output" or given_back:
            return self.clock.end
        return event + call.exit - call.enter

    def _edit_in_time(self, position: int, when: int, gets: frozenset[int]) -> None:
        for get in gets:
            node = self.flat.nodes[get]
            site = node.site
            if when > self.clock.at(node.region, site):
                raise OrderError(
                    f"this edits {site} in place, but can run only after the model has moved on: it needs "
                    f"{self._latest(position)}. Edit a copy instead: take .clone() of the value first",
                    node=self.flat.origin[position],
                )

    def _too_late(self, position: int) -> OrderError:
        why = (
            ""
            if self.packed[self.flat.nodes[position].region]
            else " (these invokes run one after another: they touch sites that cannot share a pass)"
        )
        return OrderError(
            f"{self.flat.nodes[position].site} is written with a value that needs {self._latest(position)}, "
            f"which the model makes only later{why}. "
            "A write can use only what exists when the model reaches it",
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
                if node.op == GET and self.ready[wait] > best[0]:
                    best = (self.ready[wait], str(node.site))
        return best[1]


def keeps_literals(node: Node, bound: dict[str, Any] | None) -> bool:
    """Whether a literal that a node takes may live on in what it gives, where a later edit would meet it:
    each use of a literal is a tensor of its own."""
    if node.op in (GET, SAVE):
        return False
    if node.op in (SET, APPLY):
        return True
    source, alias = _aliased(node, bound)
    return source is None and alias is not Alias.FRESH


def _site_root(card: ModelCard, trace: int, site: Site) -> Root:
    leaf = site_leaf(card, site) if site.kind != RESULT else None
    if leaf is not None and leaf.object is not None:
        return ("site", trace, site.invoke, site.step, leaf.object)
    return ("site", trace, site.invoke, site.step, site.module, site.kind, site.path, site.call)


def _aliased(node: Node, bound: dict[str, Any] | None) -> tuple[int | None, Alias]:
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

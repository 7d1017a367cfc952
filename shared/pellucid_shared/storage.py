"""Which values may share storage, and when each node can run: the ground of ordering and of versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .apply import returns_its_input
from .card import ModelCard, TensorLeaf, leaf_at
from .clock import Clock
from .errors import OrderError
from .flat import Flat
from .flow import EITHER, FLAG, FLAT_OPS, KEPT
from .graph import APPLY, GET, SAVE, SET, Node
from .ops import Alias, lookup
from .values import RESULT, Ref, Site, refs

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
        packed: per trace, whether its invokes share passes.
        clock: what the positions in ``ready`` mean.
    """

    ready: tuple[int, ...]
    roots: tuple[frozenset[Root], ...]
    effects: tuple[frozenset[Root], ...]
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


class _Builder:
    """Walks the nodes in program order."""

    def __init__(self, flat: Flat, card: ModelCard) -> None:
        self.flat, self.card = flat, card
        self.packed = tuple(shares_pass(flat, i, card) for i in range(len(flat.traces)))
        self.clock = Clock(card, flat.traces, self.packed)
        self.ready: list[int] = []
        self.roots: list[frozenset[Root]] = []
        self.effects: list[frozenset[Root]] = []
        self.gets: list[frozenset[int]] = []  # the site.get nodes whose tensor a value may be
        self.waits: list[set[int]] = []  # what a node runs after: the values it takes, and edits of them
        self.written: dict[Root, frozenset[Root]] = {}  # storage of a site -> those of the values set there
        self.last_edit: dict[Root, int] = {}  # storage -> the in-place op that made its latest version
        self.chosen: dict[Root, list[int]] = {}  # storage -> nodes that name it or another

    def build(self, bound: Sequence[dict[str, Any] | None]) -> Timeline:
        for position, node in enumerate(self.flat.nodes):
            needs = set(self.flat.needs(position))
            edits = {self.last_edit[root] for r in needs for root in self.roots[r] if root in self.last_edit}
            self.waits.append(needs | edits)
            when = max((self.ready[w] for w in self.waits[position]), default=-1)
            roots: frozenset[Root] = frozenset([("node", position)])
            gets: frozenset[int] = frozenset()
            edited: frozenset[Root] = frozenset()
            if node.op in (GET, SET):
                when, roots, gets = self._site(position, node, when)
            elif node.op in (EITHER, KEPT):
                roots, gets = self._chosen(position, node)
            elif node.op not in (APPLY, SAVE, FLAG) and node.op not in FLAT_OPS:
                source, alias = _aliased(node, bound[position])
                if source is not None and alias is not Alias.FRESH:
                    roots = self.roots[source] | (roots if alias is Alias.MAYBE_VIEW else frozenset())
                    gets = self.gets[source]
                if source is not None and alias is Alias.INPLACE:
                    edited = roots
                    # What may name it by now has to, before it is edited.
                    self.waits[position] |= {c for root in roots for c in self.chosen.get(root, ())}
                    when = max([when, *(self.ready[w] for w in self.waits[position])])
                    self._edit_in_time(position, when, gets)
                    self.last_edit.update(dict.fromkeys(edited, position))
            elif node.op == APPLY and returns_its_input(node.args[0].path, self.card):
                source = next(node.refs())
                roots, gets = self.roots[source], self.gets[source]
            self.ready.append(when)
            self.roots.append(roots)
            self.gets.append(gets)
            self.effects.append(edited)
        return Timeline(tuple(self.ready), tuple(self.roots), tuple(self.effects), self.packed, self.clock)

    def _site(self, position: int, node: Node, when: int) -> tuple[int, frozenset[Root], frozenset[int]]:
        event = self.clock.at(node.region, node.site)
        site = _site_root(self.card, node.region, node.site)
        roots = frozenset([site])
        if node.op == GET:  # after a write it names the tensor written
            return event, roots | self.written.get(site, roots), frozenset([position])
        if when > event:
            raise self._too_late(position)
        self.written[site] = self.written.get(site, roots).union(*(self.roots[r] for r in node.refs()))
        return event, roots, frozenset([position])

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
            site = node.site
            if when > self.clock.at(node.region, site):
                remedy = "Edit a copy instead: take .clone() of the value first"
                if self._waits_for_condition(position, self.clock.at(node.region, site)):
                    remedy = "Its condition can use only what exists when the model reaches it"
                raise OrderError(
                    f"this edits {site} in place, but can run only after the model has moved on: it needs "
                    f"{self._latest(position)}. {remedy}",
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
        node = self.flat.nodes[position]
        late = self._waits_for_condition(position, self.clock.at(node.region, node.site))
        how = "under a condition" if late else "with a value"
        return OrderError(
            f"{node.site} is written {how} that needs {self._latest(position)}, "
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
                if node.op == GET and self.ready[wait] > best[0]:
                    best = (self.ready[wait], str(node.site))
        return best[1]


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

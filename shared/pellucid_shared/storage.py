"""Which values may share storage, and when each node can run: the ground of ordering and of versions.

A *clock* position is an event of the model's pass as the card numbers them; -1 is before the pass. Where the
invokes of a trace cannot share one pass they run one after another, and invoke i's clock starts where
invoke i-1's ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .apply import returns_its_input
from .card import ModelCard, TensorLeaf, leaf_at
from .errors import OrderError
from .graph import APPLY, GET, SAVE, SET, Graph, Node
from .ops import Alias, lookup
from .values import Ref, Site

#: A storage: ("node", position) for what a node allocates, ("site", invoke, object) for the model's own.
Root = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """When and on what each node works.

    Attributes:
        ready: per node, the clock position at which everything it needs exists.
        roots: per node, the storages its value may lie in.
        effects: per node, the storages it overwrites (in-place ops only, else empty).
        packed: the invokes share one pass.
    """

    ready: tuple[int, ...]
    roots: tuple[frozenset[Root], ...]
    effects: tuple[frozenset[Root], ...]
    packed: bool


def shares_pass(graph: Graph, card: ModelCard) -> bool:
    """Whether all invokes of the trace can share one packed pass: the card certifies packing, and every
    site the graph touches is a slice of its packed tensor."""
    if len(graph.regions[0].invokes) == 1:
        return True
    leaves = (site_leaf(card, site) for site in graph.sites().values())
    return card.packs and all(leaf is not None and leaf.packable() for leaf in leaves)


def site_leaf(card: ModelCard, site: Site) -> TensorLeaf | None:
    """The card's leaf for a site, or None where there is none or it is no tensor."""
    call = card.call_index.get((site.module, site.call))
    leaf = call and leaf_at(call.structure(site.kind), site.path)
    return leaf if isinstance(leaf, TensorLeaf) else None


def clock(card: ModelCard, site: Site, packed: bool) -> int:
    """The position at which a site's event happens."""
    call = card.call_index[(site.module, site.call)]
    position = call.exit if site.kind == "output" else call.enter
    return position if packed else position + site.invoke * pass_length(card)


def pass_length(card: ModelCard) -> int:
    """One more than the last position of one pass."""
    return 1 + max((c.exit for c in card.prefill), default=0)


def timeline(graph: Graph, card: ModelCard, bound: Sequence[dict[str, Any] | None]) -> Timeline:
    """Order every node of a graph whose sites are known to exist.

    Args:
        bound: per node of a registry op its bound arguments (specs for tensors), else None.

    Raises:
        OrderError: a write needs a value the model makes only later; names both.
    """
    return _Builder(graph, card).build(bound)


class _Builder:
    """Walks the nodes in program order."""

    def __init__(self, graph: Graph, card: ModelCard) -> None:
        self.graph, self.card = graph, card
        self.packed = shares_pass(graph, card)
        self.ready: list[int] = []
        self.roots: list[frozenset[Root]] = []
        self.effects: list[frozenset[Root]] = []
        self.gets: list[frozenset[int]] = []  # the site.get nodes whose tensor a value may be
        self.waits: list[set[int]] = []  # what a node runs after: the values it takes, and edits of them
        self.written: dict[Root, frozenset[Root]] = {}  # storage of a site -> those of the values set there
        self.last_edit: dict[Root, int] = {}  # storage -> the in-place op that made its latest version

    def build(self, bound: Sequence[dict[str, Any] | None]) -> Timeline:
        for position, node in enumerate(self.graph.nodes):
            needs = set(node.refs())
            edits = {self.last_edit[root] for r in needs for root in self.roots[r] if root in self.last_edit}
            self.waits.append(needs | edits)
            when = max((self.ready[w] for w in self.waits[position]), default=-1)
            roots: frozenset[Root] = frozenset([("node", position)])
            gets: frozenset[int] = frozenset()
            edited: frozenset[Root] = frozenset()
            if node.op in (GET, SET):
                when, roots, gets = self._site(position, node, when)
            elif node.op not in (APPLY, SAVE):
                source, alias = _aliased(node, bound[position])
                if source is not None and alias is not Alias.FRESH:
                    roots = self.roots[source] | (roots if alias is Alias.MAYBE_VIEW else frozenset())
                    gets = self.gets[source]
                if source is not None and alias is Alias.INPLACE:
                    edited = roots
                    self._edit_in_time(position, when, gets)
                    self.last_edit.update(dict.fromkeys(edited, position))
            elif node.op == APPLY and returns_its_input(node.args[0].path, self.card):
                source = next(node.refs())
                roots, gets = self.roots[source], self.gets[source]
            self.ready.append(when)
            self.roots.append(roots)
            self.gets.append(gets)
            self.effects.append(edited)
        return Timeline(tuple(self.ready), tuple(self.roots), tuple(self.effects), self.packed)

    def _site(self, position: int, node: Node, when: int) -> tuple[int, frozenset[Root], frozenset[int]]:
        event = clock(self.card, node.site, self.packed)
        site = _site_root(self.card, node.site)
        roots = frozenset([site])
        if node.op == GET:  # after a write it names the tensor written
            return event, roots | self.written.get(site, roots), frozenset([position])
        if when > event:
            raise self._too_late(position)
        self.written[site] = self.written.get(site, roots).union(*(self.roots[r] for r in node.refs()))
        return event, roots, frozenset([position])

    def _edit_in_time(self, position: int, when: int, gets: frozenset[int]) -> None:
        for get in gets:
            site = self.graph.nodes[get].site
            if when > clock(self.card, site, self.packed):
                raise OrderError(
                    f"this edits {site} in place, but can run only after the model has moved on: it needs "
                    f"{self._latest(position)}. Edit a copy instead: take .clone() of the value first",
                    node=position,
                )

    def _too_late(self, position: int) -> OrderError:
        why = (
            ""
            if self.packed
            else " (these invokes run one after another: they touch sites that cannot share a pass)"
        )
        return OrderError(
            f"{self.graph.nodes[position].site} is written with a value that needs {self._latest(position)}, "
            f"which the model makes only later{why}. "
            "A write can use only what exists when the model reaches it",
            node=position,
        )

    def _latest(self, position: int) -> str:
        """The site that a node waits for longest."""
        reached, stack = {position}, [position]
        best: tuple[int, str] = (-1, "a later value")
        while stack:
            for wait in self.waits[stack.pop()] - reached:
                reached.add(wait)
                stack.append(wait)
                node = self.graph.nodes[wait]
                if node.op == GET and self.ready[wait] > best[0]:
                    best = (self.ready[wait], str(node.site))
        return best[1]


def _site_root(card: ModelCard, site: Site) -> Root:
    leaf = site_leaf(card, site)
    if leaf is not None and leaf.object is not None:
        return ("site", site.invoke, leaf.object)
    return ("site", site.invoke, site.module, site.kind, site.path, site.call)


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

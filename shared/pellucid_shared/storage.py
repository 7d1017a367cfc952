"""Which values may share storage, and when each node can run: the ground of ordering and of versions.

A *clock* position is an event of the model's pass as the card numbers them; -1 is before the pass. Where the
invokes of a trace cannot share one pass they run one after another, and invoke i's clock starts where
invoke i-1's ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    packed = shares_pass(graph, card)
    ready: list[int] = []
    roots: list[frozenset[Root]] = []
    effects: list[frozenset[Root]] = []
    gets: list[frozenset[int]] = []  # the site.get nodes whose tensor a value may be
    replaced: dict[Root, frozenset[Root]] = {}  # storage of a site -> those of the values written to it
    last_effect: dict[Root, int] = {}  # storage -> when its latest version exists
    for position, node in enumerate(graph.nodes):
        needs = list(node.refs())
        versions = (last_effect.get(root, -1) for r in needs for root in roots[r])
        when = max((-1, *(ready[r] for r in needs), *versions))
        own: frozenset[Root] = frozenset([("node", position)])
        seen: frozenset[int] = frozenset()
        written: frozenset[Root] = frozenset()
        if node.op in (GET, SET):
            event = clock(card, node.site, packed)
            if node.op == SET and when > event:
                raise _too_late(graph, ready, position, packed)
            when = event
            site = _site_root(card, node.site)
            own, seen = frozenset([site]), frozenset([position])
            if node.op == SET:  # a later read at this site names the tensor written here
                replaced[site] = replaced.get(site, own).union(*(roots[r] for r in needs))
            else:
                own |= replaced.get(site, own)
        elif node.op not in (APPLY, SAVE):
            source, alias = _aliased(node, bound[position])
            if source is not None and alias is not Alias.FRESH:
                own = roots[source] | (own if alias is Alias.MAYBE_VIEW else frozenset())
                seen = gets[source]
            if source is not None and alias is Alias.INPLACE:
                written = roots[source]
                _edit_in_time(graph, card, ready, position, when, seen, packed)
                for root in written:
                    last_effect[root] = max(when, last_effect.get(root, -1))
        ready.append(when)
        roots.append(own)
        gets.append(seen)
        effects.append(written)
    return Timeline(tuple(ready), tuple(roots), tuple(effects), packed)


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


def _edit_in_time(
    graph: Graph,
    card: ModelCard,
    ready: Sequence[int],
    position: int,
    when: int,
    seen: frozenset[int],
    packed: bool,
) -> None:
    for get in seen:
        site = graph.nodes[get].site
        if when > clock(card, site, packed):
            late = _latest(graph, ready, position)
            raise OrderError(
                f"this edits {site} in place, but can run only after the model has moved on: "
                f"it needs {late}. "
                "Edit a copy instead: take .clone() of the value first",
                node=position,
            )


def _too_late(graph: Graph, ready: Sequence[int], position: int, packed: bool) -> OrderError:
    site, late = graph.nodes[position].site, _latest(graph, ready, position)
    why = (
        "" if packed else " (these invokes run one after another: they touch sites that cannot share a pass)"
    )
    return OrderError(
        f"{site} is written with a value that needs {late}, which the model makes only later{why}. "
        "A write can use only what exists when the model reaches it",
        node=position,
    )


def _latest(graph: Graph, ready: Sequence[int], position: int) -> str:
    """The site that a node waits for longest."""
    reached, stack = {position}, [position]
    best: tuple[int, str] = (-1, "a later value")
    while stack:
        node = graph.nodes[stack.pop()]
        for ref in node.refs():
            if ref in reached:
                continue
            reached.add(ref)
            stack.append(ref)
            if graph.nodes[ref].op == GET and ready[ref] > best[0]:
                best = (ready[ref], str(graph.nodes[ref].site))
    return best[1]

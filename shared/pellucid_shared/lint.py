"""The invariants of a graph that need no model: what holds before anything else looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NoReturn

from .errors import EmptyPromptError, GraphError, LimitError, PellucidError, SiteError
from .graph import APPLY, CORE_OPS, GET, SAVE, SET, Graph, Invoke, Node
from .ops import lookup
from .values import KINDS, ModuleRef, Ref, Site, TensorRef, contains

MAX_NODES = 100_000
MAX_INVOKES = 1024
MAX_ROWS = 4096
MAX_NAME = 200


def lint(graph: Graph) -> None:
    """Check every invariant, in this order.

    1. There is exactly one region, a trace, with 1 to 1024 invokes; no invoke is empty.
    2. There are at most 100,000 nodes; each belongs to a region that exists.
    3. Each op is a core op or in the registry.
    4. Each ref points to an earlier node, and to one that yields a value.
    5. A site is the first argument of site.get and site.set and stands nowhere else; it names an invoke
       that exists, a known kind, step 0 (a trace has one step).
    6. A module is the first argument of module.apply and stands nowhere else.
    7. Save names are strings, not empty, at most 200 characters, and unique.

    Raises:
        GraphError: the first invariant that does not hold; ``node`` names the node.
        LimitError: too many nodes, invokes or rows.
        EmptyPromptError: an invoke without text or ids.
    """
    _lint_regions(graph)
    if len(graph.nodes) > MAX_NODES:
        raise LimitError(f"the graph has {len(graph.nodes)} nodes; at most {MAX_NODES} are taken")
    names: set[str] = set()
    for position, node in enumerate(graph.nodes):
        try:
            _lint_node(graph, position, node)
            if node.op == SAVE:
                name = node.args[1] if len(node.args) > 1 else f"saved_{len(names)}"
                _lint_name(name, names)
                names.add(name)
        except PellucidError as error:
            raise type(error)(f"node {position}: {error.message}", node=position) from None


def _lint_regions(graph: Graph) -> None:
    if len(graph.regions) != 1:
        _bad(f"a graph has one region in this version, found {len(graph.regions)}")
    for region in graph.regions:
        if not region.invokes:
            _bad("a trace has at least one invoke")
        if len(region.invokes) > MAX_INVOKES:
            raise LimitError(f"a trace takes at most {MAX_INVOKES} invokes, found {len(region.invokes)}")
        for index, invoke in enumerate(region.invokes):
            _lint_invoke(index, invoke)


def _lint_invoke(index: int, invoke: Invoke) -> None:
    rows: Sequence[Any] = [invoke.input] if isinstance(invoke.input, str) else invoke.input
    if rows and isinstance(rows[0], int):
        rows = [rows]
    if len(rows) > MAX_ROWS:
        raise LimitError(f"invoke {index} has {len(rows)} rows; at most {MAX_ROWS} are taken")
    if not rows or not all(rows):
        raise EmptyPromptError(f"invoke {index} is empty: give it text or at least one token id")
    if invoke.mask is not None and not all(any(row) for row in invoke.mask):
        _bad(f"invoke {index}: a row of the attention mask hides every token")


def _lint_node(graph: Graph, position: int, node: Node) -> None:
    if node.op not in CORE_OPS:
        lookup(node.op)
    if node.region >= len(graph.regions):
        _bad(f"{node.op} is in region {node.region}, and there are {len(graph.regions)}")
    for ref in node.refs():
        if ref >= position:
            _bad(f"{node.op} takes the value of node {ref}, which is not before it")
        if graph.nodes[ref].op in (SET, SAVE):
            _bad(f"{node.op} takes the value of node {ref}, a {graph.nodes[ref].op}, which yields none")
    first: type | None = Site if node.op in (GET, SET) else ModuleRef if node.op == APPLY else None
    rest = node.args
    if first is not None:
        if not node.args or not isinstance(node.args[0], first):
            _bad(f"{node.op} takes a {'site' if first is Site else 'module'} first")
        rest = node.args[1:]
    for value in (*rest, *node.kwargs.values()):
        if contains(value, (Site, ModuleRef)):
            _bad(f"{node.op} is given a site or module where a value stands")
    _lint_core(graph, node)


def _lint_core(graph: Graph, node: Node) -> None:
    if node.op in (GET, SET):
        site, count = node.site, len(graph.regions[node.region].invokes)
        if site.kind not in KINDS:
            _bad(f"a site's kind is one of {', '.join(KINDS)}, found {site.kind!r}")
        if site.invoke >= count:
            raise SiteError(f"{site} is in invoke {site.invoke}, and the trace has {count}")
        if site.step:
            raise SiteError(f"{site} is at step {site.step}, and a trace has one step, 0")
    arity = {GET: (1, 1), SET: (2, 2), SAVE: (1, 2)}.get(node.op)
    if arity and not (arity[0] <= len(node.args) <= arity[1] and not node.kwargs):
        _bad(f"{node.op} takes {' or '.join(map(str, sorted(set(arity))))} arguments")
    if node.op == SET and not isinstance(node.args[1], Ref | TensorRef | bool | int | float | complex):
        _bad("site.set takes a tensor or a number")
    if node.op == SAVE and contains(node.args[0], (slice, EllipsisType)):
        _bad("save takes tensors, numbers, strings, and lists, tuples and dicts of them")


def _lint_name(name: Any, taken: set[str]) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        _bad(f"a saved name is a string of 1 to {MAX_NAME} characters, found {name!r:.60}")
    if name in taken:
        _bad(f"the name {name!r} is saved twice")


def _bad(message: str) -> NoReturn:
    raise GraphError(message)

"""The invariants of a graph that need no model: what holds before anything else looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NoReturn

from .backward import require_one_pass
from .errors import EmptyPromptError, GradientError, GraphError, LimitError, PellucidError, SiteError
from .flow import each_of, lint_node, lint_region, repeating
from .graph import (
    APPEND,
    APPLY,
    BACKWARD,
    CORE_OPS,
    GET,
    GRAD,
    GRADIENT_OPS,
    LIST,
    LOG,
    ORIGINAL,
    PARAM,
    SAVE,
    SET,
    SET_GRAD,
    SITE_OPS,
    SKIP,
    STOP,
    VOID_OPS,
    Each,
    Graph,
    Invoke,
    Node,
    Trace,
)
from .ops import lookup
from .passing import lint_passing
from .regions import Cond, Loop, above
from .values import INSIDE, KINDS, RESULT, ModuleRef, Ref, Site, TensorRef, contains

MAX_NODES = 100_000
MAX_INVOKES = 1024
MAX_ROWS = 4096
MAX_NAME = 200
MAX_REGIONS = 100_000
#: Fewest and most arguments of the core ops that take a fixed number.
ARITY = {
    GET: (1, 1),
    SET: (2, 2),
    SAVE: (1, 2),
    LIST: (0, 0),
    APPEND: (2, 2),
    ORIGINAL: (1, 1),
    SKIP: (2, 2),
    PARAM: (2, 2),
    STOP: (1, 1),
    BACKWARD: (1, 2),
    GRAD: (2, 2),
    SET_GRAD: (3, 3),
}


def lint(graph: Graph) -> None:
    """Check every invariant, in this order.

    1. There is a trace; it has 1 to 1024 invokes, none empty. A region stands in an earlier one: steps in a
       trace that generates, and they are steps of it; a branch beside its flag and the branch it continues,
       inside a trace; a trace in none, or in a loop that stands in a session.
    2. There are at most 100,000 nodes; each belongs to a region that exists, a branch's behind its flag;
       those of one loop, or one body for several steps, follow each other.
    3. Each op is a core op or in the registry.
    4. Each ref points to an earlier node, and to one that yields a value. What a body for several steps, a
       loop or a branch makes is used inside it alone; it leaves by save, by list.append, by edits in place,
       or carried.
    5. A site is the first argument of site.get, site.original, site.set, module.skip, stop and log (which may
       have null there) and stands nowhere else; it names an invoke that exists, a known kind, and a step of
       its trace. A result is the root's, and read alone. module.skip names a whole output; stop and log the
       root's input, where the pass begins. The path of a call inside a module begins with its name. A stop
       stands in no branch, and in no loop of its trace.
    6. A module is the first argument of module.apply and param.get and stands nowhere else.
    7. Save names are strings, not empty, at most 200 characters, and unique.
    8. A list stands only in list.append and in save.
    9. A log has 1 to 64 parts: values, numbers, strings of at most 1000 characters, and structures of them.
    10. A gradient is that of a node's value, in a backward pass the graph has; neither stands in a trace that
        generates, in a branch, or in a loop.

    Raises:
        GraphError: the first invariant that does not hold; ``node`` names the node.
        LimitError: too many nodes, invokes or rows.
        EmptyPromptError: an invoke without text or ids.
    """
    _lint_regions(graph)
    if len(graph.nodes) > MAX_NODES:
        raise LimitError(f"the graph has {len(graph.nodes)} nodes; at most {MAX_NODES} are taken")
    backwards = sum(node.op == BACKWARD for node in graph.nodes)
    names: set[str] = set()
    left: set[int] = set()  # repeating regions that other nodes have followed
    inside: dict[int, list[int]] = {}  # region -> the repeating ones it stands in
    last: dict[int, int] = {}  # region -> the last step its nodes run in, counted once: steps may be many
    for position, node in enumerate(graph.nodes):
        try:
            _lint_node(graph, position, node)
            if node.at is not None:
                if node.region not in last:
                    last[node.region] = _last_step(graph, node.region)
                _lint_step(graph, node, last[node.region])
            if node.op in GRADIENT_OPS:
                _lint_gradient(graph, node, backwards)
            own = inside.setdefault(node.region, repeating(graph, node.region))
            if position and graph.nodes[position - 1].region != node.region:
                left.update(set(inside[graph.nodes[position - 1].region]) - set(own))
            for region in left.intersection(own):
                _bad(f"the nodes of region {region} do not follow each other")
            if node.op == SAVE:
                name = node.args[1] if len(node.args) > 1 else f"saved_{len(names)}"
                _lint_name(name, names)
                names.add(name)
        except PellucidError as error:
            raise type(error)(f"node {position}: {error.message}", node=position) from None


def _lint_regions(graph: Graph) -> None:
    if not graph.traces:
        _bad("a graph has a trace")
    if len(graph.regions) > MAX_REGIONS:
        raise LimitError(f"a graph takes at most {MAX_REGIONS} regions, found {len(graph.regions)}")
    for index, region in enumerate(graph.regions):
        if isinstance(region, Each):
            _lint_each(graph, index, region)
        lint_region(graph, index)
        if not isinstance(region, Trace):
            continue
        if not region.invokes:
            _bad("a trace has at least one invoke")
        if len(region.invokes) > MAX_INVOKES:
            raise LimitError(f"a trace takes at most {MAX_INVOKES} invokes, found {len(region.invokes)}")
        for number, invoke in enumerate(region.invokes):
            _lint_invoke(number, invoke)


def _lint_each(graph: Graph, index: int, region: Each) -> None:
    parent = graph.regions[region.parent] if region.parent < index else None
    if not isinstance(parent, Trace):
        _bad(f"region {index} stands in region {region.parent}, which is no earlier trace")
    if parent.generation is None:
        _bad(f"region {index} is for steps of region {region.parent}, which does not generate")
    if not isinstance(region.steps, slice):
        steps = region.of(parent.steps)
        if len(set(steps)) < len(steps):
            _bad(f"region {index} names a step twice")
        wrong = [step for step in steps if not 0 <= step < parent.steps]
        if wrong:
            _bad(f"region {index} is for step {wrong[0]} of a generation of {parent.steps} steps (from 0)")
    elif region.steps.step == 0:
        _bad(f"region {index} is for a slice of steps with step 0")
    if region.optional and not region.single:
        _bad(f"region {index} is for several steps: that it is optional goes without saying")


def _lint_invoke(index: int, invoke: Invoke) -> None:
    if invoke.tensors is not None:
        return
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
    if not 0 <= node.region < len(graph.regions):
        _bad(f"{node.op} is in region {node.region}, and there are {len(graph.regions)}")
    for ref in node.refs():
        if ref >= position:
            _bad(f"{node.op} takes the value of node {ref}, which is not before it")
        source = graph.nodes[ref]
        if source.op in VOID_OPS:
            _bad(f"{node.op} takes the value of node {ref}, a {source.op}, which yields none")
        if source.op == LIST and node.op not in (APPEND, SAVE):
            _bad(f"{node.op} takes the list of node {ref}; a list is appended to and saved")
    first: type | None = None
    if node.op in SITE_OPS:
        first = Site
    elif node.op in (APPLY, PARAM):
        first = ModuleRef
    rest = node.args
    if first is not None and not (node.op == LOG and node.args[:1] == (None,)):
        if not node.args or not isinstance(node.args[0], first):
            _bad(f"{node.op} takes a {'site' if first is Site else 'module'} first")
        rest = node.args[1:]
    for value in (*rest, *node.kwargs.values()):
        if contains(value, (Site, ModuleRef)):
            _bad(f"{node.op} is given a site or module where a value stands")
    lint_node(graph, position, node)
    _lint_core(graph, node)
    if node.op == STOP:
        _lint_stop(graph, node)


def _lint_core(graph: Graph, node: Node) -> None:
    if node.at is not None:
        _lint_site(graph, node)
    arity = ARITY.get(node.op)
    if arity and not (arity[0] <= len(node.args) <= arity[1] and not node.kwargs):
        _bad(f"{node.op} takes {' or '.join(map(str, sorted(set(arity))))} arguments")
    if node.op == APPEND and not (
        isinstance(node.args[0], Ref) and graph.nodes[node.args[0].node].op == LIST
    ):
        _bad("list.append takes a list first")
    if node.op == SET and not isinstance(node.args[1], Ref | TensorRef | bool | int | float | complex):
        _bad("site.set takes a tensor or a number")
    if node.op == SAVE and contains(node.args[0], (slice, EllipsisType)):
        _bad("save takes tensors, numbers, strings, and lists, tuples and dicts of them")
    lint_passing(node)


def _lint_stop(graph: Graph, node: Node) -> None:
    for found in above(graph.regions, node.region):
        if isinstance(graph.regions[found], Trace):
            break
        if isinstance(graph.regions[found], Cond | Loop):
            _bad(
                "stop stands in no branch and in no loop of its trace: where a pass ends is known before it "
                "runs. Stop behind it"
            )


def _lint_gradient(graph: Graph, node: Node, count: int) -> None:
    if not isinstance(node.args[0], Ref):
        _bad(f"{node.op} takes the value of a node first")
    if any(isinstance(graph.regions[r], Cond | Loop) for r in above(graph.regions, node.region)):
        raise GradientError(
            "gradients are not taken inside a branch or a loop: how many backward passes there are must be "
            "known. Write .backward() and .grad behind it, on a value that was carried or selected, or let a "
            "Python loop write each pass"
        )
    trace = graph.regions[graph.trace_of(node.region)]
    if graph.trace_of(node.region) < 0 or not isinstance(trace, Trace):
        raise GradientError("a backward pass is that of a trace; this stands outside all of them")
    require_one_pass(trace)
    if node.op == BACKWARD:
        return
    number = node.args[1]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        _bad(f"{node.op} takes the number of a backward pass second, found {number!r:.60}")
    if number >= count:
        raise GradientError(
            "there is no backward pass for this gradient; write loss.backward() in the trace, before or "
            "after it"
            if not count
            else f"this is a gradient of backward pass {number} (from 0), and the graph has {count}; write "
            "loss.backward() in the trace, before or after it"
        )
    if node.op == SET_GRAD and not isinstance(node.args[2], Ref | TensorRef | bool | int | float | complex):
        _bad("grad.set takes a tensor or a number third")


def _lint_site(graph: Graph, node: Node) -> None:
    site = node.site
    trace = graph.regions[graph.trace_of(node.region)]
    if graph.trace_of(node.region) < 0 or not isinstance(trace, Trace):
        _bad(f"{site} stands outside all traces")
    count = len(trace.invokes)
    if site.kind not in KINDS:
        _bad(f"a site's kind is one of {', '.join(KINDS)}, found {site.kind!r}")
    if site.kind in INSIDE and not (site.path and isinstance(site.path[0], str)):
        _bad(f"the path of a {site.kind} begins with the name of the call, found {list(site.path)!r:.60}")
    if site.invoke >= count:
        raise SiteError(f"{site} is in invoke {site.invoke}, and the trace has {count}")
    if site.kind == RESULT and (site != Site("", RESULT, invoke=site.invoke) or node.op != GET):
        _bad("a trace's result is read, at the root, and has no parts")
    if site.kind == RESULT and trace.generation is None:
        _bad("a trace that does not generate has no result; read the model's output")
    if not trace.generation and site.step:
        raise SiteError(f"{site} is at step {site.step}, and a trace has one step, 0")


def _lint_step(graph: Graph, node: Node, last: int) -> None:
    trace = graph.regions[graph.trace_of(node.region)]
    assert isinstance(trace, Trace)
    if last + node.site.step >= trace.steps:
        raise SiteError(
            f"{node.site} is at step {last + node.site.step}, and the generation has {trace.steps} (from 0)"
        )


def _last_step(graph: Graph, region: int) -> int:
    """The last step that a region's nodes run in, where they name step 0; of a body for none, 0."""
    each, trace = each_of(graph, region), graph.regions[graph.trace_of(region)]
    if each is None:
        return 0
    assert isinstance(trace, Trace)
    return max(each.of(trace.steps), default=0)


def _lint_name(name: Any, taken: set[str]) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        _bad(f"a saved name is a string of 1 to {MAX_NAME} characters, found {name!r:.60}")
    if name in taken:
        _bad(f"the name {name!r} is saved twice")


def _bad(message: str) -> NoReturn:
    raise GraphError(message)

"""Control flow: the ops that branches and loops are written with, what each yields, and their invariants.

    loop.index()                  the number of the turn, from 0, of the innermost loop
    list.pick(list, number)       a member of a list
    number.add(a, b), ...         arithmetic of numbers that each turn knows, and comparisons of them
    cond.flag(value)              whether a one-element value is true, taken here and now
    loop.while(flag)              the innermost loop ends here, before this turn, unless the flag holds
    loop.until(flag)              the innermost loop ends here if the flag holds
    carry.new(value)              what a loop carries from turn to turn, before its first turn
    carry.get(carry)              what it is now
    carry.set(carry, value)       what it is from here on

Numbers are known when a graph is written out (``flat.py``): no op of a run sees any but constants. There
three further ops stand, which no graph may name:

    flow.either(flags, a, b)      a where all of the flags are as wanted, else b
    flow.kept(value)              the value itself, where its guards hold
    flow.bound(count)             an error: a loop has not ended itself in so many turns
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import GraphError, LimitError, OpArgumentError, ShapeError
from .regions import Cond, Each, Loop, Trace, above, closing
from .specs import Dim, Spec, TensorSpec, same_size
from .values import INT_LIMIT, Ref

if TYPE_CHECKING:
    from .graph import Graph, Node

INDEX, PICK, FLAG = "loop.index", "list.pick", "cond.flag"
WHILE, UNTIL = "loop.while", "loop.until"
CARRY, CARRIED, CARRY_SET = "carry.new", "carry.get", "carry.set"
EITHER, KEPT, BOUND = "flow.either", "flow.kept", "flow.bound"

NUMBERS: dict[str, Callable[..., Any]] = {
    "number.add": operator.add,
    "number.sub": operator.sub,
    "number.mul": operator.mul,
    "number.div": operator.truediv,
    "number.floordiv": operator.floordiv,
    "number.mod": operator.mod,
    "number.neg": operator.neg,
    "number.eq": operator.eq,
    "number.ne": operator.ne,
    "number.lt": operator.lt,
    "number.le": operator.le,
    "number.gt": operator.gt,
    "number.ge": operator.ge,
}
#: Those a graph may name.
FLOW_OPS = frozenset((INDEX, PICK, FLAG, WHILE, UNTIL, CARRY, CARRIED, CARRY_SET, *NUMBERS))
#: Those a written-out graph has beside ``cond.flag``.
FLAT_OPS = frozenset((EITHER, KEPT, BOUND))
_YIELD_NOTHING = (WHILE, UNTIL, CARRY_SET)

MAX_TURNS = 1_000_000
MAX_NESTING = 32

_ARITY = {INDEX: 0, PICK: 2, FLAG: 1, WHILE: 1, UNTIL: 1, CARRY: 1, CARRIED: 1, CARRY_SET: 2}


def calculate(op: str, args: Sequence[Any]) -> Any:
    """The value of an op on numbers.

    Raises:
        OpArgumentError: it has none, or none that fits in 64 bits.
    """
    for value in args:
        if not isinstance(value, bool | int | float):
            raise OpArgumentError(f"{op} takes numbers that a turn knows, found a {_kind(value)}")
    try:
        found = NUMBERS[op](*args)
    except ArithmeticError as error:
        raise OpArgumentError(f"{op} of {', '.join(map(repr, args))}: {error}") from None
    if isinstance(found, int) and not -INT_LIMIT <= found < INT_LIMIT:
        raise OpArgumentError(f"{op} of {', '.join(map(repr, args))} does not fit in 64 bits")
    return found


def pick(members: Any, index: Any) -> Any:
    """A member of a list.

    Raises:
        OpArgumentError: no list, or no such member.
    """
    whole = isinstance(index, int) and not isinstance(index, bool)
    if not isinstance(members, list | tuple) or not whole or not -len(members) <= index < len(members):
        raise OpArgumentError(f"{PICK} takes a list and the number of a member, found {index!r:.60}")
    return members[index]


def truth(value: Any) -> bool | None:
    """Whether a number is true; None for a value that only the run knows.

    Raises:
        ShapeError: it has not one element.
    """
    if isinstance(value, TensorSpec):
        if isinstance(value.numel, Dim) or value.numel != 1 or any(isinstance(s, Dim) for s in value.shape):
            raise ShapeError(
                f"a condition is one element, found shape {list(value.shape)}; say what of it counts: "
                ".any(), .all(), or an index"
            )
        return None
    if not isinstance(value, bool | int | float):
        raise ShapeError(f"a condition is a value of one element, or True or False, found a {_kind(value)}")
    return bool(value)


def infer(op: str, args: Sequence[Any]) -> Spec:
    """What an op of control flow yields: a spec, or a number itself; a loop's is that of its first turn.

    Raises:
        GraphError: the arguments do not fit.
    """
    if op == INDEX:
        return 0
    if op in NUMBERS:
        found: Spec = calculate(op, args)
        return found
    if op == PICK:
        return pick(*args)  # type: ignore[no-any-return]
    if op == FLAG:
        return truth(args[0])
    if op == CARRY:
        return _carried(args[0])
    if op in (CARRIED, KEPT):
        return args[0]  # type: ignore[no-any-return]
    if op == CARRY_SET:
        _same(args[0], _carried(args[1]))
        return None
    if op == EITHER:
        new, old = args[1:]
        _same(old, new)
        return old  # type: ignore[no-any-return]
    return None


def _carried(value: Any) -> TensorSpec:
    if isinstance(value, TensorSpec):
        return value
    if not isinstance(value, bool | int | float):
        raise ShapeError(f"a loop carries tensors and numbers, found a {_kind(value)}; carry each by itself")
    dtype = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float32"
    return TensorSpec((), dtype)


def _same(old: TensorSpec, new: TensorSpec) -> None:
    if old.dtype != new.dtype or old.ndim != new.ndim or not all(map(same_size, old.shape, new.shape)):
        raise ShapeError(
            f"what a loop carries keeps its shape and dtype: {list(old.shape)} {old.dtype} was given "
            f"{list(new.shape)} {new.dtype}"
        )


def _kind(value: Any) -> str:
    return f"tensor of shape {list(value.shape)}" if isinstance(value, TensorSpec) else type(value).__name__


# --- invariants --------------------------------------------------------------------------------------------


def lint_region(graph: Graph, index: int) -> None:
    """The invariants of one region's place: what it stands in, and what it continues.

    Raises:
        GraphError: one does not hold.
        LimitError: too many turns, or nested too deep.
    """
    region = graph.regions[index]
    parent = getattr(region, "parent", None)
    if parent is not None and parent >= index:
        _bad(f"region {index} stands in region {parent}, which is no earlier one")
    if sum(1 for _ in above(graph.regions, index)) > MAX_NESTING:
        raise LimitError(f"region {index} is nested deeper than {MAX_NESTING}")
    outside = graph.trace_of(index) < 0
    if isinstance(region, Trace) and parent is not None:
        if not isinstance(graph.regions[parent], Loop) or graph.trace_of(parent) >= 0:
            _bad(f"trace {index} stands in region {parent}, which is no loop of a session")
        loops = (graph.regions[r] for r in above(graph.regions, parent))
        if not all(loop.count for loop in loops if isinstance(loop, Loop)):
            _bad(f"trace {index} stands in a loop without turns")
    if isinstance(region, Loop) and region.count > MAX_TURNS:
        raise LimitError(f"a loop takes at most {MAX_TURNS} turns, found {region.count}")
    if isinstance(region, Cond):
        _lint_cond(graph, index, region)
    if isinstance(region, Cond) and outside:
        _bad(f"region {index} is a branch outside all traces")


def _lint_cond(graph: Graph, index: int, region: Cond) -> None:
    if region.flag is not None:
        node = graph.nodes[region.flag] if region.flag < len(graph.nodes) else None
        if node is None or node.op != FLAG or node.region != region.parent:
            _bad(f"region {index} is a branch on node {region.flag}, which is no flag taken beside it")
    elif region.after is None:
        _bad(f"region {index} is a branch without a flag that continues none")
    if region.after is not None:
        before = graph.regions[region.after] if region.after < index else None
        if not isinstance(before, Cond) or before.parent != region.parent or before.flag is None:
            _bad(f"region {index} continues region {region.after}, which is no earlier branch beside it")


def lint_node(graph: Graph, position: int, node: Node) -> None:
    """The invariants of one node that is written with control flow, or inside it.

    Raises:
        GraphError: one does not hold.
    """
    for found in above(graph.regions, node.region):
        region = graph.regions[found]
        if isinstance(region, Cond) and region.flag is not None and region.flag >= position:
            _bad(f"it is in region {found}, whose flag is not before it")
    for ref in node.refs():
        source = graph.nodes[ref]
        if source.op in _YIELD_NOTHING:
            _bad(f"{node.op} takes the value of node {ref}, a {source.op}, which yields none")
        if source.op == FLAG and node.op not in (WHILE, UNTIL):
            _bad(f"{node.op} takes the flag of node {ref}; a flag is for branches and loops")
        if source.op == CARRY and not (node.op in (CARRIED, CARRY_SET) and node.args[0] == Ref(ref)):
            _bad(f"{node.op} takes node {ref}, a {CARRY}; carry.get gives its value")
        _lint_scope(graph, node, ref)
    if node.op in FLOW_OPS:
        _lint_op(graph, node)


def _lint_scope(graph: Graph, node: Node, ref: int) -> None:
    """What a branch, a turn or a step makes is used inside it alone."""
    source = graph.nodes[ref]
    region = source.region
    if source.op == CARRY:  # made in its loop, and used behind it too
        region = getattr(graph.regions[region], "parent", region)
    outside = set(closing(graph.regions, region)) - set(above(graph.regions, node.region))
    if node.op == CARRY:
        inside = set(closing(graph.regions, region)) & {node.region}
        if inside:
            _bad("a loop carries what was made before its first turn")
    if not outside:
        return
    made = graph.regions[max(outside)]
    if isinstance(made, Cond):
        _bad(
            f"{node.op} takes the value of node {ref}, which one branch alone makes; outside of it use "
            "tracer.select(flag, a, b), an edit in place of a value from before, a list, or save it there"
        )
    if isinstance(made, Loop):
        _bad(
            f"{node.op} takes the value of node {ref}, which a loop makes in each turn; carry it "
            "(acc = loop.carry(start), acc.set(value)), append it to a list, or save it in the loop"
        )
    _bad(
        f"{node.op} takes the value of node {ref}, which a body for several steps makes in each; "
        "append it to a list, or save it in the body"
    )


def _lint_op(graph: Graph, node: Node) -> None:
    arity = _ARITY.get(node.op, 1 if node.op == "number.neg" else 2)
    if len(node.args) != arity or node.kwargs:
        _bad(f"{node.op} takes {arity} arguments")
    loop = graph.regions[node.region]
    if node.op in (WHILE, UNTIL, CARRY) and not isinstance(loop, Loop):
        _bad(f"{node.op} stands in the body of a loop itself, not in a branch or in steps inside")
    if node.op == WHILE and isinstance(loop, Loop) and not loop.bounded:
        _bad(f"{node.op} stands in a loop with a bound")
    if node.op == INDEX and outer_loop(graph, node.region) is None:
        _bad(f"{node.op} stands in a loop")
    if node.op in (WHILE, UNTIL):
        flag = node.args[0]
        if not isinstance(flag, Ref) or graph.nodes[flag.node].op != FLAG:
            _bad(f"{node.op} takes a flag")
        if graph.nodes[flag.node].region != node.region:
            _bad(f"{node.op} takes a flag taken in the same turn")
    if node.op in (CARRIED, CARRY_SET):
        carry = node.args[0]
        if not isinstance(carry, Ref) or graph.nodes[carry.node].op != CARRY:
            _bad(f"{node.op} takes a carry first")
        if node.op == CARRY_SET and graph.nodes[carry.node].region not in above(graph.regions, node.region):
            _bad("what a loop carries is set in its body")


def repeating(graph: Graph, region: int) -> list[int]:
    """The loops and bodies for several steps that a region is or stands in, from inside to outside."""
    return [r for r in closing(graph.regions, region) if not isinstance(graph.regions[r], Cond)]


def outer_loop(graph: Graph, region: int) -> int | None:
    """The innermost loop that a region is or stands in."""
    return next((r for r in above(graph.regions, region) if isinstance(graph.regions[r], Loop)), None)


def each_of(graph: Graph, region: int) -> Each | None:
    """The body for steps that a region is or stands in."""
    found = (graph.regions[r] for r in above(graph.regions, region))
    return next((r for r in found if isinstance(r, Each)), None)


def _bad(message: str) -> NoReturn:
    raise GraphError(message)

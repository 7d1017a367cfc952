"""Shape, dtype and cost rules that the families of ops share, and ``define``, which registers an op.

Rules here raise messages without an op's name; ``define`` puts the id before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from ..errors import GraphError, IndexOutOfRangeError, LimitError, OpArgumentError, ShapeError
from ..specs import DTYPES, Dim, TensorSpec, broadcast, promote_operands
from .registry import MAX_NUMEL, MAX_RANK, Alias, Bound, Cost, Kind, Op, Param, register

Rule: TypeAlias = Callable[[Bound], Any]
CostRule: TypeAlias = Callable[[Bound, Any], Cost]
Shape: TypeAlias = tuple[int, ...]
DTypeRule: TypeAlias = Callable[[str], str]

#: Operations per element of functions that hardware has no single instruction for.
TRANSCENDENTAL = 10

INPUT = Param("input", Kind.TENSOR)
OTHER = Param("other", Kind.OPERAND)
DIM = Param("dim", Kind.INT)
KEEPDIM = Param("keepdim", Kind.BOOL, False)
DTYPE = Param("dtype", Kind.DTYPE, None, optional=True, keyword_only=True)

_SPACES = {
    "torch": "torch.",
    "Tensor": "torch.Tensor.",
    "F": "torch.nn.functional.",
    "special": "torch.special.",
    "linalg": "torch.linalg.",
}
#: Letters for kinds of dtype, by promotion category: bool, integer, floating, complex.
_LETTERS = "bifc"
_WORDS = ("bool", "integer", "floating", "complex")


def define(
    op_id: str,
    params: Sequence[Param],
    rule: Rule,
    cost: CostRule,
    *,
    alias: Alias = Alias.FRESH,
    aliases: str = "input",
    spellings: tuple[str, ...] = (),
    fields: tuple[str, ...] = (),
    kernel: str = "",
    random: bool = False,
    alias_rule: Callable[[Bound], Alias] | None = None,
) -> Op:
    """Register an op whose errors name it and whose results keep to ``MAX_NUMEL`` and ``MAX_RANK``."""

    def named(bound: Bound) -> Any:
        try:
            result = rule(bound)
            for spec in specs_in(result):
                within_limits(spec)
            return result
        except (GraphError, LimitError) as error:
            raise type(error)(f"{op_id}: {error.message}") from None

    return register(
        Op(op_id, tuple(params), named, cost, alias, aliases, spellings, fields, kernel, random, alias_rule),
    )


def define_pair(
    name: str,
    params: Sequence[Param],
    rule: Rule,
    *,
    weight: int = 1,
    also: tuple[str, ...] = (),
    spaces: tuple[str, ...] = (),
) -> None:
    """Register ``torch.<name>`` and its in-place method ``tensor.<name>_``.

    Args:
        weight: operations per element.
        also: torch's other names for the same functions (``multiply`` for ``mul``).
        spaces: further namespaces that hold the function under ``name``.
    """
    names = (name, *also)
    functions = [s for n in names for s in spelled(n, "torch", "Tensor")]
    methods = [s for n in names for s in spelled(n + "_", "Tensor")]
    define(
        f"torch.{name}",
        params,
        rule,
        per_result(weight),
        spellings=(*functions, *spelled(name, *spaces)),
    )
    define(
        f"tensor.{name}_",
        [INPUT, *params[1:]],
        inplace(rule),
        in_place(weight),
        alias=Alias.INPLACE,
        spellings=tuple(methods),
    )


def spelled(name: str, *spaces: str) -> tuple[str, ...]:
    """Dotted names of ``name`` in ``torch``, ``Tensor``, ``F``, ``special`` or ``linalg``."""
    return tuple(_SPACES[space] + name for space in spaces)


def specs_in(value: Any) -> Iterator[TensorSpec]:
    """The tensor specs in a structure, in order."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from specs_in(member)


def within_limits(spec: TensorSpec) -> None:
    """Raise LimitError for a tensor no graph may make."""
    if spec.numel > MAX_NUMEL:
        raise LimitError(
            f"the result {spec} holds {int(spec.numel)} elements; at most {MAX_NUMEL} are allowed"
        )
    if spec.ndim > MAX_RANK:
        raise LimitError(f"the result has {spec.ndim} dimensions; at most {MAX_RANK} are allowed")


# --- dtypes ------------------------------------------------------------------------------------------------


def category(dtype: str) -> int:
    """0 bool, 1 integer, 2 floating, 3 complex."""
    return DTYPES[dtype].category


def number_category(value: complex) -> int:
    """The category a Python number brings."""
    if isinstance(value, bool):
        return 0
    return 1 if isinstance(value, int) else 2 if isinstance(value, float) else 3


def same(dtype: str) -> str:
    return dtype


def to_float(dtype: str) -> str:
    """Integers and bools become the default dtype."""
    return dtype if category(dtype) >= 2 else "float32"


def to_bool(dtype: str) -> str:
    return "bool"


def to_int64(dtype: str) -> str:
    return "int64"


def to_sum(dtype: str) -> str:
    """What sums of integers and bools are kept in."""
    return dtype if category(dtype) >= 2 else "int64"


def to_real(dtype: str) -> str:
    """The dtype of a complex dtype's parts; others stay."""
    return {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def take(dtype: str, takes: str) -> str:
    """``dtype``, or ShapeError unless its kind's letter (``b``, ``i``, ``f``, ``c``) is in ``takes``."""
    if _LETTERS[category(dtype)] not in takes:
        allowed = " or ".join(word for letter, word in zip(_LETTERS, _WORDS, strict=True) if letter in takes)
        raise ShapeError(f"takes {allowed} tensors, found {dtype}; convert it with .to()")
    return dtype


def same_dtype(*tensors: TensorSpec) -> str:
    """The one dtype of all tensors, or ShapeError."""
    found = {t.dtype for t in tensors}
    if len(found) > 1:
        listed = " and ".join(t.dtype for t in tensors)
        raise ShapeError(f"takes tensors of one dtype, found {listed}; convert one with .to()")
    return tensors[0].dtype


def result_dtype(*operands: Any) -> str:
    """torch.result_type over tensors and numbers."""
    dtype = promote_operands(operands)
    if dtype not in DTYPES:
        raise ShapeError(f"the operands meet at {dtype}, which is not carried; convert one with .to()")
    return dtype


# --- shapes ------------------------------------------------------------------------------------------------


def shown(*shapes: Sequence[int]) -> str:
    """Shapes for a message: ``[2, 3] and [4, 3]``."""
    return " and ".join(f"[{', '.join(map(repr, shape))}]" for shape in shapes)


def broadcast_all(*operands: Any) -> Shape:
    """The shape all operands broadcast to; numbers have none.

    Raises:
        ShapeError: they do not; prints every shape.
        OpArgumentError: no operand is a tensor.
    """
    shapes = [o.shape for o in operands if isinstance(o, TensorSpec)]
    if not shapes:
        raise OpArgumentError("at least one operand is a tensor, found numbers only")
    result = broadcast(*shapes)
    if result is None:
        raise ShapeError(f"shapes {shown(*shapes)} do not broadcast")
    return result


def axis(dim: int, shape: Sequence[int], *, extra: int = 0) -> int:
    """``dim`` counted from the front; ``extra=1`` where a new axis may be last (``unsqueeze``, ``stack``).

    A tensor without dimensions takes 0 and -1, as torch has it.

    Raises:
        IndexOutOfRangeError: names the range.
    """
    rank = len(shape) + extra or 1
    if not -rank <= dim < rank:
        raise IndexOutOfRangeError(
            f"dim {dim} is out of range [{-rank}, {rank - 1}] for a tensor of shape {shown(shape)}"
        )
    return dim % rank


def axes(dims: Sequence[int] | int | None, shape: Sequence[int]) -> tuple[int, ...]:
    """Each dim counted from the front; None or empty means all.

    Raises:
        IndexOutOfRangeError: as :func:`axis`.
        OpArgumentError: a dim appears twice.
    """
    if isinstance(dims, int):
        dims = (dims,)
    if not dims:
        return tuple(range(len(shape)))
    found = tuple(axis(dim, shape) for dim in dims)
    if len(set(found)) != len(found):
        raise OpArgumentError(f"dim {list(dims)} names a dimension twice")
    return found


def reduced(shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> Shape:
    """``shape`` with ``dims`` (counted from the front) removed, or kept as 1."""
    if keepdim:
        return tuple(1 if i in dims else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in dims)


def new_shape(sizes: Sequence[int]) -> Shape:
    """Sizes of a tensor to be made; raises OpArgumentError on a negative one."""
    if any(size < 0 for size in sizes):
        raise OpArgumentError(f"sizes are not negative, found {shown(sizes)}")
    return tuple(sizes)


def is_empty(size: int) -> bool:
    """Whether a size is known to be zero."""
    return size == 0 and not isinstance(size, Dim)


# --- rules -------------------------------------------------------------------------------------------------


def pointwise(*names: str, dtype: DTypeRule = same, takes: str = "bifc") -> Rule:
    """Operands ``names`` broadcast; their common dtype, of a kind in ``takes``, goes through ``dtype``."""

    def rule(bound: Bound) -> TensorSpec:
        operands = [bound[name] for name in names if bound[name] is not None]
        shape = broadcast_all(*operands)
        return TensorSpec(shape, dtype(take(result_dtype(*operands), takes)))

    return rule


def inplace(rule: Rule) -> Rule:
    """``rule``'s result must fit into ``input`` without changing its shape or the kind of its dtype."""

    def fitted(bound: Bound) -> TensorSpec:
        target: TensorSpec = bound["input"]
        result: TensorSpec = rule(bound)
        if result.shape != target.shape:
            raise ShapeError(
                f"the result has shape {shown(result.shape)}, which does not fit in place into "
                f"{shown(target.shape)}"
            )
        castable(result.dtype, target.dtype)
        return target

    return fitted


def castable(source: str, target: str) -> None:
    """Raise ShapeError unless a result may be stored in place (torch.can_cast)."""
    if category(source) > category(target):
        raise ShapeError(f"the result is {source} and does not fit in place into {target}")


def reduction(dtype: DTypeRule = same, takes: str = "bifc") -> Rule:
    """Reduce ``input`` over ``dim`` (absent, None, one or several); ``keepdim`` and ``dtype`` where bound."""

    def rule(bound: Bound) -> TensorSpec:
        x: TensorSpec = bound["input"]
        shape = reduced(x.shape, axes(bound.get("dim"), x.shape), bound.get("keepdim", False))
        wanted = bound.get("dtype")
        take(wanted or x.dtype, takes)
        return TensorSpec(shape, wanted or dtype(x.dtype))

    return rule


# --- costs -------------------------------------------------------------------------------------------------


def per_result(weight: int = 1) -> CostRule:
    """``weight`` operations per element of the result, which is newly allocated."""

    def cost(bound: Bound, result: Any) -> Cost:
        made = list(specs_in(result))
        return Cost(weight * sum(int(s.numel) for s in made), sum(s.nbytes for s in made))

    return cost


def per_input(weight: int = 1) -> CostRule:
    """``weight`` operations per element of the tensors given; the result is newly allocated."""

    def cost(bound: Bound, result: Any) -> Cost:
        given = sum(int(s.numel) for value in bound.values() for s in specs_in(value))
        return Cost(weight * given, sum(s.nbytes for s in specs_in(result)))

    return cost


def in_place(weight: int = 1) -> CostRule:
    """``weight`` operations per element of the result; nothing is allocated."""

    def cost(bound: Bound, result: Any) -> Cost:
        return Cost(weight * sum(int(s.numel) for s in specs_in(result)), 0)

    return cost


def free(bound: Bound, result: Any) -> Cost:
    """A view: nothing computed, nothing allocated."""
    return Cost(0, 0)

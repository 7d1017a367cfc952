"""``x[index]`` and ``x[index] = value``: what torch's indexing grammar selects, and of what shape.

The rules are those of torch's ``python_variable_indexing.cpp``: whole numbers and 0-d integer tensors select,
slices narrow, ``None`` adds an axis (all three give views); tensors and lists gather (a copy). The gathered
axes stand where the tensors stood if these are neighbours, and first otherwise. A boolean tensor stands for
the index tensors of its true elements, of which there are at most as many as it has elements: a ``Dim``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import IndexOutOfRangeError, OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, broadcast, same_size
from .registry import Alias, Bound, Cost, Kind, Param, describe
from .rules import Shape, category, define, free, shown, specs_in

_INDEX_DTYPES = ("int64", "int32", "bool")

#: The largest magnitude torch converts to each dtype without complaint.
_MOST = {
    "uint8": 255,
    "int8": 127,
    "int16": 2**15 - 1,
    "int32": 2**31 - 1,
    "int64": 2**63 - 1,
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
    "float64": 1.7976931348623157e308,
    "complex64": 3.4028234663852886e38,
    "complex128": 1.7976931348623157e308,
}


@dataclass(frozen=True, slots=True)
class Indexed:
    """What an index selects: the shape, and whether it is gathered (a copy) rather than viewed."""

    shape: Shape
    gathered: bool


@dataclass(frozen=True, slots=True)
class _Gather:
    """One index tensor in its place among the axes."""

    shape: Shape


def indexed(shape: Sequence[int], index: Any) -> Indexed:
    """The shape of ``x[index]`` for an ``x`` of ``shape``.

    Raises:
        OpArgumentError: a part that is no index.
        IndexOutOfRangeError: a constant past the end of its axis, or more parts than axes.
        ShapeError: a mask that does not have the shape of its axes, index tensors that do not broadcast.
    """
    parts = _expanded(shape, index if isinstance(index, tuple) else (index,))
    result: list[int | _Gather] = []
    axis = 0
    for part in parts:
        if part is None:
            result.append(1)
        elif isinstance(part, slice):
            result.append(sliced(shape[axis], part))
            axis += 1
        elif isinstance(part, int):
            in_range(part, shape, axis)
            axis += 1
        elif part.dtype == "bool":
            masked = tuple(shape[axis : axis + part.ndim])
            if len(masked) != part.ndim or not all(map(same_size, masked, part.shape)):
                raise ShapeError(
                    f"a mask of shape {shown(part.shape)} does not fit the axes {shown(masked)} it selects "
                    f"from, of a tensor of shape {shown(shape)}"
                )
            # A mask of k axes stands for k index tensors; a 0-d one for an index into a new axis.
            result += [_Gather((Dim(part.numel),))] * max(part.ndim, 1)
            axis += part.ndim
        elif part.ndim == 0:
            axis += 1
        else:
            if part.numel and shape[axis] == 0 and not isinstance(shape[axis], Dim):
                raise IndexOutOfRangeError(f"axis {axis} of a tensor of shape {shown(shape)} is empty")
            result.append(_Gather(part.shape))
            axis += 1
    return _placed(result)


def sliced(size: int, part: slice) -> int:
    """How many of ``size`` elements a slice takes; a bound if the size is one."""
    if part.step is not None and part.step < 1:
        raise OpArgumentError(f"a slice's step is at least 1, found {part.step}; use torch.flip to reverse")
    if not isinstance(size, Dim):
        return len(range(*part.indices(size)))
    if part.start is None or part.start >= 0:
        return Dim(len(range(*part.indices(int(size)))))
    # Counted from an end that is not known: no more than lies behind the start.
    return Dim(len(range(0, min(int(size), -part.start), part.step or 1)))


def in_range(index: int, shape: Sequence[int], axis: int) -> None:
    """Raise IndexOutOfRangeError, naming axis, size and index, unless ``-size <= index < size``."""
    size = int(shape[axis])
    if not -size <= index < size:
        most = "at most " if isinstance(shape[axis], Dim) else ""
        raise IndexOutOfRangeError(
            f"index {index} is out of range for axis {axis} of size {most}{size}, "
            f"in a tensor of shape {shown(shape)}"
        )


def is_gathered(index: Any) -> bool:
    """Whether an index makes a copy: it holds a list, a mask, or an index tensor with axes."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list) or (isinstance(part, TensorSpec) and (part.ndim > 0 or part.dtype == "bool"))
        for part in parts
    )


def _expanded(shape: Sequence[int], parts: tuple[Any, ...]) -> list[Any]:
    """The parts with lists as specs and ``...`` spelled out, so that every axis has its part."""
    if len(parts) == 1 and isinstance(parts[0], list) and any(isinstance(m, list) for m in parts[0]):
        raise OpArgumentError("a list of lists is no index by itself; write x[a, b] or x[torch.tensor(..)]")
    used = 0
    found: list[Any] = []
    for part in parts:
        if isinstance(part, list):
            part = _listed(part, shape, used)
        if isinstance(part, TensorSpec):
            if part.dtype not in _INDEX_DTYPES:
                raise ShapeError(f"an index tensor is int64, int32 or bool, found {part.dtype}")
            used += part.ndim if part.dtype == "bool" else 1
        elif isinstance(part, slice):
            ends = (part.start, part.stop, part.step)
            if not all(e is None or (isinstance(e, int) and not isinstance(e, bool)) for e in ends):
                raise OpArgumentError("a slice's ends are whole numbers or None, not values of the run")
            used += 1
        elif isinstance(part, int) and not isinstance(part, bool):
            used += 1
        elif part is not None and part is not Ellipsis:
            raise OpArgumentError(
                "an index is made of whole numbers, slices, None, ..., tensors and lists, "
                f"found {describe(part)}"
            )
        found.append(part)
    if used > len(shape):
        raise IndexOutOfRangeError(f"{used} indices are too many for a tensor of shape {shown(shape)}")
    dots = [i for i, part in enumerate(found) if part is Ellipsis]
    if len(dots) > 1:
        raise OpArgumentError("an index has one ... at most")
    at = dots[0] if dots else len(found)
    found[at : at + 1] = [slice(None)] * (len(shape) - used)
    return found


def _listed(values: list[Any], shape: Sequence[int], axis: int) -> TensorSpec:
    """The spec of the tensor a list of indices stands for; each is checked against its axis."""
    sizes, members = _nested(values)
    if members and all(isinstance(member, bool) for member in members):
        return TensorSpec(sizes, "bool")
    for member in members:
        if not isinstance(member, int) or isinstance(member, bool):
            raise OpArgumentError(f"a list of indices holds whole numbers, found {describe(member)}")
        if axis < len(shape):
            in_range(member, shape, axis)
    return TensorSpec(sizes, "int64")


def _nested(values: list[Any]) -> tuple[Shape, list[Any]]:
    """Shape and members of a nested list."""
    rows = [_nested(value) for value in values if isinstance(value, list)]
    if not rows:
        return (len(values),), values
    if len(rows) < len(values) or len({size for size, _ in rows}) > 1:
        raise OpArgumentError("the rows of a nested list of indices have one length")
    return (len(rows), *rows[0][0]), [member for _, members in rows for member in members]


def _placed(result: Sequence[int | _Gather]) -> Indexed:
    """Put the gathered axes in their place."""
    where = [i for i, part in enumerate(result) if isinstance(part, _Gather)]
    kept = tuple(part for part in result if not isinstance(part, _Gather))
    if not where:
        return Indexed(kept, False)
    shapes = [part.shape for part in result if isinstance(part, _Gather)]
    together = broadcast(*shapes)
    if together is None:
        raise ShapeError(f"index tensors of shapes {shown(*shapes)} do not broadcast")
    neighbours = where[-1] - where[0] + 1 == len(where)
    first = where[0] if neighbours else 0
    return Indexed((*kept[:first], *together, *kept[first:]), True)


# --- the two ops -------------------------------------------------------------------------------------------


def _getitem(bound: Bound) -> Any:
    value, index = bound["input"], bound["index"]
    if isinstance(value, TensorSpec):
        return TensorSpec(indexed(value.shape, index).shape, value.dtype)
    if isinstance(value, tuple | list):
        if isinstance(index, slice):
            return value[index]
        if isinstance(index, int) and not isinstance(index, bool):
            if not -len(value) <= index < len(value):
                raise IndexOutOfRangeError(
                    f"index {index} is out of range for a value of {len(value)} members"
                )
            return value[index]
        raise OpArgumentError(
            f"a {type(value).__name__} is indexed by a whole number, found {describe(index)}"
        )
    if isinstance(value, dict):
        if index not in value:
            raise OpArgumentError(f"there is no {index!r}; there is {', '.join(map(repr, value))}")
        return value[index]
    raise OpArgumentError(f"{describe(value)} cannot be indexed")


def _getitem_alias(bound: Bound) -> Alias:
    gathered = isinstance(bound["input"], TensorSpec) and is_gathered(bound["index"])
    return Alias.FRESH if gathered else Alias.VIEW


def _getitem_cost(bound: Bound, result: Any) -> Cost:
    if _getitem_alias(bound) is Alias.VIEW:
        return free(bound, result)
    masks = sum(int(s.numel) for s in specs_in(bound["index"]))
    return Cost(int(result.numel) + masks, result.nbytes)


def _setitem(bound: Bound) -> TensorSpec:
    target: TensorSpec = bound["input"]
    value = bound["value"]
    where = indexed(target.shape, bound["index"])
    if not isinstance(value, TensorSpec):
        number_fits(value, target.dtype)
        return target
    fits_into(value.shape, where.shape)
    if where.gathered and value.dtype != target.dtype:
        raise ShapeError(
            f"elements picked by tensors are set to values of their own dtype: the tensor is {target.dtype}, "
            f"the value {value.dtype}; convert it with .to()"
        )
    if category(value.dtype) == 3 and category(target.dtype) != 3:
        raise ShapeError(f"a {value.dtype} value would lose its imaginary part in a {target.dtype} tensor")
    return target


def fits_into(value: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ShapeError, naming both, unless ``value`` broadcasts into ``shape`` (leading ones fall away)."""
    rest = list(value)
    while len(rest) > len(shape) and rest[0] == 1:
        rest.pop(0)
    pairs = zip(reversed(rest), reversed(shape), strict=False)
    if len(rest) > len(shape) or not all(size == 1 or same_size(size, other) for size, other in pairs):
        raise ShapeError(
            f"a value of shape {shown(value)} does not broadcast into the part set, of shape {shown(shape)}"
        )


def number_fits(value: Any, dtype: str) -> None:
    """Raise ShapeError unless torch fills a tensor of ``dtype`` with this number: 1.5 becomes 1 in int64, but
    what overflows, and an imaginary part that would be lost, are refused."""
    kind = category(dtype)
    if isinstance(value, complex) and (kind == 3 or not value.imag):
        parts = [value.real, value.imag]
    else:
        parts = [value]
    for part in parts:
        if kind == 0:
            continue
        if isinstance(part, complex):
            fits = False
        elif isinstance(part, float) and not math.isfinite(part):
            fits = kind > 1
        else:
            negative = dtype == "uint8" and isinstance(part, float) and part < 0
            fits = abs(part) <= _MOST[dtype] and not negative
        if not fits:
            raise ShapeError(f"{value!r} cannot be stored in a {dtype} tensor")


def _setitem_cost(bound: Bound, result: TensorSpec) -> Cost:
    where = indexed(result.shape, bound["index"]).shape
    return Cost(int(TensorSpec(where).numel), 0)


_INDEX = Param("index", Kind.INDEX)

define(
    "getitem",
    (Param("input", Kind.ANY), _INDEX),
    _getitem,
    _getitem_cost,
    alias=Alias.VIEW,
    alias_rule=_getitem_alias,
)
define(
    "setitem",
    (Param("input", Kind.TENSOR), _INDEX, Param("value", Kind.OPERAND)),
    _setitem,
    _setitem_cost,
    alias=Alias.INPLACE,
)

"""Ops that pick, place or mask elements by name: index_select, gather, scatter, masked_fill, diagonal, tril.

Index tensors hold values that only the run knows; here their shapes and dtypes are checked.
"""

from __future__ import annotations

from typing import Any

from ..errors import IndexOutOfRangeError, OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .indexing import in_range, number_fits
from .registry import Alias, Bound, Kind, Param
from .rules import (
    DIM,
    INPUT,
    Rule,
    Shape,
    axis,
    broadcast_all,
    category,
    define,
    free,
    in_place,
    inplace,
    per_input,
    per_result,
    same_dtype,
    shown,
    spelled,
)

INDEX = Param("index", Kind.TENSOR)
MASK = Param("mask", Kind.TENSOR)
SOURCE = Param("source", Kind.TENSOR)


def _both(name: str, params: tuple[Param, ...], rule: Rule) -> None:
    """The function, which copies, and the method with ``_``, which edits in place."""
    define(f"torch.{name}", params, rule, per_result(), spellings=spelled(name, "torch", "Tensor"))
    define(
        f"tensor.{name}_",
        params,
        inplace(rule),
        in_place(),
        alias=Alias.INPLACE,
        spellings=spelled(f"{name}_", "Tensor"),
    )


def _index_dtype(index: TensorSpec, *allowed: str) -> None:
    if index.dtype not in allowed:
        raise ShapeError(f"an index is {' or '.join(allowed)}, found {index.dtype}; convert it with .to()")


def _replaced(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


# --- one place of an axis, a stretch of it -----------------------------------------------------------------


def _dimensioned(x: TensorSpec, dim: int) -> int:
    if not x.shape:
        raise IndexOutOfRangeError("a tensor without dimensions has no axis to select from")
    return axis(dim, x.shape)


def _select(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    dim = _dimensioned(x, bound["dim"])
    in_range(bound["index"], x.shape, dim)
    return TensorSpec((*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype)


def _narrow(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    dim = _dimensioned(x, bound["dim"])
    size, start, length = int(x.shape[dim]), bound["start"], bound["length"]
    if not -size <= start <= size or (start + size if start < 0 else start) + length > size:
        raise IndexOutOfRangeError(
            f"{length} elements from {start} leave axis {dim} of a tensor of shape {shown(x.shape)}"
        )
    return TensorSpec(_replaced(x.shape, dim, length), x.dtype)


define(
    "torch.select",
    (INPUT, DIM, Param("index", Kind.INT)),
    _select,
    free,
    alias=Alias.VIEW,
    spellings=spelled("select", "torch", "Tensor"),
)
define(
    "torch.narrow",
    (INPUT, DIM, Param("start", Kind.INT), Param("length", Kind.INT, low=0)),
    _narrow,
    free,
    alias=Alias.VIEW,
    spellings=spelled("narrow", "torch", "Tensor"),
)


# --- picking by an index tensor ----------------------------------------------------------------------------


def _vector(index: TensorSpec) -> int:
    """How many places a vector (or a single index) names."""
    if index.ndim > 1:
        raise ShapeError(f"an index is a vector here, found shape {shown(index.shape)}")
    return index.shape[0] if index.ndim else 1


def _index_select(bound: Bound) -> TensorSpec:
    x, index = bound["input"], bound["index"]
    dim = axis(bound["dim"], x.shape)
    _index_dtype(index, "int64", "int32")
    count = _vector(index)
    if not x.shape:
        if count != 1:
            raise ShapeError(f"a tensor without dimensions has one element to select, found {count} indices")
        return TensorSpec((), x.dtype)
    return TensorSpec(_replaced(x.shape, dim, count), x.dtype)


def _no_larger(index: TensorSpec, x: TensorSpec, dim: int | None, what: str) -> None:
    """``index`` has the rank of ``x`` and is nowhere larger, save along ``dim``."""
    if index.numel == 0:
        return
    ours, theirs = index.shape or (1,), x.shape or (1,)
    if len(ours) != len(theirs):
        raise ShapeError(f"the index {shown(index.shape)} and {what} {shown(x.shape)} differ in rank")
    for i, (size, limit) in enumerate(zip(ours, theirs, strict=True)):
        if i != dim and size > limit and not isinstance(size, Dim):
            raise ShapeError(f"the index {shown(index.shape)} is larger than {what} {shown(x.shape)}")


def _gather(bound: Bound) -> TensorSpec:
    x, index = bound["input"], bound["index"]
    dim = axis(bound["dim"], x.shape)
    _index_dtype(index, "int64", "int32")
    _no_larger(index, x, dim, "the tensor")
    return TensorSpec(index.shape, x.dtype)


def _take(bound: Bound) -> TensorSpec:
    _index_dtype(bound["index"], "int64")
    return TensorSpec(bound["index"].shape, bound["input"].dtype)


def _take_along_dim(bound: Bound) -> TensorSpec:
    x, index = bound["input"], bound["indices"]
    _index_dtype(index, "int64")
    if bound["dim"] is None:
        return TensorSpec((index.numel,), x.dtype)
    if x.ndim != index.ndim:
        raise ShapeError(f"shapes {shown(x.shape, index.shape)} differ in rank")
    dim = _dimensioned(x, bound["dim"])
    ours, theirs = _replaced(x.shape, dim, 1), _replaced(index.shape, dim, 1)
    rest = broadcast_all(TensorSpec(ours), TensorSpec(theirs))
    return TensorSpec(_replaced(rest, dim, index.shape[dim]), x.dtype)


_pick = per_result()
define(
    "torch.index_select",
    (INPUT, DIM, INDEX),
    _index_select,
    _pick,
    spellings=spelled("index_select", "torch", "Tensor"),
)
define("torch.gather", (INPUT, DIM, INDEX), _gather, _pick, spellings=spelled("gather", "torch", "Tensor"))
define("torch.take", (INPUT, INDEX), _take, _pick, spellings=spelled("take", "torch", "Tensor"))
define(
    "torch.take_along_dim",
    (INPUT, Param("indices", Kind.TENSOR), Param("dim", Kind.INT, None, optional=True)),
    _take_along_dim,
    _pick,
    spellings=spelled("take_along_dim", "torch", "Tensor"),
)


# --- placing by an index tensor ----------------------------------------------------------------------------


def _scatter(bound: Bound) -> TensorSpec:
    x, index, value = bound["input"], bound["index"], bound["src"]
    dim = axis(bound["dim"], x.shape)
    _index_dtype(index, "int64", "int32")
    if isinstance(value, TensorSpec):
        same_dtype(x, value)
        _no_larger(index, value, None, "the source")
    else:
        number_fits(value, x.dtype)
    _no_larger(index, x, dim, "the tensor")
    return TensorSpec(x.shape, x.dtype)


def _placed(bound: Bound, allowed: tuple[str, ...]) -> TensorSpec:
    """index_add and index_copy: ``source`` is the tensor with ``dim`` as long as the index."""
    x, index, source = bound["input"], bound["index"], bound["source"]
    dim = axis(bound["dim"], x.shape)
    _index_dtype(index, *allowed)
    same_dtype(x, source)
    count = _vector(index)
    wanted = _replaced(x.shape, dim, count) if x.shape else ()
    fits = source.ndim == x.ndim and all(map(same_size, wanted, source.shape))
    if not fits or (not x.shape and count != 1):
        raise ShapeError(f"the source has shape {shown(source.shape)} where {shown(wanted)} is needed")
    return TensorSpec(x.shape, x.dtype)


def _index_fill(bound: Bound) -> TensorSpec:
    x, index, value = bound["input"], bound["index"], bound["value"]
    axis(bound["dim"], x.shape)
    _index_dtype(index, "int64")
    _vector(index)
    _fill_value(value, x.dtype)
    return TensorSpec(x.shape, x.dtype)


def _fill_value(value: Any, dtype: str) -> None:
    if not isinstance(value, TensorSpec):
        number_fits(value, dtype)
        return
    if value.shape:
        raise ShapeError(f"fills with one element, found a value of shape {shown(value.shape)}")
    if category(value.dtype) == 3 and category(dtype) != 3:
        raise ShapeError(f"a {value.dtype} value would lose its imaginary part in a {dtype} tensor")


_both("scatter", (INPUT, DIM, INDEX, Param("src", Kind.OPERAND)), _scatter)
_both("scatter_add", (INPUT, DIM, INDEX, Param("src", Kind.TENSOR)), _scatter)
_both(
    "index_add",
    (INPUT, DIM, INDEX, SOURCE, Param("alpha", Kind.NUMBER, 1, keyword_only=True)),
    lambda bound: _placed(bound, ("int64", "int32")),
)
_both("index_copy", (INPUT, DIM, INDEX, SOURCE), lambda bound: _placed(bound, ("int64",)))
_both("index_fill", (INPUT, DIM, INDEX, Param("value", Kind.OPERAND)), _index_fill)


# --- masks -------------------------------------------------------------------------------------------------


def _boolean(mask: TensorSpec) -> None:
    if mask.dtype != "bool":
        raise ShapeError(f"a mask is bool, found {mask.dtype}; compare, or convert it with .bool()")


def _masked_fill(bound: Bound) -> TensorSpec:
    x, mask = bound["input"], bound["mask"]
    _boolean(mask)
    _fill_value(bound["value"], x.dtype)
    return TensorSpec(broadcast_all(x, mask), x.dtype)


def _masked_scatter(bound: Bound) -> TensorSpec:
    x, mask = bound["input"], bound["mask"]
    _boolean(mask)
    same_dtype(x, bound["source"])
    return TensorSpec(broadcast_all(x, mask), x.dtype)


def _masked_select(bound: Bound) -> TensorSpec:
    x, mask = bound["input"], bound["mask"]
    _boolean(mask)
    return TensorSpec((Dim(TensorSpec(broadcast_all(x, mask)).numel),), x.dtype)


def _nonzero(bound: Bound) -> Any:
    x: TensorSpec = bound["input"]
    count = Dim(x.numel)
    if bound["as_tuple"]:
        return (TensorSpec((count,), "int64"),) * max(x.ndim, 1)
    return TensorSpec((count, x.ndim), "int64")


_both("masked_fill", (INPUT, MASK, Param("value", Kind.OPERAND)), _masked_fill)
_both("masked_scatter", (INPUT, MASK, SOURCE), _masked_scatter)
define(
    "torch.masked_select",
    (INPUT, MASK),
    _masked_select,
    per_input(2),
    spellings=spelled("masked_select", "torch", "Tensor"),
)
define(
    "torch.nonzero",
    (INPUT, Param("as_tuple", Kind.BOOL, False, keyword_only=True)),
    _nonzero,
    per_input(2),
    spellings=spelled("nonzero", "torch", "Tensor"),
)


# --- diagonals and triangles -------------------------------------------------------------------------------


def _diagonal_length(rows: int, columns: int, offset: int) -> int:
    length = min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns)
    found = max(length, 0)
    return Dim(found) if isinstance(rows, Dim) or isinstance(columns, Dim) else found


def _diagonal(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    a, b = axis(bound["dim1"], x.shape), axis(bound["dim2"], x.shape)
    if a == b or x.ndim < 2:
        raise ShapeError(f"a diagonal lies between two axes, found {a} and {b} of shape {shown(x.shape)}")
    rest = tuple(size for i, size in enumerate(x.shape) if i not in (a, b))
    return TensorSpec((*rest, _diagonal_length(x.shape[a], x.shape[b], bound["offset"])), x.dtype)


def _diag(bound: Bound) -> TensorSpec:
    x, offset = bound["input"], bound["diagonal"]
    if x.ndim == 1:
        size = x.shape[0] + abs(offset)
        return TensorSpec((size, size), x.dtype)
    if x.ndim == 2:
        return TensorSpec((_diagonal_length(x.shape[0], x.shape[1], offset),), x.dtype)
    raise ShapeError(f"takes a vector or a matrix, found shape {shown(x.shape)}; use torch.diagonal")


def _diag_embed(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if not x.shape:
        raise ShapeError("takes a tensor with dimensions")
    a, b = axis(bound["dim1"], x.shape, extra=1), axis(bound["dim2"], x.shape, extra=1)
    if a == b:
        raise OpArgumentError(f"a diagonal lies between two axes, found {a} twice")
    size = x.shape[-1] + abs(bound["offset"])
    rest = iter(x.shape[:-1])
    return TensorSpec(tuple(size if i in (a, b) else next(rest) for i in range(x.ndim + 1)), x.dtype)


def _triangle(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if x.ndim < 2:
        raise ShapeError(f"takes matrices, found shape {shown(x.shape)}")
    return x


_OFFSET = Param("offset", Kind.INT, 0, low=-(2**31), high=2**31)
_DIAGONAL = Param("diagonal", Kind.INT, 0, low=-(2**31), high=2**31)


def _dims(first: int, second: int) -> tuple[Param, Param]:
    return Param("dim1", Kind.INT, first), Param("dim2", Kind.INT, second)


define(
    "torch.diagonal",
    (INPUT, _OFFSET, *_dims(0, 1)),
    _diagonal,
    free,
    alias=Alias.VIEW,
    spellings=spelled("diagonal", "torch", "Tensor"),
)
define("torch.diag", (INPUT, _DIAGONAL), _diag, _pick, spellings=spelled("diag", "torch", "Tensor"))
define(
    "torch.diag_embed",
    (INPUT, _OFFSET, *_dims(-2, -1)),
    _diag_embed,
    _pick,
    spellings=spelled("diag_embed", "torch", "Tensor"),
)
_both("tril", (INPUT, _DIAGONAL), _triangle)
_both("triu", (INPUT, _DIAGONAL), _triangle)

"""Ops that order, rank and look up values: sort, topk, unique, searchsorted, histc, multinomial, isin.

``bincount`` is absent: the length of its result is a value of its input, which nothing bounds.
"""

from __future__ import annotations

import math
from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .registry import Bound, Cost, Kind, Param
from .rules import (
    INPUT,
    KEEPDIM,
    CostRule,
    Shape,
    axis,
    define,
    per_input,
    same_dtype,
    shown,
    specs_in,
    spelled,
    take,
)

_LAST = Param("dim", Kind.INT, -1)
_DESCENDING = Param("descending", Kind.BOOL, False)
_STABLE = Param("stable", Kind.BOOL, False, keyword_only=True)
_MOST_CATEGORIES = 2**24


def _sorting(bound: Bound, result: Any) -> Cost:
    """n log2 n comparisons."""
    count = sum(int(s.numel) for value in bound.values() for s in specs_in(value))
    return Cost(count * max(1, math.ceil(math.log2(count + 1))), sum(s.nbytes for s in specs_in(result)))


def _sort(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    x: TensorSpec = bound["input"]
    axis(bound.get("dim", 0), x.shape)
    take(x.dtype, "bif")
    return x, TensorSpec(x.shape, "int64")


def _topk(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    x, k = bound["input"], bound["k"]
    dim = axis(bound["dim"], x.shape)
    take(x.dtype, "if")
    size = x.shape[dim] if x.shape else 1
    if k > size:
        raise OpArgumentError(f"k {k} is more than the {size} elements of axis {dim} of {shown(x.shape)}")
    shape: Shape = (*x.shape[:dim], k, *x.shape[dim + 1 :]) if x.shape else ()
    return TensorSpec(shape, x.dtype), TensorSpec(shape, "int64")


def _kthvalue(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    x, k = bound["input"], bound["k"]
    dim = axis(bound["dim"], x.shape)
    take(x.dtype, "if")
    size = x.shape[dim] if x.shape else 1
    if k > size:
        raise OpArgumentError(f"k {k} is more than the {size} elements of axis {dim} of {shown(x.shape)}")
    kept = (1,) if bound["keepdim"] and x.shape else ()
    shape = (*x.shape[:dim], *kept, *x.shape[dim + 1 :])
    return TensorSpec(shape, x.dtype), TensorSpec(shape, "int64")


define(
    "torch.sort",
    (INPUT, _LAST, _DESCENDING, _STABLE),
    _sort,
    _sorting,
    spellings=spelled("sort", "torch", "Tensor"),
    fields=("values", "indices"),
)
define(
    "torch.argsort",
    (INPUT, _LAST, _DESCENDING, _STABLE),
    lambda bound: _sort(bound)[1],
    _sorting,
    spellings=spelled("argsort", "torch", "Tensor"),
)
define(
    "torch.msort",
    (INPUT,),
    lambda bound: _sort(bound)[0],
    _sorting,
    spellings=spelled("msort", "torch", "Tensor"),
)
define(
    "torch.topk",
    (
        INPUT,
        Param("k", Kind.INT, low=0),
        _LAST,
        Param("largest", Kind.BOOL, True),
        Param("sorted", Kind.BOOL, True),
    ),
    _topk,
    _sorting,
    spellings=spelled("topk", "torch", "Tensor"),
    fields=("values", "indices"),
)
define(
    "torch.kthvalue",
    (INPUT, Param("k", Kind.INT, low=1), _LAST, KEEPDIM),
    _kthvalue,
    _sorting,
    spellings=spelled("kthvalue", "torch", "Tensor"),
    fields=("values", "indices"),
)


# --- distinct values ---------------------------------------------------------------------------------------


def _unique(bound: Bound) -> Any:
    x, dim = bound["input"], bound["dim"]
    take(x.dtype, "bif")
    if dim is None:
        count, inverse = Dim(x.numel), x.shape
        found = TensorSpec((count,), x.dtype)
    else:
        if not x.shape:
            raise ShapeError("a tensor without dimensions has no axis of distinct slices")
        dim = axis(dim, x.shape)
        if x.numel == 0:
            raise ShapeError(f"distinct slices need elements, found shape {shown(x.shape)}")
        count, inverse = Dim(x.shape[dim]), (x.shape[dim],)
        found = TensorSpec((*x.shape[:dim], count, *x.shape[dim + 1 :]), x.dtype)
    more = []
    if bound["return_inverse"]:
        more.append(TensorSpec(inverse, "int64"))
    if bound["return_counts"]:
        more.append(TensorSpec((count,), "int64"))
    return (found, *more) if more else found


define(
    "torch.unique",
    (
        INPUT,
        Param("sorted", Kind.BOOL, True),
        Param("return_inverse", Kind.BOOL, False),
        Param("return_counts", Kind.BOOL, False),
        Param("dim", Kind.INT, None, optional=True),
    ),
    _unique,
    _sorting,
    spellings=spelled("unique", "torch", "Tensor"),
)


# --- looking up --------------------------------------------------------------------------------------------


def _searching(edges: str) -> CostRule:
    """log2 of an axis for each element of the result."""

    def cost(bound: Bound, result: TensorSpec) -> Cost:
        steps = math.ceil(math.log2(max(2, int(bound[edges].shape[-1]))))
        return Cost(int(result.numel) * steps, result.nbytes)

    return cost


def _places(bound: Bound, shape: Shape) -> TensorSpec:
    return TensorSpec(shape, "int32" if bound["out_int32"] else "int64")


def _searchsorted(bound: Bound) -> TensorSpec:
    edges, values = bound["sorted_sequence"], bound["input"]
    if not edges.shape:
        raise ShapeError("sorted_sequence has one dimension at least")
    take(edges.dtype, "if")
    if not isinstance(values, TensorSpec):
        if edges.ndim != 1:
            raise ShapeError(f"a number is looked up in a vector, found shape {shown(edges.shape)}")
        return _places(bound, ())
    same_dtype(edges, values)
    leading = edges.shape[:-1], values.shape[:-1]
    if edges.ndim > 1 and (edges.ndim != values.ndim or not all(map(same_size, *leading))):
        raise ShapeError(f"shapes {shown(edges.shape, values.shape)} differ before the last axis")
    return _places(bound, values.shape)


def _bucketize(bound: Bound) -> TensorSpec:
    values, edges = bound["input"], bound["boundaries"]
    if edges.ndim != 1:
        raise ShapeError(f"boundaries are a vector, found shape {shown(edges.shape)}")
    take(edges.dtype, "if")
    if not isinstance(values, TensorSpec):
        return _places(bound, ())
    same_dtype(values, edges)
    return _places(bound, values.shape)


_PLACES = (
    Param("out_int32", Kind.BOOL, False, keyword_only=True),
    Param("right", Kind.BOOL, False, keyword_only=True),
)
define(
    "torch.searchsorted",
    (Param("sorted_sequence", Kind.TENSOR), Param("input", Kind.OPERAND), *_PLACES),
    _searchsorted,
    _searching("sorted_sequence"),
    spellings=spelled("searchsorted", "torch"),
)
define(
    "torch.bucketize",
    (Param("input", Kind.OPERAND), Param("boundaries", Kind.TENSOR), *_PLACES),
    _bucketize,
    _searching("boundaries"),
    spellings=spelled("bucketize", "torch"),
)


def _isin(bound: Bound) -> TensorSpec:
    elements, among = bound["elements"], bound["test_elements"]
    if not isinstance(elements, TensorSpec) and not isinstance(among, TensorSpec):
        raise OpArgumentError("elements or test_elements is a tensor, found two numbers")
    for value in (elements, among):
        if isinstance(value, TensorSpec):
            take(value.dtype, "if")
        elif isinstance(value, bool | complex):
            raise OpArgumentError(f"looks for whole numbers and floats, found {value!r}")
    return TensorSpec(elements.shape if isinstance(elements, TensorSpec) else (), "bool")


define(
    "torch.isin",
    (
        Param("elements", Kind.OPERAND),
        Param("test_elements", Kind.OPERAND),
        Param("assume_unique", Kind.BOOL, False, keyword_only=True),
        Param("invert", Kind.BOOL, False, keyword_only=True),
    ),
    _isin,
    _sorting,
    spellings=spelled("isin", "torch"),
)


# --- counting and drawing ----------------------------------------------------------------------------------


def _histc(bound: Bound) -> TensorSpec:
    low, high = bound["min"], bound["max"]
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise OpArgumentError(f"min and max are finite and in order, found {low} and {high}")
    return TensorSpec((bound["bins"],), take(bound["input"].dtype, "f"))


def _multinomial(bound: Bound) -> TensorSpec:
    x, count = bound["input"], bound["num_samples"]
    take(x.dtype, "f")
    if x.ndim not in (1, 2):
        raise ShapeError(f"takes weights [categories] or [rows, categories], found {shown(x.shape)}")
    categories = x.shape[-1]
    if not 1 <= categories <= _MOST_CATEGORIES:
        raise ShapeError(f"draws among 1 to {_MOST_CATEGORIES} categories, found {categories}")
    if not bound["replacement"] and count > categories:
        raise OpArgumentError(f"{count} draws without replacement are more than the {categories} categories")
    return TensorSpec((*x.shape[:-1], count), "int64")


define(
    "torch.histc",
    (
        INPUT,
        Param("bins", Kind.INT, 100, low=1, high=2**31),
        Param("min", Kind.NUMBER, 0),
        Param("max", Kind.NUMBER, 0),
    ),
    _histc,
    per_input(4),
    spellings=spelled("histc", "torch", "Tensor"),
)
define(
    "torch.multinomial",
    (INPUT, Param("num_samples", Kind.INT, low=1, high=2**31), Param("replacement", Kind.BOOL, False)),
    _multinomial,
    per_input(4),
    spellings=spelled("multinomial", "torch", "Tensor"),
    random=True,
)

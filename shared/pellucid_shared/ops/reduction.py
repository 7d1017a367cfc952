"""Reductions over some or all dimensions, and cumulative functions along one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec, promote
from .registry import Alias, Bound, Kind, Param, describe
from .rules import (
    DIM,
    DTYPE,
    INPUT,
    KEEPDIM,
    DTypeRule,
    Rule,
    Shape,
    axes,
    axis,
    broadcast_all,
    category,
    define,
    in_place,
    is_empty,
    per_input,
    reduced,
    reduction,
    result_dtype,
    same,
    shown,
    spelled,
    take,
    to_float,
    to_int64,
    to_real,
    to_sum,
)

_BOTH = ("torch", "Tensor")
_DIMS = Param("dim", Kind.INTS, None, optional=True)
# torch takes keepdim of sum, mean and prod only beside dim: () and None tell that none was given.
_GIVEN_DIMS = Param("dim", Kind.INTS, (), optional=True)
_GIVEN_KEEPDIM = Param("keepdim", Kind.BOOL, None)


def _beside_dim(rule: Rule) -> Rule:
    """``keepdim`` is taken only where ``dim`` is given."""

    def checked(bound: Bound) -> Any:
        if bound["keepdim"] is not None and bound["dim"] == ():
            raise OpArgumentError("keepdim is taken only with dim; name the dims (None for all)")
        return rule(bound)

    return checked


def _from(takes: str, rule: Rule) -> Rule:
    """``input`` itself is of a kind in ``takes``, whatever ``dtype`` says."""

    def checked(bound: Bound) -> Any:
        take(bound["input"].dtype, takes)
        return rule(bound)

    return checked


def _some_dims(rule: Rule) -> Rule:
    """``dim=()`` is refused: torch reduces nothing there, where its other functions reduce all."""

    def checked(bound: Bound) -> Any:
        if bound["dim"] == ():
            raise OpArgumentError("dim=() names no dimension; name some, or None for all")
        return rule(bound)

    return checked


def _not_empty(rule: Rule) -> Rule:
    """Functions without a value for nothing do not reduce a size of 0."""

    def checked(bound: Bound) -> Any:
        x: TensorSpec = bound["input"]
        for dim in axes(bound["dim"], x.shape):
            if x.ndim and is_empty(x.shape[dim]):
                raise ShapeError(f"dim {dim} of {shown(x.shape)} has size 0 and so no such value")
        return rule(bound)

    return checked


def _simple(
    name: str, params: Sequence[Param], rule: Rule, weight: int = 1, fields: tuple[str, ...] = ()
) -> None:
    """An op of ``input`` and ``params``, spelled as function and method."""
    define(
        f"torch.{name}",
        [INPUT, *params],
        rule,
        per_input(weight),
        spellings=spelled(name, *_BOTH),
        fields=fields,
    )


# --- sums and their kin ------------------------------------------------------------------------------------

_simple("sum", [_GIVEN_DIMS, _GIVEN_KEEPDIM, DTYPE], _beside_dim(reduction(to_sum)))
_simple("mean", [_GIVEN_DIMS, _GIVEN_KEEPDIM, DTYPE], _beside_dim(reduction(takes="fc")))


def _taking(rule: Rule, takes: str) -> Rule:
    """The input's own dtype matters too where ``dtype`` names another."""

    def checked(bound: Bound) -> Any:
        take(bound["input"].dtype, takes)
        return rule(bound)

    return checked


_simple("nansum", [_DIMS, KEEPDIM, DTYPE], _taking(reduction(to_sum, "bif"), "bif"), 2)
_simple("nanmean", [_DIMS, KEEPDIM, DTYPE], _taking(reduction(takes="f"), "f"), 3)
_simple("count_nonzero", [_DIMS], reduction(to_int64))
_simple("logsumexp", [Param("dim", Kind.INTS), KEEPDIM], _some_dims(reduction(to_float)), 12)


def _truth(dtype: str) -> str:
    return "uint8" if dtype == "uint8" else "bool"


_simple("any", [_DIMS, KEEPDIM], _some_dims(reduction(_truth)))
_simple("all", [_DIMS, KEEPDIM], _some_dims(reduction(_truth)))


def _one_dim(rule: Rule) -> Rule:
    """``dim`` is one number or absent; ``keepdim`` is taken only beside it."""

    def checked(bound: Bound) -> Any:
        if bound["keepdim"] is not None and bound["dim"] is None:
            raise OpArgumentError("keepdim is taken only with dim; name the dim")
        return rule(bound)

    return checked


_ONE_DIM = Param("dim", Kind.INT, None)
_simple("prod", [_ONE_DIM, _GIVEN_KEEPDIM, DTYPE], _one_dim(reduction(to_sum)))


# --- spread ------------------------------------------------------------------------------------------------


def _spread(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if bound["correction"] is not None and bound["unbiased"] is not None:
        raise OpArgumentError("unbiased and correction say the same; give one")
    if bound["dim"] == () and None not in (bound["unbiased"], bound["keepdim"]):
        raise OpArgumentError("keepdim beside unbiased is taken only with dim; name the dims (None for all)")
    shape = reduced(x.shape, axes(bound["dim"], x.shape), bool(bound["keepdim"]))
    return TensorSpec(shape, to_real(take(x.dtype, "fc")))


def _spread_and_mean(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spread = _spread(bound)
    return spread, TensorSpec(spread.shape, bound["input"].dtype)


_SPREAD_PARAMS = (
    _GIVEN_DIMS,
    Param("unbiased", Kind.BOOL, None),
    _GIVEN_KEEPDIM,
    Param("correction", Kind.NUMBER, None, keyword_only=True),
)
_simple("std", _SPREAD_PARAMS, _spread, 4)
_simple("var", _SPREAD_PARAMS, _spread, 4)
for _name in ("std_mean", "var_mean"):
    define(
        f"torch.{_name}",
        [INPUT, *_SPREAD_PARAMS],
        _spread_and_mean,
        per_input(5),
        spellings=spelled(_name, "torch"),
    )


# --- norms -------------------------------------------------------------------------------------------------


def _norm(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    p, wanted = bound["p"], bound["dtype"]
    if not (p is None or p == "fro" or (isinstance(p, int | float) and not isinstance(p, bool))):
        raise OpArgumentError(f"p is a number or 'fro', found {p!r}; for others see torch.linalg.matrix_norm")
    take(x.dtype, "fc")
    if wanted is not None and (category(wanted) != category(x.dtype) or promote(wanted, x.dtype) != wanted):
        raise ShapeError(f"dtype={wanted} would narrow {x.dtype}")
    if p is not None and p != "fro" and (p < 0 or p == math.inf):
        _not_empty(lambda bound: None)(bound)
    shape = reduced(x.shape, axes(bound["dim"], x.shape), bound["keepdim"])
    return TensorSpec(shape, to_real(wanted or x.dtype))


_simple("norm", [Param("p", Kind.ANY, "fro", optional=True), _DIMS, KEEPDIM, DTYPE], _norm, 3)


# --- order -------------------------------------------------------------------------------------------------

_simple("amax", [_DIMS, KEEPDIM], _not_empty(reduction(takes="bif")))
_simple("amin", [_DIMS, KEEPDIM], _not_empty(reduction(takes="bif")))
_OPTIONAL_DIM = Param("dim", Kind.INT, None, optional=True)
_simple("argmax", [_OPTIONAL_DIM, KEEPDIM], _not_empty(reduction(to_int64, "if")))
_simple("argmin", [_OPTIONAL_DIM, KEEPDIM], _not_empty(reduction(to_int64, "if")))

_aminmax = _not_empty(reduction(takes="bif"))
define(
    "torch.aminmax",
    [
        INPUT,
        Param("dim", Kind.INT, None, optional=True, keyword_only=True),
        Param("keepdim", Kind.BOOL, False, keyword_only=True),
    ],
    lambda bound: (_aminmax(bound), _aminmax(bound)),
    per_input(2),
    spellings=spelled("aminmax", *_BOTH),
    fields=("min", "max"),
)


def _with_indices(bound: Bound, takes: str) -> tuple[TensorSpec, TensorSpec]:
    values: TensorSpec = _not_empty(reduction(takes=takes))(bound)
    return values, TensorSpec(values.shape, "int64")


def _extreme(bound: Bound) -> TensorSpec | tuple[TensorSpec, TensorSpec]:
    """``max(x)``, ``max(x, dim)`` -> (values, indices), or ``max(x, other)``, element by element."""
    x: TensorSpec = bound["input"]
    if bound["dim"] is not None and bound["other"] is not None:
        raise OpArgumentError("takes a dim or another tensor, found both")
    other = bound["other"] if bound["dim"] is None else bound["dim"]
    if isinstance(other, int) and not isinstance(other, bool):
        return _with_indices({**bound, "keepdim": bool(bound["keepdim"])}, "bif")
    if bound["keepdim"] is not None:
        raise OpArgumentError("keepdim is taken only with dim; name the dim")
    if isinstance(other, TensorSpec):
        return TensorSpec(broadcast_all(x, other), take(result_dtype(x, other), "bif"))
    if other is not None:
        raise OpArgumentError(f"takes a dim or another tensor, found {describe(other)}")
    if any(map(is_empty, x.shape)):
        raise ShapeError(f"a tensor of shape {shown(x.shape)} has no elements and so no such value")
    return TensorSpec((), take(x.dtype, "bif"))


for _name in ("max", "min"):
    _simple(
        _name,
        [
            Param("dim", Kind.ANY, None),
            _GIVEN_KEEPDIM,
            Param("other", Kind.TENSOR, None, keyword_only=True),
        ],
        _extreme,
        fields=("values", "indices"),
    )


def _median(bound: Bound) -> TensorSpec | tuple[TensorSpec, TensorSpec]:
    if bound["dim"] is not None:
        return _with_indices({**bound, "keepdim": bool(bound["keepdim"])}, "if")
    result: TensorSpec = _one_dim(reduction(takes="if"))(bound)
    return result


_simple("median", [_ONE_DIM, _GIVEN_KEEPDIM], _median, 10, fields=("values", "indices"))
_simple("nanmedian", [_ONE_DIM, _GIVEN_KEEPDIM], _median, 10, fields=("values", "indices"))


def _quantile(bound: Bound) -> TensorSpec:
    x, q = bound["input"], bound["q"]
    if x.dtype not in ("float32", "float64"):
        raise ShapeError(f"takes float32 or float64, found {x.dtype}; convert it with .float()")
    front: Shape = ()
    if isinstance(q, TensorSpec):
        if q.ndim > 1 or q.dtype != x.dtype:
            raise ShapeError(f"q is a number, or a {x.dtype} tensor of at most one dimension, found {q}")
        front = q.shape
    elif not (isinstance(q, int | float) and 0 <= q <= 1):
        raise OpArgumentError(f"q lies in [0, 1], found {q!r}")
    if not x.numel:
        raise ShapeError(f"a tensor of shape {shown(x.shape)} has no elements and so no quantiles")
    dims = axes(bound["dim"], x.shape)
    return TensorSpec((*front, *reduced(x.shape, dims, bound["keepdim"])), x.dtype)


_INTERPOLATION = Param(
    "interpolation",
    Kind.STR,
    "linear",
    keyword_only=True,
    choices=("linear", "lower", "higher", "midpoint", "nearest"),
)
for _name in ("quantile", "nanquantile"):
    _simple(_name, [Param("q", Kind.OPERAND), _OPTIONAL_DIM, KEEPDIM, _INTERPOLATION], _quantile, 20)


# --- along one dimension -----------------------------------------------------------------------------------


def _along(dtype: DTypeRule, takes: str) -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        x: TensorSpec = bound["input"]
        axis(bound["dim"], x.shape)
        wanted = bound.get("dtype")
        return TensorSpec(x.shape, take(wanted or dtype(x.dtype), takes))

    return rule


def _along_with_indices(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    values: TensorSpec = _along(same, "bif")(bound)
    return values, TensorSpec(values.shape, "int64")


def _overwritten(bound: Bound) -> TensorSpec:
    target: TensorSpec = bound["input"]
    if bound["dtype"] not in (None, target.dtype):
        raise ShapeError(f"dtype={bound['dtype']} is not that of the tensor overwritten, {target.dtype}")
    axis(bound["dim"], target.shape)
    return target


for _name in ("cumsum", "cumprod"):
    _simple(_name, [DIM, DTYPE], _along(to_sum, "bifc"))
    define(
        f"tensor.{_name}_",
        [INPUT, DIM, DTYPE],
        _overwritten,
        in_place(),
        alias=Alias.INPLACE,
        spellings=spelled(_name + "_", "Tensor"),
    )
_simple("logcumsumexp", [DIM], _along(same, "fc"), 20)
_simple("cummax", [DIM], _along_with_indices, fields=("values", "indices"))
_simple("cummin", [DIM], _along_with_indices, fields=("values", "indices"))

"""Tensors made out of nothing, or in the likeness of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec
from .registry import Alias, Bound, Cost, Kind, Op, Param
from .rules import (
    DTYPE,
    INPUT,
    Rule,
    category,
    define,
    new_shape,
    number_category,
    per_result,
    spelled,
    take,
)

_SIZE = Param("size", Kind.INTS, variadic=True)
_DEVICE = Param("device", Kind.DEVICE, None, optional=True, keyword_only=True)
_FILL = Param("fill_value", Kind.NUMBER)
_DEFAULT_OF_NUMBER = ("bool", "int64", "float32", "complex64")


def _make(name: str, params: Sequence[Param], rule: Rule, *, random: bool = False) -> Op:
    """``torch.<name>``, which takes dtype and device."""
    return define(
        f"torch.{name}",
        [*params, DTYPE, _DEVICE],
        rule,
        per_result(),
        spellings=spelled(name, "torch"),
        random=random,
    )


def _sized(takes: str = "bifc") -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        return TensorSpec(new_shape(bound["size"]), take(bound["dtype"] or "float32", takes))

    return rule


_make("zeros", [_SIZE], _sized())
_make("ones", [_SIZE], _sized())
_make("rand", [_SIZE], _sized("fc"), random=True)
_make("randn", [_SIZE], _sized("fc"), random=True)


def _full(bound: Bound) -> TensorSpec:
    dtype = bound["dtype"] or _DEFAULT_OF_NUMBER[number_category(bound["fill_value"])]
    _fits(bound["fill_value"], dtype)
    return TensorSpec(new_shape(bound["size"]), dtype)


def _fits(value: complex, dtype: str) -> None:
    if isinstance(value, complex) and category(dtype) < 3:
        raise OpArgumentError(f"{value!r} does not fit in {dtype}")


_make("full", [Param("size", Kind.INTS), _FILL], _full)


# --- ranges ------------------------------------------------------------------------------------------------


def _arange(bound: Bound) -> TensorSpec:
    start, end, step = bound["start"], bound["end"], bound["step"]
    if end is None:
        start, end = 0, start
    if any(isinstance(v, complex | bool) for v in (start, end, step)):
        raise OpArgumentError("takes real numbers")
    if not all(map(math.isfinite, (start, end, step))) or step == 0 or (end - start) * step < 0:
        raise OpArgumentError(f"cannot step from {start} to {end} by {step}")
    whole = all(isinstance(v, int) for v in (start, end, step))
    count = -((start - end) // step) if whole else math.ceil((end - start) / step)
    dtype = take(bound["dtype"] or ("int64" if whole else "float32"), "if")
    return TensorSpec((int(count),), dtype)


_make(
    "arange",
    [
        Param("start", Kind.NUMBER),
        Param("end", Kind.NUMBER, None, optional=True),
        Param("step", Kind.NUMBER, 1),
    ],
    _arange,
)


def _linspace(bound: Bound) -> TensorSpec:
    if any(isinstance(bound[name], complex | bool) for name in ("start", "end")):
        raise OpArgumentError("takes real numbers")
    return TensorSpec((bound["steps"],), take(bound["dtype"] or "float32", "ifc"))


_make(
    "linspace",
    [Param("start", Kind.NUMBER), Param("end", Kind.NUMBER), Param("steps", Kind.INT, low=0)],
    _linspace,
)
_make(
    "eye",
    [Param("n", Kind.INT, low=0), Param("m", Kind.INT, None, low=0)],
    lambda bound: TensorSpec(
        (bound["n"], bound["n"] if bound["m"] is None else bound["m"]), bound["dtype"] or "float32"
    ),
)


def _randint(bound: Bound) -> TensorSpec:
    if bound["low"] >= bound["high"]:
        raise OpArgumentError(
            f"draws from low to high - 1, found low={bound['low']} and high={bound['high']}"
        )
    return TensorSpec(new_shape(bound["size"]), take(bound["dtype"] or "int64", "if"))


_LOW, _HIGH = (
    Param("low", Kind.INT, low=-(2**31), high=2**31),
    Param("high", Kind.INT, low=-(2**31), high=2**31),
)
_make("randint", [_LOW, _HIGH, Param("size", Kind.INTS)], _randint, random=True)
_make(
    "randperm",
    [Param("n", Kind.INT, low=0)],
    lambda bound: TensorSpec((bound["n"],), take(bound["dtype"] or "int64", "if")),
    random=True,
)


# --- in the likeness of another ----------------------------------------------------------------------------


def _like(takes: str = "bifc") -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        x: TensorSpec = bound["input"]
        dtype = take(bound["dtype"] or x.dtype, takes)
        if "fill_value" in bound:
            _fits(bound["fill_value"], dtype)
        return TensorSpec(x.shape, dtype)

    return rule


_make("zeros_like", [INPUT], _like())
_make("ones_like", [INPUT], _like())
_make("full_like", [INPUT, _FILL], _like())
_make("rand_like", [INPUT], _like("fc"), random=True)
_make("randn_like", [INPUT], _like("fc"), random=True)


def _new(bound: Bound) -> TensorSpec:
    dtype = bound["dtype"] or bound["input"].dtype
    if "fill_value" in bound:
        _fits(bound["fill_value"], dtype)
    return TensorSpec(new_shape(bound["size"]), dtype)


for _name, _params in (
    ("new_zeros", [_SIZE]),
    ("new_ones", [_SIZE]),
    ("new_full", [Param("size", Kind.INTS), _FILL]),
):
    define(
        f"tensor.{_name}",
        [INPUT, *_params, DTYPE, _DEVICE],
        _new,
        per_result(),
        spellings=spelled(_name, "Tensor"),
    )


# --- chance ------------------------------------------------------------------------------------------------


def _bernoulli(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    return TensorSpec(x.shape, take(x.dtype, "f"))


define(
    "torch.bernoulli",
    [INPUT],
    _bernoulli,
    per_result(2),
    spellings=spelled("bernoulli", "torch", "Tensor"),
    random=True,
)


def _filled_by_chance(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    take(x.dtype, "f")
    if "std" in bound and bound["std"] < 0:
        raise OpArgumentError(f"std is not negative, found {bound['std']}")
    if "to" in bound and bound["from"] > bound["to"]:
        raise ShapeError(f"draws between from and to, found {bound['from']} and {bound['to']}")
    return x


def _cost(bound: Bound, result: Any) -> Cost:
    return Cost(10 * int(result.numel), 0)


def _drawn(name: str, low: str, low_value: float, high: str, high_value: float) -> None:
    bounds = {"low": -3e4, "high": 3e4}  # what every floating dtype can hold
    define(
        f"tensor.{name}",
        [INPUT, Param(low, Kind.NUMBER, low_value, **bounds), Param(high, Kind.NUMBER, high_value, **bounds)],  # type: ignore[arg-type]
        _filled_by_chance,
        _cost,
        alias=Alias.INPLACE,
        spellings=spelled(name, "Tensor"),
        random=True,
    )


_drawn("normal_", "mean", 0.0, "std", 1.0)
_drawn("uniform_", "from", 0.0, "to", 1.0)

"""Functions of one tensor, element by element, and their in-place methods."""

from __future__ import annotations

from typing import Any

from ..specs import TensorSpec
from .registry import Alias, Bound, Kind, Param
from .rules import (
    INPUT,
    TRANSCENDENTAL,
    DTypeRule,
    define,
    define_pair,
    free,
    in_place,
    inplace,
    per_result,
    pointwise,
    same,
    spelled,
    take,
    to_bool,
    to_float,
    to_real,
)

#: name, dtype rule, kinds taken, weight, torch's other names, other namespaces
_TABLE: tuple[tuple[str, DTypeRule, str, int, tuple[str, ...], tuple[str, ...]], ...] = (
    ("neg", same, "ifc", 1, ("negative",), ()),
    ("sign", same, "bif", 1, (), ()),
    ("sgn", same, "bifc", 1, (), ()),
    ("floor", same, "if", 1, (), ()),
    ("ceil", same, "if", 1, (), ()),
    ("trunc", same, "if", 1, ("fix",), ()),
    ("frac", same, "f", 1, (), ()),
    ("sqrt", to_float, "bifc", 4, (), ()),
    ("rsqrt", to_float, "bifc", 4, (), ()),
    ("reciprocal", to_float, "bifc", 4, (), ()),
    ("exp", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("exp2", to_float, "bifc", TRANSCENDENTAL, (), ("special",)),
    ("expm1", to_float, "bifc", TRANSCENDENTAL, (), ("special",)),
    ("log", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("log2", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("log10", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("log1p", to_float, "bifc", TRANSCENDENTAL, (), ("special",)),
    ("sin", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("cos", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("tan", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("asin", to_float, "bifc", TRANSCENDENTAL, ("arcsin",), ()),
    ("acos", to_float, "bifc", TRANSCENDENTAL, ("arccos",), ()),
    ("atan", to_float, "bifc", TRANSCENDENTAL, ("arctan",), ()),
    ("sinh", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("cosh", to_float, "bifc", TRANSCENDENTAL, (), ()),
    ("tanh", to_float, "bifc", TRANSCENDENTAL, (), ("F",)),
    ("asinh", to_float, "bifc", TRANSCENDENTAL, ("arcsinh",), ()),
    ("acosh", to_float, "bifc", TRANSCENDENTAL, ("arccosh",), ()),
    ("atanh", to_float, "bifc", TRANSCENDENTAL, ("arctanh",), ()),
    ("sigmoid", to_float, "bifc", TRANSCENDENTAL, (), ("F",)),
    ("sinc", to_float, "bifc", TRANSCENDENTAL, (), ("special",)),
    ("erf", to_float, "bif", TRANSCENDENTAL, (), ("special",)),
    ("erfc", to_float, "bif", TRANSCENDENTAL, (), ("special",)),
    ("erfinv", to_float, "bif", TRANSCENDENTAL, (), ("special",)),
    ("lgamma", to_float, "bif", TRANSCENDENTAL, (), ()),
    ("digamma", to_float, "bif", TRANSCENDENTAL, (), ("special",)),
    ("deg2rad", to_float, "bif", 1, (), ()),
    ("rad2deg", to_float, "bif", 1, (), ()),
    ("logical_not", to_bool, "bifc", 1, (), ()),
    ("bitwise_not", same, "bi", 1, (), ()),
)

for _name, _dtype, _takes, _weight, _also, _spaces in _TABLE:
    define_pair(
        _name,
        [INPUT],
        pointwise("input", dtype=_dtype, takes=_takes),
        weight=_weight,
        also=_also,
        spaces=_spaces,
    )

define(
    "torch.abs",
    [INPUT],
    pointwise("input", dtype=to_real, takes="ifc"),
    per_result(),
    spellings=(*spelled("abs", "torch", "Tensor"), *spelled("absolute", "torch", "Tensor")),
)
define(
    "tensor.abs_",
    [INPUT],
    inplace(pointwise("input", takes="if")),
    in_place(),
    alias=Alias.INPLACE,
    spellings=(*spelled("abs_", "Tensor"), *spelled("absolute_", "Tensor")),
)

_TESTS = (
    ("isnan", "bifc"),
    ("isinf", "bifc"),
    ("isfinite", "bifc"),
    ("isposinf", "bif"),
    ("isneginf", "bif"),
    ("isreal", "bifc"),
    ("signbit", "bif"),
)

for _name, _takes in _TESTS:
    define(
        f"torch.{_name}",
        [INPUT],
        pointwise("input", dtype=to_bool, takes=_takes),
        per_result(),
        spellings=spelled(_name, "torch", "Tensor"),
    )


def _to_square(dtype: str) -> str:
    """A square is a power with an integer exponent."""
    return "int64" if dtype == "bool" else dtype


define_pair("square", [INPUT], pointwise("input", dtype=_to_square))


def _round(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    return TensorSpec(x.shape, take(x.dtype, "f" if bound["decimals"] else "if"))


define_pair("round", [INPUT, Param("decimals", Kind.INT, 0, keyword_only=True, low=-300, high=300)], _round)


def _number(name: str, default: Any = None) -> Param:
    return Param(name, Kind.NUMBER, default, optional=default is None)


define_pair(
    "nan_to_num",
    [INPUT, _number("nan"), _number("posinf"), _number("neginf")],
    pointwise("input"),
)

define_pair(
    "logit",
    [INPUT, _number("eps")],
    pointwise("input", dtype=to_float, takes="bif"),
    weight=TRANSCENDENTAL,
    spaces=("special",),
)

define(
    "torch.positive",
    [INPUT],
    pointwise("input", takes="ifc"),
    free,
    alias=Alias.VIEW,
    spellings=spelled("positive", "torch", "Tensor"),
)

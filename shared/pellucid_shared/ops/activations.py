"""Activation functions: softmax and its kin, and the pointwise ones of torch.nn.functional."""

from __future__ import annotations

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec
from .registry import Alias, Bound, Kind, Param
from .rules import (
    DIM,
    INPUT,
    TRANSCENDENTAL,
    Rule,
    axis,
    define,
    in_place,
    per_result,
    shown,
    spelled,
    take,
)

_DTYPE = Param("dtype", Kind.DTYPE, None, optional=True)
_INPLACE = Param("inplace", Kind.BOOL, False)


def _softmax(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    axis(bound["dim"], x.shape)
    return TensorSpec(x.shape, take(bound["dtype"] or x.dtype, "f"))


for _name in ("softmax", "log_softmax"):
    define(
        f"torch.{_name}",
        [INPUT, DIM, _DTYPE],
        _softmax,
        per_result(TRANSCENDENTAL + 3),
        spellings=spelled(_name, "torch", "Tensor"),
    )


def _elementwise(takes: str) -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        if bound.get("inplace"):
            raise OpArgumentError("inplace=True is not taken; assign the result, or use a method with _")
        x: TensorSpec = bound["input"]
        return TensorSpec(x.shape, take(x.dtype, takes))

    return rule


define("torch.relu", [INPUT], _elementwise("if"), per_result(), spellings=spelled("relu", "torch", "Tensor"))
define(
    "tensor.relu_",
    [INPUT],
    _elementwise("if"),
    in_place(),
    alias=Alias.INPLACE,
    spellings=spelled("relu_", "Tensor"),
)


def _number(name: str, default: float) -> Param:
    return Param(name, Kind.NUMBER, default)


#: name, parameters after the input, kinds taken, weight
_TABLE: tuple[tuple[str, tuple[Param, ...], str, int], ...] = (
    ("relu", (_INPLACE,), "if", 1),
    ("relu6", (_INPLACE,), "if", 2),
    ("hardtanh", (_number("min_val", -1.0), _number("max_val", 1.0), _INPLACE), "f", 2),
    ("leaky_relu", (_number("negative_slope", 0.01), _INPLACE), "f", 2),
    ("elu", (_number("alpha", 1.0), _INPLACE), "f", TRANSCENDENTAL),
    ("selu", (_INPLACE,), "f", TRANSCENDENTAL),
    ("celu", (_number("alpha", 1.0), _INPLACE), "f", TRANSCENDENTAL),
    ("silu", (_INPLACE,), "f", TRANSCENDENTAL),
    ("mish", (_INPLACE,), "f", 2 * TRANSCENDENTAL),
    ("hardswish", (_INPLACE,), "f", 4),
    ("hardsigmoid", (_INPLACE,), "f", 4),
    ("softplus", (_number("beta", 1), _number("threshold", 20)), "f", TRANSCENDENTAL),
    ("softsign", (), "f", 3),
    ("logsigmoid", (), "f", TRANSCENDENTAL),
)

for _name, _params, _takes, _weight in _TABLE:
    define(
        f"torch.nn.functional.{_name}",
        [INPUT, *_params],
        _elementwise(_takes),
        per_result(_weight),
        spellings=spelled(_name, "F"),
    )

_GELU = Param("approximate", Kind.STR, "none", keyword_only=True, choices=("none", "tanh"))
define(
    "torch.nn.functional.gelu",
    [INPUT, _GELU],
    _elementwise("f"),
    per_result(TRANSCENDENTAL),
    spellings=spelled("gelu", "F"),
)


def _glu(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if not x.ndim:
        raise ShapeError("takes a tensor of at least one dimension, found a 0-d one")
    dim = axis(bound["dim"], x.shape)
    if x.shape[dim] % 2:
        raise ShapeError(f"halves dim {dim} of {shown(x.shape)}, which has an odd size")
    shape = tuple(size // 2 if i == dim else size for i, size in enumerate(x.shape))
    return TensorSpec(shape, take(x.dtype, "f"))


define(
    "torch.nn.functional.glu",
    [INPUT, Param("dim", Kind.INT, -1)],
    _glu,
    per_result(TRANSCENDENTAL),
    spellings=spelled("glu", "F"),
)

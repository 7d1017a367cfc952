"""The losses of ``torch.nn.functional``."""

from __future__ import annotations

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec, broadcast, promote, same_size
from .functional import WEIGHT, given, of_shape
from .registry import Bound, Kind, Param
from .rules import (
    INPUT,
    Rule,
    Shape,
    broadcast_all,
    define,
    per_input,
    result_dtype,
    same_dtype,
    shown,
    spelled,
    take,
    to_real,
)

_TARGET = Param("target", Kind.TENSOR)
_REDUCTION = Param("reduction", Kind.STR, "mean", keyword_only=True, choices=("none", "mean", "sum"))


def _loss(bound: Bound, shape: Shape, dtype: str) -> TensorSpec:
    return TensorSpec(shape if bound["reduction"] == "none" else (), dtype)


def _define(name: str, params: tuple[Param, ...], rule: Rule) -> None:
    define(f"torch.nn.functional.{name}", params, rule, per_input(6), spellings=spelled(name, "F"))


# --- element by element ------------------------------------------------------------------------------------


def _met(x: TensorSpec, target: TensorSpec) -> str:
    """torch expands both first, so that a 0-d tensor weighs as much as any other."""
    return promote(x.dtype, target.dtype)


def _difference(bound: Bound) -> TensorSpec:
    x, target = bound["input"], bound["target"]
    return _loss(bound, broadcast_all(x, target), take(_met(x, target), "f"))


def _l1(bound: Bound) -> TensorSpec:
    x, target = bound["input"], bound["target"]
    return _loss(bound, broadcast_all(x, target), to_real(take(_met(x, target), "fc")))


def _huber(bound: Bound) -> TensorSpec:
    x, target = bound["input"], bound["target"]
    return _loss(bound, broadcast_all(x, target), take(same_dtype(x, target), "f"))


def _kl_div(bound: Bound) -> TensorSpec:
    x, target = bound["input"], bound["target"]
    for tensor in (x, target):
        take(tensor.dtype, "f")
    return _loss(bound, broadcast_all(x, target), result_dtype(x, target))


def _binary(bound: Bound) -> TensorSpec:
    x, target = bound["input"], bound["target"]
    of_shape(target, x.shape, "target")
    for name in ("weight", "pos_weight"):
        extra = bound.get(name)
        if extra is not None and broadcast(extra.shape, x.shape) != x.shape:
            raise ShapeError(f"{name} {shown(extra.shape)} does not broadcast to input {shown(x.shape)}")
    tensors = given(x, target, bound["weight"], bound.get("pos_weight"))
    return _loss(bound, x.shape, take(same_dtype(*tensors), "f"))


_define("mse_loss", (INPUT, _TARGET, _REDUCTION), _difference)
_define("l1_loss", (INPUT, _TARGET, _REDUCTION), _l1)
_define(
    "smooth_l1_loss",
    (INPUT, _TARGET, _REDUCTION, Param("beta", Kind.NUMBER, 1.0, keyword_only=True, low=0)),
    _difference,
)
_define(
    "huber_loss",
    (INPUT, _TARGET, _REDUCTION, Param("delta", Kind.NUMBER, 1.0, keyword_only=True, low=1e-30)),
    _huber,
)
_define(
    "kl_div",
    (
        INPUT,
        _TARGET,
        Param(
            "reduction",
            Kind.STR,
            "mean",
            keyword_only=True,
            choices=("none", "mean", "sum", "batchmean"),
        ),
        Param("log_target", Kind.BOOL, False, keyword_only=True),
    ),
    _kl_div,
)
_define("binary_cross_entropy", (INPUT, _TARGET, WEIGHT, _REDUCTION), _binary)
_define(
    "binary_cross_entropy_with_logits",
    (
        INPUT,
        _TARGET,
        WEIGHT,
        _REDUCTION,
        Param("pos_weight", Kind.TENSOR, None, optional=True, keyword_only=True),
    ),
    _binary,
)


# --- classes -----------------------------------------------------------------------------------------------


def _without_classes(x: TensorSpec) -> tuple[int, Shape]:
    """How many classes, and the shape of what is classified: [classes], or [batch, classes, ...]."""
    if not x.shape:
        raise ShapeError("takes [classes] or [batch, classes, ...], found a tensor without dimensions")
    at = 0 if x.ndim == 1 else 1
    return x.shape[at], (*x.shape[:at], *x.shape[at + 1 :])


def _classes(bound: Bound) -> TensorSpec:
    """Targets that are numbers of classes."""
    x, target, weight = bound["input"], bound["target"], bound["weight"]
    classes, rest = _without_classes(x)
    if target.dtype != "int64":
        raise ShapeError(f"target holds int64 classes, found {target.dtype}; convert with .long()")
    of_shape(target, rest, "target")
    of_shape(weight, (classes,), "weight")
    return _loss(bound, rest, take(same_dtype(*given(x, weight)), "f"))


def _cross_entropy(bound: Bound) -> TensorSpec:
    x, target, weight = bound["input"], bound["target"], bound["weight"]
    classes, rest = _without_classes(x)
    if target.ndim != x.ndim or not all(map(same_size, target.shape, x.shape)):
        return _classes(bound)
    # A target of the input's own shape holds probabilities.
    if bound["ignore_index"] >= 0:
        raise OpArgumentError("ignore_index is for targets that are classes, not probabilities")
    of_shape(weight, (classes,), "weight")
    return _loss(bound, rest, take(same_dtype(*given(x, target, weight)), "f"))


_IGNORE = Param("ignore_index", Kind.INT, -100, keyword_only=True)
_define("nll_loss", (INPUT, _TARGET, WEIGHT, _IGNORE, _REDUCTION), _classes)
_define(
    "cross_entropy",
    (
        INPUT,
        _TARGET,
        WEIGHT,
        _IGNORE,
        _REDUCTION,
        Param("label_smoothing", Kind.NUMBER, 0.0, keyword_only=True, low=0, high=1),
    ),
    _cross_entropy,
)

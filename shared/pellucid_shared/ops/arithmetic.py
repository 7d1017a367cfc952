"""Functions of two and three operands, element by element, and their in-place methods."""

from __future__ import annotations

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec
from .registry import Alias, Bound, Kind, Param
from .rules import (
    INPUT,
    OTHER,
    TRANSCENDENTAL,
    Rule,
    broadcast_all,
    category,
    define,
    define_pair,
    in_place,
    number_category,
    per_result,
    pointwise,
    result_dtype,
    same,
    same_dtype,
    shown,
    spelled,
    take,
    to_float,
)

_LEFT = Param("input", Kind.OPERAND)
_ALPHA = Param("alpha", Kind.NUMBER, 1, keyword_only=True)
_VALUE = Param("value", Kind.NUMBER, 1, keyword_only=True)
_ROUNDING = Param(
    "rounding_mode", Kind.STR, None, optional=True, keyword_only=True, choices=("trunc", "floor")
)
_TENSOR_OTHER = Param("other", Kind.TENSOR)


# --- sums, products, quotients -----------------------------------------------------------------------------


def _with_alpha(rule: Rule) -> Rule:
    """``alpha`` must not be of a higher kind than the result, nor a bool beside numbers."""

    def checked(bound: Bound) -> TensorSpec:
        result: TensorSpec = rule(bound)
        alpha, kind = bound["alpha"], category(result.dtype)
        if number_category(alpha) > max(kind, 1) or (isinstance(alpha, bool) and kind > 0):
            raise OpArgumentError(f"alpha={alpha!r} does not fit operands that meet at {result.dtype}")
        return result

    return checked


def _whole_quotient(rule: Rule) -> Rule:
    """Whole numbers are not divided by the number 0; a tensor's zeros are found only by the run."""

    def checked(bound: Bound) -> TensorSpec:
        result: TensorSpec = rule(bound)
        other = bound["other"]
        if category(result.dtype) < 2 and not isinstance(other, TensorSpec) and other == 0 and result.numel:
            raise OpArgumentError("whole numbers are divided by 0; convert with .float()")
        return result

    return checked


_sum = _with_alpha(pointwise("input", "other"))


def _difference(bound: Bound) -> TensorSpec:
    for name in ("input", "other"):
        operand = bound[name]
        if isinstance(operand, bool) or (isinstance(operand, TensorSpec) and operand.dtype == "bool"):
            raise ShapeError("bool has no subtraction; use torch.logical_xor or convert with .to()")
    result: TensorSpec = _sum(bound)
    return result


def _quotient(bound: Bound) -> TensorSpec:
    dtype = result_dtype(bound["input"], bound["other"])
    if bound.get("rounding_mode") is None:
        return TensorSpec(broadcast_all(bound["input"], bound["other"]), to_float(dtype))
    return TensorSpec(broadcast_all(bound["input"], bound["other"]), take(dtype, "if"))


define_pair("add", [_LEFT, OTHER, _ALPHA], _sum)
define_pair("sub", [_LEFT, OTHER, _ALPHA], _difference, also=("subtract",))
define_pair("mul", [_LEFT, OTHER], pointwise("input", "other"), also=("multiply",))
_whole = _whole_quotient(pointwise("input", "other", takes="if"))
define_pair("div", [_LEFT, OTHER, _ROUNDING], _whole_quotient(_quotient), also=("divide",))
define_pair("true_divide", [_LEFT, OTHER], _quotient)
define_pair("floor_divide", [_LEFT, OTHER], _whole)
define_pair("remainder", [_LEFT, OTHER], _whole, weight=2)
define_pair("fmod", [INPUT, OTHER], _whole, weight=2)
define("torch.rsub", [INPUT, OTHER, _ALPHA], _difference, per_result(), spellings=spelled("rsub", "torch"))


def _power(bound: Bound) -> TensorSpec:
    base, exponent = bound["input"], bound["exponent"]
    dtype = result_dtype(base, exponent)
    if dtype == "bool":
        raise ShapeError("bool has no powers; convert with .to()")
    if isinstance(exponent, int) and exponent < 0 and category(dtype) < 2:
        raise OpArgumentError(f"whole numbers have no power {exponent}; convert with .float()")
    return TensorSpec(broadcast_all(base, exponent), dtype)


_EXPONENT = Param("exponent", Kind.OPERAND)
define_pair("pow", [_LEFT, _EXPONENT], _power, weight=TRANSCENDENTAL)


# --- functions of two tensors ------------------------------------------------------------------------------

for _name, _right, _dtype, _takes, _also in (
    ("atan2", _TENSOR_OTHER, to_float, "bif", ("arctan2",)),
    ("hypot", _TENSOR_OTHER, same, "f", ()),
    ("copysign", OTHER, to_float, "bif", ()),
):
    define_pair(
        _name,
        [INPUT, _right],
        pointwise("input", "other", dtype=_dtype, takes=_takes),
        weight=TRANSCENDENTAL,
        also=_also,
    )

for _name, _takes in (("logaddexp", "fc"), ("logaddexp2", "f")):
    define(
        f"torch.{_name}",
        [INPUT, _TENSOR_OTHER],
        pointwise("input", "other", takes=_takes),
        per_result(2 * TRANSCENDENTAL),
        spellings=spelled(_name, "torch", "Tensor"),
    )

define_pair(
    "xlogy",
    [_LEFT, OTHER],
    pointwise("input", "other", dtype=to_float, takes="bif"),
    weight=TRANSCENDENTAL,
    spaces=("special",),
)

for _name in ("maximum", "minimum", "fmax", "fmin"):
    define(
        f"torch.{_name}",
        [INPUT, _TENSOR_OTHER],
        pointwise("input", "other", takes="bif"),
        per_result(),
        spellings=spelled(_name, "torch", "Tensor"),
    )


# --- logic and bits ----------------------------------------------------------------------------------------

for _name in ("logical_and", "logical_or", "logical_xor"):
    define_pair(_name, [INPUT, _TENSOR_OTHER], pointwise("input", "other", dtype=lambda dtype: "bool"))

for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    define_pair(_name, [_LEFT, OTHER], pointwise("input", "other", takes="bi"))

for _name in ("bitwise_left_shift", "bitwise_right_shift"):
    define_pair(_name, [_LEFT, OTHER], pointwise("input", "other", takes="i"))


# --- bounds ------------------------------------------------------------------------------------------------


def _clamped(bound: Bound, takes: str = "bif") -> TensorSpec:
    limits = [bound[name] for name in ("min", "max") if bound.get(name) is not None]
    if not limits:
        raise OpArgumentError("takes min, max or both, found neither")
    if len({isinstance(limit, TensorSpec) for limit in limits}) > 1:
        raise OpArgumentError("min and max are two numbers or two tensors, found one of each")
    x: TensorSpec = bound["input"]
    return TensorSpec(broadcast_all(x, *limits), take(result_dtype(x, *limits), takes))


_MIN, _MAX = Param("min", Kind.OPERAND, None, optional=True), Param("max", Kind.OPERAND, None, optional=True)
define_pair("clamp", [INPUT, _MIN, _MAX], lambda bound: _clamped(bound, "if"), also=("clip",))
define_pair("clamp_min", [INPUT, Param("min", Kind.OPERAND)], _clamped)
define_pair("clamp_max", [INPUT, Param("max", Kind.OPERAND)], _clamped)


# --- three operands ----------------------------------------------------------------------------------------

_TENSOR1, _TENSOR2 = Param("tensor1", Kind.TENSOR), Param("tensor2", Kind.TENSOR)


def _with_value(rule: Rule) -> Rule:
    """``value`` is complex only where the result is."""

    def checked(bound: Bound) -> TensorSpec:
        result: TensorSpec = rule(bound)
        if isinstance(bound["value"], complex) and category(result.dtype) < 3:
            raise OpArgumentError(f"value={bound['value']!r} does not fit {result.dtype}")
        return result

    return checked


_addcmul = _with_value(pointwise("input", "tensor1", "tensor2", takes="ifc"))


def _addcdiv(bound: Bound) -> TensorSpec:
    take(result_dtype(bound["tensor1"], bound["tensor2"]), "fc")
    result: TensorSpec = _quotient_added(bound)
    return result


_quotient_added = _with_value(pointwise("input", "tensor1", "tensor2", takes="fc"))
define_pair("addcmul", [INPUT, _TENSOR1, _TENSOR2, _VALUE], _addcmul, weight=3)
define_pair("addcdiv", [INPUT, _TENSOR1, _TENSOR2, _VALUE], _addcdiv, weight=3)


def _lerp(bound: Bound) -> TensorSpec:
    start, end, weight = (bound[name] for name in ("input", "end", "weight"))
    same_dtype(
        *(t for t in (start, end, weight) if isinstance(t, TensorSpec) and (t is not weight or t.ndim))
    )
    dtype = take(result_dtype(start, end, weight if isinstance(weight, TensorSpec) else start), "fc")
    if isinstance(weight, complex) and category(dtype) < 3:
        raise OpArgumentError(f"weight={weight!r} does not fit {dtype}")
    return TensorSpec(broadcast_all(start, end, weight), dtype)


define_pair("lerp", [INPUT, Param("end", Kind.TENSOR), Param("weight", Kind.OPERAND)], _lerp, weight=3)


def _where(bound: Bound) -> TensorSpec:
    condition: TensorSpec = bound["condition"]
    if condition.dtype not in ("bool", "uint8"):
        raise ShapeError(f"the condition is bool, found {condition.dtype}; compare it first")
    shape = broadcast_all(condition, bound["input"], bound["other"])
    return TensorSpec(shape, result_dtype(bound["input"], bound["other"]))


_CONDITION = Param("condition", Kind.TENSOR)
define("torch.where", [_CONDITION, _LEFT, OTHER], _where, per_result(), spellings=spelled("where", "torch"))
define("tensor.where", [INPUT, _CONDITION, OTHER], _where, per_result(), spellings=spelled("where", "Tensor"))


# --- overwriting -------------------------------------------------------------------------------------------


def _fill(bound: Bound) -> TensorSpec:
    value = bound["value"]
    if isinstance(value, TensorSpec) and value.ndim:
        raise ShapeError(f"fills with a number or a tensor without dimensions, found {shown(value.shape)}")
    target: TensorSpec = bound["input"]
    if isinstance(value, complex) and category(target.dtype) < 3:
        raise OpArgumentError(f"{target.dtype} cannot be filled with {value!r}")
    return target


def _copy(bound: Bound) -> TensorSpec:
    target: TensorSpec = bound["input"]
    if broadcast_all(target, bound["src"]) != target.shape:
        raise ShapeError(f"{shown(bound['src'].shape)} does not broadcast into {shown(target.shape)}")
    return target


for _name, _params, _rule in (
    ("zero_", [INPUT], lambda bound: bound["input"]),
    ("fill_", [INPUT, Param("value", Kind.OPERAND)], _fill),
    ("copy_", [INPUT, Param("src", Kind.TENSOR)], _copy),
):
    define(
        f"tensor.{_name}", _params, _rule, in_place(), alias=Alias.INPLACE, spellings=spelled(_name, "Tensor")
    )

"""Ops that keep a tensor's shape and change its storage or dtype: clone, detach, contiguous, to."""

from __future__ import annotations

from typing import Any

from ..errors import OpArgumentError
from ..specs import TensorSpec
from ..values import Device, DType
from .registry import Alias, Bound, Cost, Kind, Param, describe
from .rules import INPUT, define, free, per_result, spelled

_COPY = per_result(0)


def _itself(bound: Bound) -> TensorSpec:
    found: TensorSpec = bound["input"]
    return found


define("torch.clone", (INPUT,), _itself, _COPY, spellings=spelled("clone", "torch", "Tensor"))
define(
    "torch.detach",
    (INPUT,),
    _itself,
    free,
    alias=Alias.VIEW,
    spellings=spelled("detach", "torch", "Tensor"),
)
define(
    "tensor.contiguous",
    (INPUT,),
    _itself,
    _COPY,
    alias=Alias.MAYBE_VIEW,
    spellings=spelled("contiguous", "Tensor"),
)


# --- dtypes ------------------------------------------------------------------------------------------------


def _wanted(bound: Bound) -> str:
    """The dtype ``to`` is asked for; a device says nothing about it."""
    found: str | None = bound["dtype"]
    for name in ("target", "second"):
        value = bound[name]
        if isinstance(value, TensorSpec):
            value = DType(value.dtype)
        if isinstance(value, DType):
            if found is not None:
                raise OpArgumentError("the dtype is given twice")
            found = value.name
        elif value is not None and not isinstance(value, Device):
            raise OpArgumentError(f"takes a dtype, a device or a tensor, found {describe(value)}")
    if isinstance(bound["second"], TensorSpec | Device):
        raise OpArgumentError("a device comes before the dtype: x.to(device, dtype)")
    if found is None:
        dtype: str = bound["input"].dtype
        return dtype
    return found


def _to(bound: Bound) -> TensorSpec:
    return TensorSpec(bound["input"].shape, _wanted(bound))


def _to_alias(bound: Bound) -> Alias:
    same = _wanted(bound) == bound["input"].dtype and not bound["copy"]
    return Alias.VIEW if same else Alias.FRESH


def _to_cost(bound: Bound, result: Any) -> Cost:
    return free(bound, result) if _to_alias(bound) is Alias.VIEW else per_result()(bound, result)


define(
    "tensor.to",
    (
        INPUT,
        Param("target", Kind.ANY, None),
        Param("second", Kind.ANY, None),
        Param("dtype", Kind.DTYPE, None, optional=True, keyword_only=True),
        Param("device", Kind.DEVICE, None, optional=True, keyword_only=True),
        Param("copy", Kind.BOOL, False, keyword_only=True),
        Param("non_blocking", Kind.BOOL, False, keyword_only=True),
    ),
    _to,
    _to_cost,
    alias=Alias.MAYBE_VIEW,
    alias_rule=_to_alias,
    spellings=spelled("to", "Tensor"),
)


def _cast(name: str, dtype: str) -> None:
    def alias(bound: Bound) -> Alias:
        return Alias.VIEW if bound["input"].dtype == dtype else Alias.FRESH

    def cost(bound: Bound, result: Any) -> Cost:
        return free(bound, result) if alias(bound) is Alias.VIEW else per_result()(bound, result)

    define(
        f"tensor.{name}",
        (INPUT,),
        lambda bound: TensorSpec(bound["input"].shape, dtype),
        cost,
        alias=Alias.MAYBE_VIEW,
        alias_rule=alias,
        spellings=spelled(name, "Tensor"),
    )


for _name, _dtype in (
    ("float", "float32"),
    ("double", "float64"),
    ("half", "float16"),
    ("bfloat16", "bfloat16"),
    ("int", "int32"),
    ("long", "int64"),
    ("short", "int16"),
    ("bool", "bool"),
):
    _cast(_name, _dtype)


def _type_as_alias(bound: Bound) -> Alias:
    return Alias.VIEW if bound["input"].dtype == bound["other"].dtype else Alias.FRESH


define(
    "tensor.type_as",
    (INPUT, Param("other", Kind.TENSOR)),
    lambda bound: TensorSpec(bound["input"].shape, bound["other"].dtype),
    lambda bound, result: (
        free(bound, result) if _type_as_alias(bound) is Alias.VIEW else per_result()(bound, result)
    ),
    alias=Alias.MAYBE_VIEW,
    alias_rule=_type_as_alias,
    spellings=spelled("type_as", "Tensor"),
)

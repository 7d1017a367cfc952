"""Complex numbers: their parts, their making, their views."""

from __future__ import annotations

from ..errors import ShapeError
from ..specs import TensorSpec
from .registry import Alias, Bound, Kind, Param
from .rules import (
    INPUT,
    TRANSCENDENTAL,
    broadcast_all,
    define,
    free,
    per_result,
    pointwise,
    same_dtype,
    shown,
    spelled,
    take,
    to_float,
    to_real,
)

_TO_COMPLEX = {"float32": "complex64", "float64": "complex128"}

define(
    "torch.real",
    [INPUT],
    pointwise("input", dtype=to_real),
    free,
    alias=Alias.VIEW,
    spellings=spelled("real", "torch", "Tensor"),
)
define(
    "torch.imag",
    [INPUT],
    pointwise("input", dtype=to_real, takes="c"),
    free,
    alias=Alias.VIEW,
    spellings=spelled("imag", "torch", "Tensor"),
)
define(
    "torch.conj",
    [INPUT],
    pointwise("input"),
    free,
    alias=Alias.VIEW,
    spellings=spelled("conj", "torch", "Tensor"),
)
define(
    "torch.resolve_conj",
    [INPUT],
    pointwise("input"),
    per_result(),
    alias=Alias.MAYBE_VIEW,
    spellings=spelled("resolve_conj", "torch", "Tensor"),
)
define(
    "torch.conj_physical",
    [INPUT],
    pointwise("input"),
    per_result(),
    alias=Alias.MAYBE_VIEW,
    spellings=spelled("conj_physical", "torch", "Tensor"),
)
define(
    "torch.angle",
    [INPUT],
    pointwise("input", dtype=lambda dtype: to_real(to_float(dtype))),
    per_result(TRANSCENDENTAL),
    spellings=spelled("angle", "torch", "Tensor"),
)


def _paired(bound: Bound) -> TensorSpec:
    """Two real tensors of one dtype make a complex one."""
    first, second = (value for value in bound.values())
    dtype = same_dtype(first, second)
    if dtype not in _TO_COMPLEX:
        raise ShapeError(f"takes float32 or float64, found {dtype}; convert it with .float()")
    return TensorSpec(broadcast_all(first, second), _TO_COMPLEX[dtype])


define(
    "torch.complex",
    [Param("real", Kind.TENSOR), Param("imag", Kind.TENSOR)],
    _paired,
    per_result(),
    spellings=spelled("complex", "torch"),
)
define(
    "torch.polar",
    [Param("abs", Kind.TENSOR), Param("angle", Kind.TENSOR)],
    _paired,
    per_result(2 * TRANSCENDENTAL),
    spellings=spelled("polar", "torch"),
)


def _as_real(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    return TensorSpec((*x.shape, 2), to_real(take(x.dtype, "c")))


def _as_complex(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if x.dtype not in _TO_COMPLEX:
        raise ShapeError(f"takes float32 or float64, found {x.dtype}; convert it with .float()")
    if not x.ndim or x.shape[-1] != 2:
        raise ShapeError(f"takes a last dimension of 2 (real and imaginary), found {shown(x.shape)}")
    return TensorSpec(x.shape[:-1], _TO_COMPLEX[x.dtype])


define(
    "torch.view_as_real",
    [INPUT],
    _as_real,
    free,
    alias=Alias.VIEW,
    spellings=spelled("view_as_real", "torch"),
)
define(
    "torch.view_as_complex",
    [INPUT],
    _as_complex,
    free,
    alias=Alias.VIEW,
    spellings=spelled("view_as_complex", "torch"),
)

"""What is known of a value before it exists: shape, dtype, structure. The dtype table and promotion rules.

Dtype names are torch's without the prefix: ``float32``, ``bfloat16``, ``int64``, ``bool``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class DTypeInfo:
    """One dtype: bytes per element, promotion category (0 bool, 1 integer, 2 floating, 3 complex)."""

    name: str
    itemsize: int
    category: int
    wire: str  # the safetensors name


DTYPES: dict[str, DTypeInfo] = {
    info.name: info
    for info in (
        DTypeInfo("bool", 1, 0, "BOOL"),
        DTypeInfo("uint8", 1, 1, "U8"),
        DTypeInfo("int8", 1, 1, "I8"),
        DTypeInfo("int16", 2, 1, "I16"),
        DTypeInfo("int32", 4, 1, "I32"),
        DTypeInfo("int64", 8, 1, "I64"),
        DTypeInfo("float16", 2, 2, "F16"),
        DTypeInfo("bfloat16", 2, 2, "BF16"),
        DTypeInfo("float32", 4, 2, "F32"),
        DTypeInfo("float64", 8, 2, "F64"),
        DTypeInfo("complex64", 8, 3, "C64"),
        DTypeInfo("complex128", 16, 3, "C128"),
    )
}

#: Other spellings torch accepts.
DTYPE_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "cfloat": "complex64",
    "cdouble": "complex128",
}


class Dim(int):
    """A size that depends on data: the int is an upper bound, and arithmetic on it stays a bound.

    Made by ``nonzero``, ``x[x > 0]`` and their kin; costs are charged at the bound.
    """

    __slots__ = ()

    def __add__(self, other: int) -> Dim:
        return Dim(int(self) + int(other))

    __radd__ = __add__

    def __mul__(self, other: int) -> Dim:
        return Dim(int(self) * int(other))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"<={int(self)}"


def same_size(a: int, b: int) -> bool:
    """Whether two sizes may be equal at run time: bounds fit anything, exact sizes must agree."""
    return isinstance(a, Dim) or isinstance(b, Dim) or a == b


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor. Sizes are ints, or ``Dim`` where they depend on data."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return int(self.numel) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"[{', '.join(map(repr, self.shape))}] {self.dtype}"


#: What a node may yield: one tensor, or a structure of tensors and plain values.
Spec: TypeAlias = (
    "TensorSpec | tuple[Any, ...] | list[Any] | dict[str, Any] | int | float | bool | str | complex | None"
)


def is_floating(dtype: str) -> bool:
    return DTYPES[dtype].category == 2


def is_complex(dtype: str) -> bool:
    return DTYPES[dtype].category == 3


_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


def promote(a: str, b: str) -> str:
    """The dtype two same-rank tensors meet at: torch.promote_types.

    Source: https://pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc
    """
    if a == b:
        return a
    low, high = sorted((a, b), key=lambda n: (DTYPES[n].category, _ORDER[n]))
    if DTYPES[low].category == DTYPES[high].category:
        if {low, high} == {"float16", "bfloat16"}:
            return "float32"
        if "uint8" in (low, high) and DTYPES[low].category == 1:
            return "int16" if {low, high} == {"uint8", "int8"} else high
        return high
    if DTYPES[high].category == 3 and low == "float64":
        return "complex128"
    return high


def promote_operands(operands: Sequence[Any]) -> str:
    """Result dtype of a pointwise op over tensors, 0-d tensors and Python numbers: torch.result_type.

    Dimensioned tensors outrank 0-d tensors, which outrank numbers; a lower rank decides only by a higher
    category. A float16 tensor with complex operands of lower rank gives ``complex32``, not one of DTYPES.

    Source: combine_categories and result_type in aten/src/ATen/native/TypeProperties.cpp
    """
    ranks: list[str | None] = [None, None, None]
    for value in operands:
        if isinstance(value, TensorSpec):
            rank, dtype = (0 if value.ndim else 1), value.dtype
        elif isinstance(value, bool | int | float | complex):
            rank, dtype = 2, _number_dtype(value)
        else:
            continue
        known = ranks[rank]
        ranks[rank] = dtype if known is None else promote(known, dtype)
    result = _outrank(ranks[0], _outrank(ranks[1], ranks[2]))
    return "float32" if result is None else result


def _number_dtype(value: complex) -> str:
    """The dtype a Python number brings: torch's defaults."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64"
    return "float32" if isinstance(value, float) else "complex64"


_TO_COMPLEX = {
    "float16": "complex32",
    "bfloat16": "complex64",
    "float32": "complex64",
    "float64": "complex128",
}


def _outrank(higher: str | None, lower: str | None) -> str | None:
    if higher is None or lower is None:
        return lower if higher is None else higher
    upper, under = DTYPES[higher].category, DTYPES[lower].category if lower in DTYPES else 3
    if upper == 3:
        return higher
    if upper == 2:
        return _TO_COMPLEX[higher] if under == 3 else higher
    if upper == 0 or under >= 2:
        return promote(higher, lower) if lower in DTYPES else lower
    return higher


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    """The shape several shapes broadcast to, or None where they do not."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[int] = []
    for axis in range(-rank, 0):
        size: int = 1
        for shape in shapes:
            if -axis > len(shape):
                continue
            other = shape[axis]
            if other == 1 and not isinstance(other, Dim):
                continue
            if size == 1 and not isinstance(size, Dim):
                size = other
            elif not same_size(size, other):
                return None
            elif isinstance(size, Dim):
                size = other
        result.append(size)
    return tuple(result)

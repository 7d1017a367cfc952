"""Comparisons of two operands, element by element."""

from __future__ import annotations

from ..specs import TensorSpec
from .registry import Bound, Kind, Param
from .rules import INPUT, OTHER, broadcast_all, define, per_result, pointwise, same_dtype, spelled, to_bool

for _name, _also, _takes in (
    ("eq", (), "bifc"),
    ("ne", ("not_equal",), "bifc"),
    ("lt", ("less",), "bif"),
    ("le", ("less_equal",), "bif"),
    ("gt", ("greater",), "bif"),
    ("ge", ("greater_equal",), "bif"),
):
    define(
        f"torch.{_name}",
        [INPUT, OTHER],
        pointwise("input", "other", dtype=to_bool, takes=_takes),
        per_result(),
        spellings=tuple(s for n in (_name, *_also) for s in spelled(n, "torch", "Tensor")),
    )


def _close(bound: Bound) -> TensorSpec:
    same_dtype(bound["input"], bound["other"])
    return TensorSpec(broadcast_all(bound["input"], bound["other"]), "bool")


define(
    "torch.isclose",
    [
        INPUT,
        Param("other", Kind.TENSOR),
        Param("rtol", Kind.NUMBER, 1e-5, low=0),
        Param("atol", Kind.NUMBER, 1e-8, low=0),
        Param("equal_nan", Kind.BOOL, False),
    ],
    _close,
    per_result(5),
    spellings=spelled("isclose", "torch", "Tensor"),
)

"""Building blocks for generated op arguments: shapes, dtypes, specs, dims, calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pellucid_shared.specs import DTYPES, TensorSpec
from pellucid_shared.values import DType

Call = tuple[tuple[Any, ...], dict[str, Any]]

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTS = ("int64", "int32", "int16", "int8", "uint8")
COMPLEX = ("complex64", "complex128")
ALL = (*FLOATS, *INTS, "bool", *COMPLEX)
assert set(ALL) == set(DTYPES)

#: Mostly small and equal, so that operands often fit; sometimes 0.
SIZES = st.sampled_from([1, 2, 2, 3, 3, 4, 0])
DTYPE_NAMES = st.sampled_from(["float32", "float32", *ALL])
DIMS = st.integers(-4, 3)
DTYPE_VALUES = DTYPE_NAMES.map(DType)


def shapes(
    low: int = 0, high: int = 3, sizes: SearchStrategy[int] = SIZES
) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of ``low`` to ``high`` dimensions."""
    return st.lists(sizes, min_size=low, max_size=high).map(tuple)


def specs(
    low: int = 0,
    high: int = 3,
    dtypes: Sequence[str] | SearchStrategy[str] = DTYPE_NAMES,
    sizes: SearchStrategy[int] = SIZES,
) -> SearchStrategy[TensorSpec]:
    """Tensors of ``low`` to ``high`` dimensions."""
    names = dtypes if isinstance(dtypes, SearchStrategy) else st.sampled_from(list(dtypes))
    return st.builds(TensorSpec, shapes(low, high, sizes), names)


def call(*args: SearchStrategy[Any], **kwargs: SearchStrategy[Any]) -> SearchStrategy[Call]:
    """A call with these arguments; each keyword is left out half the time."""
    return st.tuples(st.tuples(*args), st.fixed_dictionaries({}, optional=kwargs))


@st.composite
def fitting(draw: st.DrawFn, count: int, dtypes: SearchStrategy[str] = DTYPE_NAMES) -> tuple[TensorSpec, ...]:
    """Tensors that mostly broadcast: each takes trailing sizes of one shape, with some ones."""
    whole = draw(shapes(0, 3))
    found = []
    for _ in range(count):
        tail = whole[draw(st.integers(0, len(whole))) :] if draw(st.booleans()) else whole
        shape = tuple(1 if draw(st.integers(0, 4)) == 0 else size for size in tail)
        if shape and draw(st.integers(0, 11)) == 0:
            shape = (5, *shape[1:])
        found.append(TensorSpec(shape, draw(dtypes)))
    return tuple(found)

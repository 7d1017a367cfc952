"""Generated arguments for the ops that index, shape, join and select; see ``op_strategies`` for the terms.

Those of linear algebra, sorting, functional and einops stand in files of their own and are gathered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import op_strategies_einsum
import op_strategies_functional
import op_strategies_linalg
from op_values import DIMS, DTYPE_NAMES, DTYPE_VALUES, Call, call, shapes, specs
from pellucid_shared.specs import TensorSpec
from pellucid_shared.values import Device, DType

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

NUMBERS = st.sampled_from([2, -1, 0, 0.5, -1.5, True, 1 + 1j, 300, float("nan")])


def names(text: str) -> list[str]:
    return text.split()


def drawn(make: Callable[[st.DrawFn], Call]) -> SearchStrategy[Call]:
    """A strategy from a function that draws a call."""
    return st.composite(make)()


def both(name: str, strategy: SearchStrategy[Call]) -> None:
    """The strategy of a function and of its in-place method."""
    STRATEGIES[f"torch.{name}"] = strategy
    STRATEGIES[f"tensor.{name}_"] = strategy


# --- getitem and setitem -----------------------------------------------------------------------------------

_SMALL = shapes(0, 4, st.sampled_from([1, 2, 3, 3]))
_ENDS = st.one_of(st.none(), st.integers(-4, 4))
_SLICES = st.builds(slice, _ENDS, _ENDS, st.sampled_from([None, None, 1, 2, 3]))


_PARTS = ["int", "slice", "slice", "none", "dots", "tensor", "list", "mask", "end"]


@st.composite
def _index(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    parts: list[Any] = []
    axis, dots = 0, False
    # How many elements a mask picks is its values' affair, so it is not mixed with index tensors here.
    kinds = _PARTS if draw(st.booleans()) else [k for k in _PARTS if k != "mask"]
    while axis < len(shape) or draw(st.integers(0, 9)) == 0:
        size = shape[axis] if axis < len(shape) else 2
        kind = draw(st.sampled_from(kinds))
        if kind == "end":
            break
        if kind in ("tensor", "list"):
            kinds = [k for k in kinds if k != "mask"]
        elif kind == "mask":
            kinds = [k for k in kinds if k not in ("tensor", "list", "mask")]
        if kind == "none":
            parts.append(None)
            continue
        if kind == "dots":
            if not dots:
                parts.append(Ellipsis)
            dots = True
            axis += draw(st.integers(0, len(shape)))
            continue
        if kind == "int":
            parts.append(draw(st.integers(-size - (draw(st.integers(0, 9)) == 0), size - 1)))
        elif kind == "slice":
            parts.append(draw(_SLICES))
        elif kind == "tensor":
            dtype = draw(st.sampled_from(["int64", "int64", "int32", "float32"]))
            parts.append(TensorSpec(draw(shapes(0, 2, st.sampled_from([1, 2, 2]))), dtype))
        elif kind == "list":
            parts.append(draw(st.lists(st.integers(-size, size - 1), min_size=0, max_size=2)))
        else:
            masked = shape[axis : axis + draw(st.integers(0, 2))]
            parts.append(TensorSpec(masked if draw(st.integers(0, 5)) else (*masked, 2), "bool"))
            axis += len(masked) - 1
        axis += 1
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


@drawn
def _getitem(draw: st.DrawFn) -> Call:
    shape = draw(_SMALL)
    return (TensorSpec(shape, draw(DTYPE_NAMES)), draw(_index(shape))), {}


@drawn
def _setitem(draw: st.DrawFn) -> Call:
    shape, dtype = draw(_SMALL), draw(DTYPE_NAMES)
    other = st.one_of(st.just(dtype), DTYPE_NAMES)
    index = draw(_index(shape))
    parts = index if isinstance(index, tuple) else (index,)
    masked = any(isinstance(part, TensorSpec) and part.dtype == "bool" for part in parts)
    sizes = st.just(1) if masked else st.sampled_from([1, 2, 3])
    value = draw(st.one_of(NUMBERS, specs(0, 2, other, sizes)))
    return (TensorSpec(shape, dtype), index, value), {}


STRATEGIES["getitem"] = _getitem
STRATEGIES["setitem"] = _setitem
STRICTER["setitem"] = "values that would lose an imaginary part or be cast where a GPU would refuse"

# --- shapes ------------------------------------------------------------------------------------------------

_LONG = st.integers(-1, 6)


@st.composite
def _factored(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes that mostly hold the elements of ``shape``."""
    rest = TensorSpec(shape).numel
    sizes = []
    for _ in range(draw(st.integers(0, 2))):
        divisors = [d for d in range(1, rest + 1) if rest % d == 0] or [0, 1]
        sizes.append(draw(st.sampled_from(divisors)))
        rest //= sizes[-1] or 1
    sizes.append(rest)
    at = draw(st.integers(0, len(sizes) - 1))
    sizes[at] = draw(st.sampled_from([sizes[at], -1, sizes[at] + 1, -1]))
    return tuple(sizes)


@drawn
def _view(draw: st.DrawFn) -> Call:
    x = draw(specs())
    sizes = draw(_factored(x.shape))
    return ((x, sizes) if draw(st.booleans()) else (x, *sizes)), {}


@drawn
def _view_as(draw: st.DrawFn) -> Call:
    x = draw(specs())
    return (x, TensorSpec(tuple(map(abs, draw(_factored(x.shape)))), draw(DTYPE_NAMES))), {}


@drawn
def _unflatten(draw: st.DrawFn) -> Call:
    x, dim = draw(specs(1)), draw(st.integers(-3, 2))
    return (x, dim, draw(_factored(x.shape[dim : dim + 1] if -x.ndim <= dim < x.ndim else (2,)))), {}


@drawn
def _permute(draw: st.DrawFn) -> Call:
    x = draw(specs(0, 4))
    dims = list(draw(st.permutations(range(x.ndim))))
    if dims and draw(st.integers(0, 5)) == 0:
        dims[0] = draw(DIMS)
    dims = [d - x.ndim if draw(st.booleans()) else d for d in dims]
    return ((x, tuple(dims)) if not dims or draw(st.booleans()) else (x, *dims)), {}


@drawn
def _expand(draw: st.DrawFn) -> Call:
    x = draw(specs())
    sizes = [draw(st.sampled_from([-1, s, 4 if s == 1 else s, 2])) for s in x.shape]
    extra = draw(st.lists(st.sampled_from([1, 2, 0, -1]), max_size=2))
    return (x, (*extra, *sizes)), {}


@drawn
def _expand_as(draw: st.DrawFn) -> Call:
    x = draw(specs())
    shape = (*draw(shapes(0, 1)), *(4 if s == 1 else s for s in x.shape))
    return (x, TensorSpec(shape[draw(st.integers(0, 1)) * (len(shape) > x.ndim) :])), {}


_ONE = call(specs())
_PAIRS = st.lists(DIMS, min_size=0, max_size=2).map(tuple)
for _name in ("tensor.view", "torch.reshape"):
    STRATEGIES[_name] = _view
for _name in ("tensor.view_as", "tensor.reshape_as"):
    STRATEGIES[_name] = _view_as
for _name in names("ravel t atleast_1d atleast_2d clone detach"):
    STRATEGIES[f"torch.{_name}"] = _ONE
for _name in names("contiguous float double half bfloat16 int long short bool"):
    STRATEGIES[f"tensor.{_name}"] = _ONE
STRATEGIES["torch.flatten"] = call(specs(), start_dim=DIMS, end_dim=DIMS)
STRATEGIES["torch.unflatten"] = _unflatten
STRATEGIES["torch.squeeze"] = call(specs(), dim=st.one_of(DIMS, _PAIRS))
STRATEGIES["torch.unsqueeze"] = call(specs(), DIMS)
for _name in names("transpose swapdims swapaxes"):
    STRATEGIES[f"torch.{_name}"] = call(specs(), DIMS, DIMS)
STRATEGIES["torch.permute"] = _permute
STRATEGIES["torch.movedim"] = st.one_of(call(specs(), DIMS, DIMS), call(specs(0, 4), _PAIRS, _PAIRS))
for _name in ("tensor.expand", "torch.broadcast_to"):
    STRATEGIES[_name] = _expand
    STRICTER[_name] = "a new axis of size -1, which torch takes for a tensor without dimensions"
STRATEGIES["tensor.expand_as"] = _expand_as
_TIMES = st.lists(st.integers(-1, 3), max_size=4).map(tuple)
STRATEGIES["tensor.repeat"] = call(specs(), _TIMES)
STRATEGIES["torch.tile"] = call(specs(), _TIMES)
STRICTER["torch.tile"] = "negative repeats, which torch overlooks in tensors without elements"
STRATEGIES["torch.repeat_interleave"] = call(specs(), st.integers(-1, 3), dim=DIMS)
STRATEGIES["torch.flip"] = call(specs(), _PAIRS)
STRATEGIES["torch.roll"] = st.one_of(
    call(specs(), st.integers(-3, 3)),
    call(specs(), st.integers(-3, 3), DIMS),
    call(specs(), st.tuples(st.integers(-3, 3), st.integers(-3, 3)), _PAIRS),
)
STRICTER["torch.roll"] = "a dim out of range, which torch overlooks for a tensor without elements"
STRATEGIES["torch.rot90"] = call(specs(1), k=st.integers(-3, 5), dims=_PAIRS)
STRATEGIES["tensor.unfold"] = call(specs(), DIMS, st.integers(0, 4), st.integers(0, 3))
STRATEGIES["tensor.to"] = st.one_of(
    call(specs(), DTYPE_VALUES, copy=st.booleans()),
    call(specs(), st.just(Device("cpu")), DTYPE_VALUES),
    call(specs(), specs()),
    call(specs(), dtype=DTYPE_VALUES, device=st.just(Device("cpu")), copy=st.booleans()),
    call(specs(), st.just(DType("float32")), dtype=DTYPE_VALUES),
)
STRATEGIES["tensor.type_as"] = call(specs(), specs())

# --- joining and parting -----------------------------------------------------------------------------------


@st.composite
def _alike(draw: st.DrawFn, low: int = 0) -> tuple[TensorSpec, ...]:
    """Tensors that mostly differ along one axis at most."""
    shape = draw(shapes(low, 3))
    at = draw(st.integers(0, max(len(shape) - 1, 0)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        other = draw(
            st.sampled_from([shape, shape, (*shape[:at], 2, *shape[at + 1 :]) if shape else (), (0,), (2,)])
        )
        found.append(TensorSpec(other, draw(DTYPE_NAMES)))
    return tuple(found)


for _name in names("cat concat concatenate"):
    STRATEGIES[f"torch.{_name}"] = call(_alike(), dim=DIMS)
    STRICTER[f"torch.{_name}"] = "a dim out of range, which torch overlooks in tensors without elements"
STRATEGIES["torch.stack"] = call(_alike(), dim=DIMS)
for _name in names("hstack vstack"):
    STRATEGIES[f"torch.{_name}"] = call(_alike())
_LENGTHS = st.lists(st.integers(-1, 3), max_size=3)
STRATEGIES["torch.split"] = call(specs(), st.one_of(st.integers(-1, 4), _LENGTHS), dim=DIMS)
_SUMS = st.sampled_from([[1, 1], [2], [1, 2], [3], [0, 3], [2, 2]])
STRATEGIES["torch.split_with_sizes"] = call(specs(1), st.one_of(_SUMS, _SUMS, _LENGTHS), dim=DIMS)
STRATEGIES["torch.chunk"] = call(specs(), st.integers(0, 5), dim=DIMS)
STRATEGIES["torch.tensor_split"] = call(
    specs(), st.one_of(st.integers(0, 5), st.lists(st.integers(-5, 5), max_size=3).map(tuple)), dim=DIMS
)
STRATEGIES["torch.unbind"] = call(specs(), dim=DIMS)


# --- selecting ---------------------------------------------------------------------------------------------

_INDEX_DTYPES = st.sampled_from(["int64", "int64", "int64", "int32", "float32"])
_FILLED = st.sampled_from([1, 2, 2, 3, 3, 4])
STRATEGIES["torch.select"] = call(specs(), DIMS, st.integers(-4, 3))
STRATEGIES["torch.narrow"] = call(specs(), DIMS, st.integers(-4, 4), st.integers(0, 3))
STRATEGIES["torch.index_select"] = call(specs(sizes=_FILLED), DIMS, specs(0, 2, _INDEX_DTYPES))


@st.composite
def _smaller(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorSpec:
    """An index tensor that mostly is no larger than ``shape``."""
    sizes = tuple(draw(st.integers(1, max(s, 1))) for s in shape)
    if draw(st.integers(0, 7)) == 0:
        sizes = draw(shapes(0, 3))
    return TensorSpec(sizes, draw(_INDEX_DTYPES))


@drawn
def _gather(draw: st.DrawFn) -> Call:
    x = draw(specs(sizes=_FILLED))
    return (x, draw(DIMS), draw(_smaller(x.shape))), {}


@drawn
def _scatter(draw: st.DrawFn) -> Call:
    x = draw(specs(sizes=_FILLED))
    index = draw(_smaller(x.shape))
    same = st.just(TensorSpec(index.shape, x.dtype))
    value = draw(st.one_of(NUMBERS, same, same, specs(dtypes=st.just(x.dtype)), specs()))
    return (x, draw(DIMS), index, value), {}


@drawn
def _placed(draw: st.DrawFn) -> Call:
    x, dim = draw(specs(sizes=_FILLED)), draw(DIMS)
    count = draw(st.integers(1, 3))
    source = [*x.shape]
    if -x.ndim <= dim < x.ndim:
        source[dim] = count
    dtype = draw(st.one_of(st.just(x.dtype), st.just(x.dtype), DTYPE_NAMES))
    shape = draw(st.sampled_from([tuple(source), tuple(source), tuple(source), (2,)]))
    index = TensorSpec(draw(st.sampled_from([(count,), (count,), (), (1, 1)])), draw(_INDEX_DTYPES))
    return (x, dim, index, TensorSpec(shape, dtype)), {}


@drawn
def _index_fill(draw: st.DrawFn) -> Call:
    value = draw(st.one_of(NUMBERS, specs(0, 1)))
    x = draw(specs(1, 3, sizes=_FILLED))
    index = draw(specs(0, 1 + (draw(st.integers(0, 7)) == 0), st.sampled_from(["int64", "int64", "int32"])))
    return (x, draw(st.integers(-x.ndim - 1, x.ndim - 1)), index, value), {}


@drawn
def _take_along_dim(draw: st.DrawFn) -> Call:
    x = draw(specs(sizes=_FILLED))
    shape = tuple(draw(st.sampled_from([1, s, s])) for s in x.shape)
    index = draw(st.one_of(st.just(TensorSpec(shape, "int64")), specs(0, 3, _INDEX_DTYPES, _FILLED)))
    return (x, index), draw(st.fixed_dictionaries({}, optional={"dim": DIMS}))


@st.composite
def _masked(draw: st.DrawFn) -> tuple[TensorSpec, TensorSpec]:
    shape = draw(shapes())
    mask = tuple(draw(st.sampled_from([1, s, s, s])) for s in shape[draw(st.integers(0, len(shape))) :])
    return TensorSpec(shape, draw(DTYPE_NAMES)), TensorSpec(
        (2, *mask) if draw(st.integers(0, 5)) == 0 else mask,
        draw(st.sampled_from(["bool", "bool", "bool", "bool", "uint8", "int64"])),
    )


@drawn
def _masked_fill(draw: st.DrawFn) -> Call:
    return (*draw(_masked()), draw(st.one_of(NUMBERS, specs(0, 1)))), {}


@drawn
def _masked_scatter(draw: st.DrawFn) -> Call:
    x, mask = draw(_masked())
    dtype = draw(st.sampled_from([x.dtype, x.dtype, x.dtype, "float64"]))
    return (x, mask, TensorSpec((500,), dtype)), {}


STRATEGIES["torch.gather"] = _gather
STRICTER["torch.gather"] = "an index of another dtype, which torch overlooks if it has no elements"
STRICTER["torch.take_along_dim"] = "int32 indices, which torch takes without a dim only"
STRATEGIES["torch.take"] = call(specs(sizes=_FILLED), specs(0, 2, _INDEX_DTYPES))
STRATEGIES["torch.take_along_dim"] = _take_along_dim
both("scatter", _scatter)
both("scatter_add", _scatter)
both("index_add", _placed)
both("index_copy", _placed)
both("index_fill", _index_fill)
both("masked_fill", _masked_fill)
both("masked_scatter", _masked_scatter)
for _name in names("torch.masked_fill tensor.masked_fill_"):
    STRICTER[_name] = "a fill that would lose an imaginary part"
STRATEGIES["torch.masked_select"] = st.tuples(_masked(), st.just({}))
STRATEGIES["torch.nonzero"] = call(specs(), as_tuple=st.booleans())
_OFFSETS = st.integers(-4, 4)
STRATEGIES["torch.diagonal"] = call(specs(1, 4), offset=_OFFSETS, dim1=DIMS, dim2=DIMS)
STRATEGIES["torch.diag"] = call(specs(), diagonal=_OFFSETS)
STRATEGIES["torch.diag_embed"] = call(specs(), offset=_OFFSETS, dim1=DIMS, dim2=DIMS)
both("tril", call(specs(0, 4), diagonal=_OFFSETS))
both("triu", call(specs(0, 4), diagonal=_OFFSETS))

for _name in names(
    "getitem setitem torch.index_select torch.gather torch.take torch.take_along_dim "
    "torch.scatter tensor.scatter_ torch.scatter_add tensor.scatter_add_ torch.index_add tensor.index_add_ "
    "torch.index_copy tensor.index_copy_ torch.index_fill tensor.index_fill_"
):
    INTEGER_FILL[_name] = 0

for _family in (op_strategies_linalg, op_strategies_einsum, op_strategies_functional):
    STRATEGIES.update(_family.STRATEGIES)
    STRICTER.update(_family.STRICTER)
    META_ONLY.update(_family.META_ONLY)
    REAL_ONLY.update(_family.REAL_ONLY)
    INTEGER_FILL.update(_family.INTEGER_FILL)

"""Ops that arrange the same elements under another shape: views, copies, and changes of dtype.

Specs carry no strides. ``view`` is accepted here when the element counts agree; on a tensor that is not
contiguous torch may still refuse it while the graph runs (``reshape`` never does: it copies then).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import IndexOutOfRangeError, OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .registry import Alias, Bound, Cost, Kind, Param
from .rules import INPUT, Rule, Shape, axes, axis, define, free, new_shape, per_result, shown, spelled

OTHER_TENSOR = Param("other", Kind.TENSOR)
_COPY = per_result(0)


def _if_copied(bound: Bound, result: Any) -> Cost:
    """A copy at worst."""
    return _COPY(bound, result)


def shaped(rule: Callable[[Shape, Bound], Sequence[int]]) -> Rule:
    """A rule about the shape alone: the dtype stays."""

    def apply(bound: Bound) -> TensorSpec:
        x: TensorSpec = bound["input"]
        return TensorSpec(tuple(rule(x.shape, bound)), x.dtype)

    return apply


def _method_and_function(name: str) -> tuple[str, ...]:
    return spelled(name, "torch", "Tensor")


# --- another shape, the same elements ----------------------------------------------------------------------


def inferred(shape: Shape, sizes: Sequence[int]) -> Shape:
    """``sizes`` with a -1 filled in, for the elements of a tensor of ``shape``.

    Raises:
        ShapeError: the counts do not agree; names both shapes.
        OpArgumentError: a negative size other than one -1.
    """
    bounded = any(isinstance(size, Dim) for size in shape)
    total = int(TensorSpec(shape).numel)
    known = 1
    for size in sizes:
        known *= int(size) if size != -1 else 1
    unknown = [i for i, size in enumerate(sizes) if size == -1]
    if len(unknown) > 1:
        raise OpArgumentError(f"one size may be -1, found {shown(sizes)}")
    new_shape([size for size in sizes if size != -1])
    if unknown:
        if known == 0 or (total % known and not bounded):
            raise ShapeError(f"a tensor of shape {shown(shape)} ({total} elements) is not {shown(sizes)}")
        found = Dim(total // known) if bounded else total // known
        return (*sizes[: unknown[0]], found, *sizes[unknown[0] + 1 :])
    if total != known and not (bounded and known <= total):
        raise ShapeError(
            f"a tensor of shape {shown(shape)} ({total} elements) does not fit {shown(sizes)} ({known})"
        )
    return tuple(sizes)


def _flatten(shape: Shape, bound: Bound) -> Shape:
    start, end = axis(bound["start_dim"], shape), axis(bound["end_dim"], shape)
    if start > end:
        raise OpArgumentError(f"start_dim {start} comes after end_dim {end}")
    if not shape:
        return (1,)
    return (*shape[:start], TensorSpec(shape[start : end + 1]).numel, *shape[end + 1 :])


def _unflatten(shape: Shape, bound: Bound) -> Shape:
    if not shape:
        raise ShapeError("a tensor without dimensions has none to unflatten")
    if not bound["sizes"]:
        raise OpArgumentError("sizes is empty")
    dim = axis(bound["dim"], shape)
    return (*shape[:dim], *inferred((shape[dim],), bound["sizes"]), *shape[dim + 1 :])


def _squeeze(shape: Shape, bound: Bound) -> Shape:
    if bound["dim"] == ():
        return shape
    dims = axes(bound["dim"], shape)
    return tuple(size for i, size in enumerate(shape) if i not in dims or size != 1 or isinstance(size, Dim))


def _unsqueeze(shape: Shape, bound: Bound) -> Shape:
    dim = axis(bound["dim"], shape, extra=1)
    return (*shape[:dim], 1, *shape[dim:])


def _view_as(shape: Shape, bound: Bound) -> Shape:
    return inferred(shape, bound["other"].shape)


_SIZES = Param("size", Kind.INTS, variadic=True)

define(
    "tensor.view",
    (INPUT, _SIZES),
    shaped(lambda shape, bound: inferred(shape, bound["size"])),
    free,
    alias=Alias.VIEW,
    spellings=spelled("view", "Tensor"),
)
define(
    "torch.reshape",
    (INPUT, Param("shape", Kind.INTS, variadic=True)),
    shaped(lambda shape, bound: inferred(shape, bound["shape"])),
    _if_copied,
    alias=Alias.MAYBE_VIEW,
    spellings=_method_and_function("reshape"),
    kernel="tensor.reshape",
)
define(
    "tensor.view_as",
    (INPUT, OTHER_TENSOR),
    shaped(_view_as),
    free,
    alias=Alias.VIEW,
    spellings=spelled("view_as", "Tensor"),
)
define(
    "tensor.reshape_as",
    (INPUT, OTHER_TENSOR),
    shaped(_view_as),
    _if_copied,
    alias=Alias.MAYBE_VIEW,
    spellings=spelled("reshape_as", "Tensor"),
)
for _name in ("flatten", "ravel"):
    _ends = (Param("start_dim", Kind.INT, 0), Param("end_dim", Kind.INT, -1))
    define(
        f"torch.{_name}",
        (INPUT, *_ends) if _name == "flatten" else (INPUT,),
        shaped(lambda shape, bound: _flatten(shape, {"start_dim": 0, "end_dim": -1, **bound})),
        _if_copied,
        alias=Alias.MAYBE_VIEW,
        spellings=_method_and_function(_name),
    )
define(
    "torch.unflatten",
    (INPUT, Param("dim", Kind.INT), Param("sizes", Kind.INTS)),
    shaped(_unflatten),
    free,
    alias=Alias.VIEW,
    spellings=_method_and_function("unflatten"),
)
define(
    "torch.squeeze",
    (INPUT, Param("dim", Kind.INTS, None)),
    shaped(_squeeze),
    free,
    alias=Alias.VIEW,
    spellings=_method_and_function("squeeze"),
)
define(
    "torch.unsqueeze",
    (INPUT, Param("dim", Kind.INT)),
    shaped(_unsqueeze),
    free,
    alias=Alias.VIEW,
    spellings=_method_and_function("unsqueeze"),
)


# --- the axes in another order -----------------------------------------------------------------------------


def _swapped(first: str, second: str) -> Callable[[Shape, Bound], Shape]:
    def rule(shape: Shape, bound: Bound) -> Shape:
        a, b = axis(bound[first], shape), axis(bound[second], shape)
        sizes = list(shape)
        if sizes:
            sizes[a], sizes[b] = sizes[b], sizes[a]
        return tuple(sizes)

    return rule


def _permute(shape: Shape, bound: Bound) -> Shape:
    dims = bound["dims"]
    if len(dims) != len(shape):
        raise ShapeError(f"dims {list(dims)} do not name each axis of a tensor of shape {shown(shape)} once")
    return tuple(shape[d] for d in (axes(dims, shape) if dims else ()))


def _movedim(shape: Shape, bound: Bound) -> Shape:
    if len(bound["source"]) != len(bound["destination"]):
        raise OpArgumentError("source and destination name as many axes as each other")
    if not bound["source"]:
        return shape
    source, destination = axes(bound["source"], shape), axes(bound["destination"], shape)
    if not shape:
        return shape
    rest = iter([i for i in range(len(shape)) if i not in source])
    moved = dict(zip(destination, source, strict=True))
    return tuple(shape[moved[i] if i in moved else next(rest)] for i in range(len(shape)))


def _t(shape: Shape, bound: Bound) -> Shape:
    if len(shape) > 2:
        raise ShapeError(f"t() takes at most 2 dimensions, found shape {shown(shape)}; use .mT or permute")
    return shape[::-1]


for _name, _first, _second in (
    ("transpose", "dim0", "dim1"),
    ("swapdims", "dim0", "dim1"),
    ("swapaxes", "axis0", "axis1"),
):
    define(
        f"torch.{_name}",
        (INPUT, Param(_first, Kind.INT), Param(_second, Kind.INT)),
        shaped(_swapped(_first, _second)),
        free,
        alias=Alias.VIEW,
        spellings=_method_and_function(_name),
    )
define(
    "torch.permute",
    (INPUT, Param("dims", Kind.INTS, variadic=True)),
    shaped(_permute),
    free,
    alias=Alias.VIEW,
    spellings=_method_and_function("permute"),
    kernel="tensor.permute",
)
define(
    "torch.movedim",
    (INPUT, Param("source", Kind.INTS), Param("destination", Kind.INTS)),
    shaped(_movedim),
    free,
    alias=Alias.VIEW,
    spellings=_method_and_function("movedim") + _method_and_function("moveaxis"),
)
define("torch.t", (INPUT,), shaped(_t), free, alias=Alias.VIEW, spellings=_method_and_function("t"))


# --- repeated elements -------------------------------------------------------------------------------------


def expanded(shape: Shape, sizes: Sequence[int]) -> Shape:
    """``shape`` stretched to ``sizes``, where -1 keeps a size.

    Raises:
        ShapeError: an axis that is not 1 would change; names both shapes.
    """
    new = len(sizes) - len(shape)
    padded = (*[1] * max(new, 0), *shape)
    for i, (size, old) in enumerate(zip(sizes, padded, strict=False)):
        fits = (i >= new and size == -1) or (
            size >= 0 and (old == 1 or same_size(old, size) or isinstance(old, Dim))
        )
        if not fits:
            new = -1
    if new < 0:
        raise ShapeError(f"a tensor of shape {shown(shape)} does not expand to {shown(sizes)}")
    return tuple(old if size == -1 else size for size, old in zip(sizes, padded, strict=True))


def _repeat(shape: Shape, bound: Bound) -> Shape:
    times = new_shape(bound["repeats"])
    if len(times) < len(shape):
        raise ShapeError(f"{len(times)} repeats are too few for a tensor of shape {shown(shape)}")
    padded = (*[1] * (len(times) - len(shape)), *shape)
    return tuple(size * n for size, n in zip(padded, times, strict=True))


def _tile(shape: Shape, bound: Bound) -> Shape:
    times = bound["dims"]
    return _repeat(shape, {"repeats": (*[1] * (len(shape) - len(times)), *times)})


def _repeat_interleave(shape: Shape, bound: Bound) -> Shape:
    times, dim = bound["repeats"], bound["dim"]
    if dim is None:
        return (TensorSpec(shape).numel * times,)
    if not shape:
        raise IndexOutOfRangeError(f"dim {dim} names an axis, and a tensor without dimensions has none")
    dim = axis(dim, shape)
    return (*shape[:dim], shape[dim] * times, *shape[dim + 1 :])


for _name, _rule in (
    ("tensor.expand", lambda shape, bound: expanded(shape, bound["size"])),
    ("torch.broadcast_to", lambda shape, bound: expanded(shape, bound["size"])),
):
    define(
        _name,
        (INPUT, Param("size", Kind.INTS, variadic=_name == "tensor.expand")),
        shaped(_rule),
        free,
        alias=Alias.VIEW,
        spellings=spelled("expand", "Tensor") if "expand" in _name else _method_and_function("broadcast_to"),
    )
define(
    "tensor.expand_as",
    (INPUT, OTHER_TENSOR),
    shaped(lambda shape, bound: expanded(shape, bound["other"].shape)),
    free,
    alias=Alias.VIEW,
    spellings=spelled("expand_as", "Tensor"),
)
define(
    "tensor.repeat",
    (INPUT, Param("repeats", Kind.INTS, variadic=True)),
    shaped(_repeat),
    per_result(),
    spellings=spelled("repeat", "Tensor"),
)
define(
    "torch.tile",
    (INPUT, Param("dims", Kind.INTS, variadic=True)),
    shaped(_tile),
    per_result(),
    alias=Alias.MAYBE_VIEW,
    spellings=_method_and_function("tile"),
    kernel="tensor.tile",
)
define(
    "torch.repeat_interleave",
    (INPUT, Param("repeats", Kind.INT, low=0, high=2**31), Param("dim", Kind.INT, None, optional=True)),
    shaped(_repeat_interleave),
    per_result(),
    spellings=_method_and_function("repeat_interleave"),
)


# --- the elements in another order -------------------------------------------------------------------------


def _flip(shape: Shape, bound: Bound) -> Shape:
    axes(bound["dims"], shape)
    return shape


def _roll(shape: Shape, bound: Bound) -> Shape:
    shifts, dims = bound["shifts"], bound["dims"]
    if not dims and len(shifts) == 1:
        return shape
    if len(shifts) != len(dims):
        raise OpArgumentError(f"{len(shifts)} shifts for {len(dims)} dims: give as many of each")
    if not shape and dims:
        raise IndexOutOfRangeError("a tensor without dimensions has no axis to roll along")
    for dim in dims:
        axis(dim, shape)
    return shape


def _rot90(shape: Shape, bound: Bound) -> Shape:
    dims = bound["dims"]
    if len(dims) != 2 or len(shape) < 2:
        raise ShapeError(f"turns the plane of two axes, found dims {list(dims)} and shape {shown(shape)}")
    a, b = axes(dims, shape)
    sizes = list(shape)
    if bound["k"] % 2:
        sizes[a], sizes[b] = sizes[b], sizes[a]
    return tuple(sizes)


define(
    "torch.flip",
    (INPUT, Param("dims", Kind.INTS, variadic=True)),
    shaped(_flip),
    per_result(),
    spellings=_method_and_function("flip"),
    kernel="tensor.flip",
)
define(
    "torch.roll",
    (INPUT, Param("shifts", Kind.INTS), Param("dims", Kind.INTS, ())),
    shaped(_roll),
    per_result(),
    spellings=_method_and_function("roll"),
)
define(
    "torch.rot90",
    (INPUT, Param("k", Kind.INT, 1), Param("dims", Kind.INTS, (0, 1))),
    shaped(_rot90),
    per_result(),
    spellings=_method_and_function("rot90"),
)


# --- windows and least ranks -------------------------------------------------------------------------------


def _unfold(shape: Shape, bound: Bound) -> Shape:
    dim, size, step = axis(bound["dimension"], shape), bound["size"], bound["step"]
    length = shape[dim] if shape else 1
    if size > length:
        raise ShapeError(f"windows of {size} do not fit axis {dim} of a tensor of shape {shown(shape)}")
    if not shape:
        return (size,)
    count = (length - size) // step + 1
    return (*shape[:dim], Dim(count) if isinstance(length, Dim) else count, *shape[dim + 1 :], size)


define(
    "tensor.unfold",
    (
        INPUT,
        Param("dimension", Kind.INT),
        Param("size", Kind.INT, low=0),
        Param("step", Kind.INT, low=1),
    ),
    shaped(_unfold),
    free,
    alias=Alias.VIEW,
    spellings=spelled("unfold", "Tensor"),
)
define(
    "torch.atleast_1d",
    (INPUT,),
    shaped(lambda shape, bound: shape or (1,)),
    free,
    alias=Alias.VIEW,
    spellings=spelled("atleast_1d", "torch"),
)
define(
    "torch.atleast_2d",
    (INPUT,),
    shaped(lambda shape, bound: shape if len(shape) > 1 else (1, *(shape or (1,)))),
    free,
    alias=Alias.VIEW,
    spellings=spelled("atleast_2d", "torch"),
)

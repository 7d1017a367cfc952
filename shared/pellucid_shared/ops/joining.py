"""Ops that join tensors into one, or part one into several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ..errors import IndexOutOfRangeError, OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .registry import MAX_LIST, Alias, Bound, Kind, Param
from .rules import INPUT, axis, define, free, new_shape, per_result, result_dtype, shown, spelled

_TENSORS = Param("tensors", Kind.TENSORS)


def _cat(tensors: Sequence[TensorSpec], dim: int) -> TensorSpec:
    # torch lets 1-d tensors without elements stand for nothing, whatever the others' shape.
    kept = [t for t in tensors if t.shape != (0,)] or [tensors[0]]
    dtype = result_dtype(*tensors)
    if any(not t.shape for t in tensors):
        raise ShapeError("tensors without dimensions cannot be concatenated; use torch.stack")
    first = kept[0].shape
    dim = axis(dim, first)
    total: int = 0
    for t in kept:
        rest, others = (*t.shape[:dim], *t.shape[dim + 1 :]), (*first[:dim], *first[dim + 1 :])
        if t.ndim != len(first) or not all(map(same_size, rest, others)):
            raise ShapeError(
                f"shapes {shown(first, t.shape)} differ in an axis other than {dim}, which they are joined on"
            )
        total = total + t.shape[dim]
    return TensorSpec((*first[:dim], total, *first[dim + 1 :]), dtype)


def _stack(bound: Bound) -> TensorSpec:
    tensors: tuple[TensorSpec, ...] = bound["tensors"]
    first = tensors[0].shape
    dim = axis(bound["dim"], first, extra=1)
    for t in tensors:
        if t.ndim != len(first) or not all(map(same_size, t.shape, first)):
            raise ShapeError(f"shapes {shown(first, t.shape)} are not equal, and stack needs equal ones")
    return TensorSpec((*first[:dim], len(tensors), *first[dim:]), result_dtype(*tensors))


def _hstack(bound: Bound) -> TensorSpec:
    tensors = [TensorSpec(t.shape or (1,), t.dtype) for t in bound["tensors"]]
    return _cat(tensors, 0 if tensors[0].ndim == 1 else 1)


def _vstack(bound: Bound) -> TensorSpec:
    tensors = [t if t.ndim > 1 else TensorSpec((1, *(t.shape or (1,))), t.dtype) for t in bound["tensors"]]
    return _cat(tensors, 0)


for _name in ("cat", "concat", "concatenate"):
    define(
        f"torch.{_name}",
        (_TENSORS, Param("dim", Kind.INT, 0)),
        lambda bound: _cat(bound["tensors"], bound["dim"]),
        per_result(),
        spellings=spelled(_name, "torch"),
    )
define(
    "torch.stack",
    (_TENSORS, Param("dim", Kind.INT, 0)),
    _stack,
    per_result(),
    spellings=spelled("stack", "torch"),
)
for _name, _rule in (("hstack", _hstack), ("vstack", _vstack)):
    define(f"torch.{_name}", (_TENSORS,), _rule, per_result(), spellings=spelled(_name, "torch"))


# --- parts -------------------------------------------------------------------------------------------------


def _along(x: TensorSpec, dim: int) -> int:
    """``dim`` from the front, of a tensor that has axes."""
    if not x.shape:
        raise IndexOutOfRangeError("a tensor without dimensions has no axis to be parted along")
    return axis(dim, x.shape)


def _parts(x: TensorSpec, dim: int, sizes: Sequence[int]) -> tuple[TensorSpec, ...]:
    if len(sizes) > MAX_LIST:
        raise OpArgumentError(f"gives {len(sizes)} parts; at most {MAX_LIST} are allowed")
    return tuple(TensorSpec((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.dtype) for size in sizes)


def _exact(x: TensorSpec, dim: int) -> int:
    """The size of an axis whose size decides how many parts there are."""
    size = x.shape[dim]
    if isinstance(size, Dim):
        raise ShapeError(
            f"axis {dim} of {x} depends on data, so the number of parts is not known; give their sizes"
        )
    return size


def _split(bound: Bound) -> tuple[TensorSpec, ...]:
    x, sizes = bound["input"], bound["split_size_or_sections"]
    dim = _along(x, bound["dim"])
    if isinstance(sizes, list | tuple):
        return _sections(x, dim, sizes)
    if not isinstance(sizes, int) or isinstance(sizes, bool) or sizes < 0:
        raise OpArgumentError(f"takes one size or a list of them, found {sizes!r}")
    length = _exact(x, dim)
    if length == 0:
        return _parts(x, dim, [0])
    if sizes == 0:
        raise OpArgumentError(f"parts of size 0 do not make up an axis of {length}")
    return _parts(x, dim, _even(length, sizes))


def _even(length: int, size: int) -> list[int]:
    if length // size >= MAX_LIST:
        raise OpArgumentError(f"gives {length // size} parts; at most {MAX_LIST} are allowed")
    return [min(size, length - start) for start in range(0, length, size)]


def _sections(x: TensorSpec, dim: int, sizes: Sequence[int]) -> tuple[TensorSpec, ...]:
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        raise OpArgumentError("the sizes of the parts are whole numbers")
    if not same_size(sum(new_shape(sizes)), x.shape[dim]):
        raise ShapeError(f"parts of sizes {list(sizes)} do not make up axis {dim} of {shown(x.shape)}")
    return _parts(x, dim, sizes)


def _chunk(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["input"]
    dim = _along(x, bound["dim"])
    length, chunks = _exact(x, dim), bound["chunks"]
    if length == 0:
        return _parts(x, dim, [0] * chunks)
    return _parts(x, dim, _even(length, -(-length // chunks)))


def _tensor_split(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["input"]
    dim, asked = _along(x, bound["dim"]), bound["indices_or_sections"]
    length = _exact(x, dim)
    if isinstance(asked, int) and not isinstance(asked, bool):
        if not 1 <= asked <= MAX_LIST:
            raise OpArgumentError(f"the number of parts lies in [1, {MAX_LIST}], found {asked}")
        return _parts(x, dim, [length // asked + (i < length % asked) for i in range(asked)])
    if not isinstance(asked, list | tuple) or not all(isinstance(i, int) for i in asked):
        raise OpArgumentError(f"takes a number of parts or the places to cut at, found {asked!r}")
    cuts = [0, *asked]
    sizes = [len(range(*slice(start, stop).indices(length))) for start, stop in pairwise(cuts)]
    sizes.append(len(range(*slice(cuts[-1], None).indices(length))))
    return _parts(x, dim, sizes)


def _unbind(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["input"]
    dim = _along(x, bound["dim"])
    if (count := _exact(x, dim)) > MAX_LIST:
        raise OpArgumentError(f"gives {count} parts; at most {MAX_LIST} are allowed")
    return (TensorSpec((*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype),) * count


_DIM = Param("dim", Kind.INT, 0)


def _define_parts(name: str, params: Sequence[Param], rule: Callable[[Bound], Any]) -> None:
    define(
        f"torch.{name}",
        (INPUT, *params, _DIM),
        rule,
        free,
        alias=Alias.VIEW,
        spellings=spelled(name, "torch", "Tensor"),
    )


_define_parts("split", [Param("split_size_or_sections", Kind.ANY)], _split)
_define_parts(
    "split_with_sizes",
    [Param("split_sizes", Kind.INTS)],
    lambda b: _sections(b["input"], _along(b["input"], b["dim"]), b["split_sizes"]),
)
_define_parts("chunk", [Param("chunks", Kind.INT, low=1, high=MAX_LIST)], _chunk)
_define_parts("tensor_split", [Param("indices_or_sections", Kind.ANY)], _tensor_split)
_define_parts("unbind", [], _unbind)

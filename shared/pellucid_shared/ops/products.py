"""Products of vectors and matrices: matmul and its kin, outer products, distances, covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec, broadcast, promote, same_size
from .registry import Bound, Cost, Kind, Param
from .rules import (
    INPUT,
    KEEPDIM,
    CostRule,
    Rule,
    Shape,
    axes,
    axis,
    broadcast_all,
    category,
    define,
    per_input,
    per_result,
    result_dtype,
    same_dtype,
    shown,
    specs_in,
    spelled,
    take,
    to_float,
    to_sum,
)


def tensor(name: str) -> Param:
    """A required tensor."""
    return Param(name, Kind.TENSOR)


def contraction(size: Any) -> CostRule:
    """A multiplication and an addition per element of the result and of ``size(bound)``, the summed axis."""

    def cost(bound: Bound, result: TensorSpec) -> Cost:
        return Cost(2 * int(result.numel) * int(size(bound)), result.nbytes)

    return cost


def ranked(spec: TensorSpec, rank: int, name: str) -> Shape:
    """The shape, or ShapeError unless the tensor has ``rank`` dimensions."""
    if spec.ndim != rank:
        kind = {1: "a vector", 2: "a matrix", 3: "a batch of matrices"}[rank]
        raise ShapeError(f"{name} is {kind}, found shape {shown(spec.shape)}")
    return spec.shape


def agree(a: int, b: int, *shapes: Sequence[int]) -> None:
    """Raise ShapeError, naming the shapes, unless two sizes are one."""
    if not same_size(a, b):
        raise ShapeError(f"shapes {shown(*shapes)} do not multiply: {a} is not {b}")


def multiplied(a: Shape, b: Shape) -> Shape:
    """The shape of ``a @ b``: vectors are rows on the left and columns on the right, batches broadcast.

    Raises:
        ShapeError: names both shapes.
    """
    if not a or not b:
        raise ShapeError(f"shapes {shown(a, b)} do not multiply: both have dimensions; use * for a scalar")
    agree(a[-1], b[-2] if len(b) > 1 else b[0], a, b)
    batch = broadcast(a[:-2], b[:-2])
    if batch is None:
        raise ShapeError(f"the batches of shapes {shown(a, b)} do not broadcast")
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _pair(*, ranks: tuple[int, int] | None = None, batched: bool = False) -> Rule:
    """``input`` times a second tensor of its dtype, both of given ranks."""

    def rule(bound: Bound) -> TensorSpec:
        (_, a), (name, b) = list(bound.items())[:2]
        if ranks is not None:
            ranked(a, ranks[0], "input")
            ranked(b, ranks[1], name)
        if batched:
            agree(a.shape[0], b.shape[0], a.shape, b.shape)
        return TensorSpec(multiplied(a.shape, b.shape), same_dtype(a, b))

    return rule


def _last(bound: Bound) -> int:
    shape: Shape = bound["input"].shape
    return shape[-1] if shape else 1


_INNER = contraction(_last)

define(
    "torch.matmul",
    (INPUT, tensor("other")),
    _pair(),
    _INNER,
    spellings=spelled("matmul", "torch", "Tensor") + spelled("matmul", "linalg"),
)
for _name, _second, _ranks in (
    ("mm", "mat2", (2, 2)),
    ("bmm", "mat2", (3, 3)),
    ("mv", "vec", (2, 1)),
    ("dot", "tensor", (1, 1)),
    ("vdot", "other", (1, 1)),
):
    define(
        f"torch.{_name}",
        (INPUT, tensor(_second)),
        _pair(ranks=_ranks, batched=_name == "bmm"),
        _INNER,
        spellings=spelled(_name, "torch", "Tensor"),
    )


def _inner(bound: Bound) -> TensorSpec:
    a, b = bound["input"], bound["other"]
    dtype = same_dtype(a, b) if a.shape and b.shape else result_dtype(a, b)
    if not a.shape or not b.shape:
        return TensorSpec(a.shape + b.shape, dtype)
    agree(a.shape[-1], b.shape[-1], a.shape, b.shape)
    return TensorSpec(a.shape[:-1] + b.shape[:-1], dtype)


def _outer(bound: Bound) -> TensorSpec:
    a, b = bound["input"], bound["vec2"]
    return TensorSpec(ranked(a, 1, "input") + ranked(b, 1, "vec2"), result_dtype(a, b))


def _kron(bound: Bound) -> TensorSpec:
    a, b = bound["input"], bound["other"]
    rank = max(a.ndim, b.ndim)
    left = (*[1] * (rank - a.ndim), *a.shape)
    right = (*[1] * (rank - b.ndim), *b.shape)
    return TensorSpec(tuple(x * y for x, y in zip(left, right, strict=True)), promote(a.dtype, b.dtype))


define(
    "torch.inner",
    (INPUT, tensor("other")),
    _inner,
    _INNER,
    spellings=spelled("inner", "torch", "Tensor"),
)
define(
    "torch.outer",
    (INPUT, tensor("vec2")),
    _outer,
    per_result(),
    spellings=spelled("outer", "torch", "Tensor") + spelled("ger", "torch", "Tensor"),
)
define(
    "torch.kron",
    (INPUT, tensor("other")),
    _kron,
    per_result(),
    spellings=spelled("kron", "torch", "Tensor"),
)


# --- a product added to something --------------------------------------------------------------------------


def _added(first: str, second: str, rank: int) -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        x, a, b = bound["input"], bound[first], bound[second]
        ranked(a, rank, first)
        ranked(b, rank, second)
        if rank == 3:
            agree(a.shape[0], b.shape[0], a.shape, b.shape)
        shape = multiplied(a.shape, b.shape)
        if x.ndim > len(shape) or broadcast(x.shape, shape) != shape:
            raise ShapeError(
                f"input {shown(x.shape)} does not broadcast to the product's shape {shown(shape)}"
            )
        for name in ("beta", "alpha"):
            if isinstance(bound[name], complex) and category(x.dtype) != 3:
                raise OpArgumentError(f"{name} is complex and the tensors are not")
            if isinstance(bound[name], float) and category(x.dtype) < 2:
                raise OpArgumentError(f"{name} is a whole number where the tensors hold whole numbers")
        return TensorSpec(shape, same_dtype(x, a, b))

    return rule


for _name, _first, _second, _rank in (
    ("addmm", "mat1", "mat2", 2),
    ("baddbmm", "batch1", "batch2", 3),
):
    define(
        f"torch.{_name}",
        (
            INPUT,
            tensor(_first),
            tensor(_second),
            Param("beta", Kind.NUMBER, 1, keyword_only=True),
            Param("alpha", Kind.NUMBER, 1, keyword_only=True),
        ),
        _added(_first, _second, _rank),
        contraction(lambda bound: list(bound.values())[1].shape[-1]),
        spellings=spelled(_name, "torch", "Tensor"),
    )


def _chain(bound: Bound) -> TensorSpec:
    tensors: tuple[TensorSpec, ...] = bound["tensors"]
    if len(tensors) < 2:
        raise OpArgumentError("multiplies two tensors at least")
    shape = tensors[0].shape
    for i, t in enumerate(tensors):
        if t.ndim != 2 and not (t.ndim == 1 and i in (0, len(tensors) - 1)):
            raise ShapeError(
                f"tensor {i} is no matrix (only the first and last may be vectors): {shown(t.shape)}"
            )
        shape = multiplied(shape, t.shape) if i else shape
    return TensorSpec(shape, same_dtype(*tensors))


def _chain_cost(bound: Bound, result: TensorSpec) -> Cost:
    # The best order costs no more than going from left to right.
    total, rows = 0, math.prod(bound["tensors"][0].shape[:-1])
    for t in bound["tensors"][1:]:
        total += 2 * int(rows) * int(t.numel)
    return Cost(total, result.nbytes)


define(
    "torch.linalg.multi_dot",
    (Param("tensors", Kind.TENSORS),),
    _chain,
    _chain_cost,
    spellings=spelled("multi_dot", "linalg"),
)


# --- tensordot ---------------------------------------------------------------------------------------------


def _contracted(bound: Bound) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b, dims = bound["a"], bound["b"], bound["dims"]
    if isinstance(dims, int) and not isinstance(dims, bool):
        if not 0 <= dims <= min(a.ndim, b.ndim):
            raise OpArgumentError(f"sums over {dims} axes of shapes {shown(a.shape, b.shape)}")
        return tuple(range(a.ndim - dims, a.ndim)), tuple(range(dims))
    pairs = isinstance(dims, list | tuple) and len(dims) == 2
    if not pairs or not all(isinstance(side, list | tuple) for side in dims):
        raise OpArgumentError("dims is a number of axes, or a pair of lists of axes")
    left, right = (axes(tuple(side), x.shape) if side else () for side, x in ((dims[0], a), (dims[1], b)))
    return left, right


def _tensordot(bound: Bound) -> TensorSpec:
    a, b = bound["a"], bound["b"]
    left, right = _contracted(bound)
    if len(left) != len(right):
        raise OpArgumentError(f"dims pair {len(left)} axes with {len(right)}")
    for i, j in zip(left, right, strict=True):
        if a.shape[i] != 1 and b.shape[j] != 1:
            agree(a.shape[i], b.shape[j], a.shape, b.shape)
    kept = [s for i, s in enumerate(a.shape) if i not in left]
    kept += [s for j, s in enumerate(b.shape) if j not in right]
    return TensorSpec(tuple(kept), same_dtype(a, b))


define(
    "torch.tensordot",
    (tensor("a"), tensor("b"), Param("dims", Kind.ANY, 2)),
    _tensordot,
    contraction(lambda bound: math.prod(bound["a"].shape[i] for i in _contracted(bound)[0])),
    spellings=spelled("tensordot", "torch"),
)


# --- vectors against vectors -------------------------------------------------------------------------------


def _cross(bound: Bound) -> TensorSpec:
    a, b = bound["input"], bound["other"]
    shape = broadcast_all(a, b)
    if a.ndim != b.ndim or not shape:
        raise ShapeError(f"shapes {shown(a.shape, b.shape)} differ in rank")
    dim = axis(bound["dim"], shape)
    if a.shape[dim] != 3 or b.shape[dim] != 3:
        raise ShapeError(f"crosses vectors of 3, found shapes {shown(a.shape, b.shape)} along dim {dim}")
    return TensorSpec(shape, same_dtype(a, b))


def _cdist(bound: Bound) -> TensorSpec:
    a, b = bound["x1"], bound["x2"]
    if a.ndim < 2 or b.ndim < 2:
        raise ShapeError(f"takes rows of vectors, found shapes {shown(a.shape, b.shape)}")
    agree(a.shape[-1], b.shape[-1], a.shape, b.shape)
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    if batch is None:
        raise ShapeError(f"the batches of shapes {shown(a.shape, b.shape)} do not broadcast")
    return TensorSpec((*batch, a.shape[-2], b.shape[-2]), take(same_dtype(a, b), "f"))


def _cosine(bound: Bound) -> TensorSpec:
    a, b = bound["x1"], bound["x2"]
    shape = broadcast_all(a, b)
    dim = axis(bound["dim"], shape)
    return TensorSpec((*shape[:dim], *shape[dim + 1 :]), take(result_dtype(a, b), "f"))


def _pairwise(bound: Bound) -> TensorSpec:
    a, b = bound["x1"], bound["x2"]
    shape = broadcast_all(a, b)
    take(a.dtype, "ifc")
    take(b.dtype, "ifc")
    dtype = to_float(result_dtype(a, b))
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    kept = (1,) if bound["keepdim"] and shape else ()
    return TensorSpec((*shape[:-1], *kept), real)


_EPS = Param("eps", Kind.NUMBER, 1e-8)
_POWER = Param("p", Kind.NUMBER, 2.0, low=-float("inf"), high=float("inf"))
define(
    "torch.linalg.cross",
    (INPUT, tensor("other"), Param("dim", Kind.INT, -1, keyword_only=True)),
    _cross,
    per_result(5),
    spellings=spelled("cross", "linalg"),
)
define(
    "torch.cdist",
    (tensor("x1"), tensor("x2"), Param("p", Kind.NUMBER, 2.0, low=0, high=float("inf"))),
    _cdist,
    lambda bound, result: Cost(3 * int(result.numel) * int(bound["x1"].shape[-1]), result.nbytes),
    spellings=spelled("cdist", "torch"),
)
define(
    "torch.cosine_similarity",
    (tensor("x1"), tensor("x2"), Param("dim", Kind.INT, 1), _EPS),
    _cosine,
    per_input(6),
    spellings=spelled("cosine_similarity", "torch", "F"),
)
define(
    "torch.pairwise_distance",
    (tensor("x1"), tensor("x2"), _POWER, Param("eps", Kind.NUMBER, 1e-6), KEEPDIM),
    _pairwise,
    per_input(4),
    spellings=spelled("pairwise_distance", "torch", "F"),
)


# --- one matrix --------------------------------------------------------------------------------------------


def _trace(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    ranked(x, 2, "input")
    return TensorSpec((), to_sum(take(x.dtype, "ifc")))


def _covariance(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    if x.ndim > 2:
        raise ShapeError(f"takes one row per variable, found shape {shown(x.shape)}")
    shape = (x.shape[0], x.shape[0]) if x.ndim == 2 and x.shape[0] != 1 else ()
    return TensorSpec(shape, to_float(take(x.dtype, "ifc")))


def _covariance_cost(bound: Bound, result: TensorSpec) -> Cost:
    x: TensorSpec = bound["input"]
    rows = x.shape[0] if x.ndim == 2 else 1
    return Cost(2 * int(x.numel) * int(rows), result.nbytes + sum(s.nbytes for s in specs_in(x)))


define("torch.trace", (INPUT,), _trace, per_input(), spellings=spelled("trace", "torch", "Tensor"))
define(
    "torch.cov",
    (INPUT, Param("correction", Kind.INT, 1, keyword_only=True)),
    _covariance,
    _covariance_cost,
    spellings=spelled("cov", "torch", "Tensor"),
)
define(
    "torch.corrcoef",
    (INPUT,),
    _covariance,
    _covariance_cost,
    spellings=spelled("corrcoef", "torch", "Tensor"),
)

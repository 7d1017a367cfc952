"""``torch.linalg``: norms, decompositions, inverses and solutions, over batches of matrices.

Costs are the usual leading terms for dense matrices (Golub & Van Loan, *Matrix Computations*, 4th ed.).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import DTYPES, TensorSpec, broadcast, same_size
from .registry import Bound, Cost, Kind, Param
from .rules import (
    KEEPDIM,
    CostRule,
    Rule,
    Shape,
    axes,
    category,
    define,
    per_input,
    reduced,
    same_dtype,
    shown,
    specs_in,
    spelled,
    take,
    to_real,
)

A = Param("A", Kind.TENSOR)
INF = float("inf")
_HALF = ("float16", "bfloat16")
_DTYPE = Param("dtype", Kind.DTYPE, None, optional=True, keyword_only=True)
_MATRIX_ORDERS = ("fro", "nuc", INF, -INF, 1, -1, 2, -2)


def matrices(spec: TensorSpec, *, square: bool = False) -> tuple[Shape, int, int]:
    """Batch shape, rows and columns.

    Raises:
        ShapeError: fewer than two dimensions, not square where it must be, or a dtype no decomposition takes.
    """
    take(spec.dtype, "fc")
    if spec.dtype in _HALF:
        raise ShapeError(f"takes float32, float64 or complex, found {spec.dtype}; convert with .float()")
    if spec.ndim < 2:
        raise ShapeError(f"takes matrices, found shape {shown(spec.shape)}")
    rows, columns = spec.shape[-2:]
    if square and not same_size(rows, columns):
        raise ShapeError(f"takes square matrices, found shape {shown(spec.shape)}")
    return spec.shape[:-2], rows, columns


def cubic(weight: float) -> CostRule:
    """``weight * rows * columns * min(rows, columns)`` for each matrix."""

    def cost(bound: Bound, result: Any) -> Cost:
        x: TensorSpec = bound["A"]
        flops = weight * int(x.numel) * min(map(int, x.shape[-2:]))
        return Cost(int(flops), sum(s.nbytes for s in specs_in(result)))

    return cost


def _define(
    name: str, params: tuple[Param, ...], rule: Rule, cost: CostRule, fields: tuple[str, ...] = ()
) -> None:
    define(f"torch.linalg.{name}", params, rule, cost, spellings=spelled(name, "linalg"), fields=fields)


# --- decompositions ----------------------------------------------------------------------------------------


def _svd(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["A"]
    batch, m, n = matrices(x)
    k = min(m, n)
    full = bound["full_matrices"]
    return (
        TensorSpec((*batch, m, m if full else k), x.dtype),
        TensorSpec((*batch, k), to_real(x.dtype)),
        TensorSpec((*batch, n if full else k, n), x.dtype),
    )


def _svdvals(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["A"]
    batch, m, n = matrices(x)
    return TensorSpec((*batch, min(m, n)), to_real(x.dtype))


def _qr(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["A"]
    batch, m, n = matrices(x)
    k, mode = min(m, n), bound["mode"]
    if mode == "complete":
        return TensorSpec((*batch, m, m), x.dtype), TensorSpec((*batch, m, n), x.dtype)
    q = TensorSpec((*batch, m, k), x.dtype) if mode == "reduced" else TensorSpec((0,), x.dtype)
    return q, TensorSpec((*batch, k, n), x.dtype)


def _eigh(bound: Bound) -> tuple[TensorSpec, ...]:
    x: TensorSpec = bound["A"]
    batch, n, _ = matrices(x, square=True)
    return TensorSpec((*batch, n), to_real(x.dtype)), x


def _square(result: Callable[[TensorSpec, Shape], Any]) -> Rule:
    """A rule about square matrices: ``result(spec, batch)``."""

    def rule(bound: Bound) -> Any:
        x: TensorSpec = bound["A"]
        return result(x, matrices(x, square=True)[0])

    return rule


_UPLO = Param("UPLO", Kind.STR, "L", choices=("L", "U"))
_define(
    "svd",
    (A, Param("full_matrices", Kind.BOOL, True)),
    _svd,
    cubic(20),
    fields=("U", "S", "Vh"),
)
_define("svdvals", (A,), _svdvals, cubic(4))
_define(
    "qr",
    (A, Param("mode", Kind.STR, "reduced", choices=("reduced", "complete", "r"))),
    _qr,
    cubic(4),
    fields=("Q", "R"),
)
_define("eigh", (A, _UPLO), _eigh, cubic(9), fields=("eigenvalues", "eigenvectors"))
_define("eigvalsh", (A, _UPLO), lambda bound: _eigh(bound)[0], cubic(4 / 3))
_define("cholesky", (A,), _square(lambda x, batch: x), cubic(1 / 3))
_define("det", (A,), _square(lambda x, batch: TensorSpec(batch, x.dtype)), cubic(2 / 3))
_define(
    "slogdet",
    (A,),
    _square(lambda x, batch: (TensorSpec(batch, x.dtype), TensorSpec(batch, to_real(x.dtype)))),
    cubic(2 / 3),
    fields=("sign", "logabsdet"),
)


# --- inverses and solutions --------------------------------------------------------------------------------


def _pinv(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["A"]
    batch, m, n = matrices(x, square=bound["hermitian"])
    return TensorSpec((*batch, n, m), x.dtype)


def _matrix_rank(bound: Bound) -> TensorSpec:
    return TensorSpec(matrices(bound["A"], square=bound["hermitian"])[0], "int64")


def _cond(bound: Bound) -> TensorSpec:
    x, p = bound["A"], bound["p"]
    if p is not None and p not in _MATRIX_ORDERS:
        raise OpArgumentError(f"'p' is one of {', '.join(map(repr, _MATRIX_ORDERS))}, found {p!r}")
    batch, _, _ = matrices(x, square=p not in (None, 2, -2))
    return TensorSpec(batch, to_real(x.dtype))


def _solve(bound: Bound) -> TensorSpec:
    a, b = bound["A"], bound["B"]
    batch, n, _ = matrices(a, square=True)
    dtype = same_dtype(a, b)
    # B is a batch of vectors if it is one vector, or has exactly the shape of A without its columns.
    if b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1]):
        known: Shape = (*b.shape, 1)
        if not bound["left"]:
            raise OpArgumentError("left=False takes matrices B, not vectors")
    else:
        known = b.shape
    if len(known) < 2 or not same_size(known[-2] if bound["left"] else known[-1], n):
        raise ShapeError(f"A of shape {shown(a.shape)} and B of shape {shown(b.shape)} do not fit")
    together = broadcast(batch, known[:-2])
    if together is None:
        raise ShapeError(f"the batches of shapes {shown(a.shape, b.shape)} do not broadcast")
    vector = len(known) > b.ndim
    return TensorSpec((*together, n) if vector else (*together, *known[-2:]), dtype)


def _solve_cost(bound: Bound, result: TensorSpec) -> Cost:
    n = int(bound["A"].shape[-1])
    return Cost(int(2 / 3 * n * int(bound["A"].numel)) + 2 * n * int(result.numel), result.nbytes)


_TOLERANCES = (
    Param("atol", Kind.NUMBER, None, optional=True, keyword_only=True, low=0),
    Param("rtol", Kind.NUMBER, None, optional=True, keyword_only=True, low=0),
    Param("hermitian", Kind.BOOL, False, keyword_only=True),
)
_define("inv", (A,), _square(lambda x, batch: x), cubic(2))
_define("pinv", (A, *_TOLERANCES), _pinv, cubic(22))
_define(
    "solve",
    (A, Param("B", Kind.TENSOR), Param("left", Kind.BOOL, True, keyword_only=True)),
    _solve,
    _solve_cost,
)
_define("matrix_rank", (A, *_TOLERANCES), _matrix_rank, cubic(4))
_define("cond", (A, Param("p", Kind.ANY, None)), _cond, cubic(4))


# --- norms -------------------------------------------------------------------------------------------------


def _norm_dtype(dtype: str, asked: str | None) -> str:
    """The (real) dtype of a norm; ``asked`` is what the elements are converted to first."""
    take(dtype, "fc")
    if asked is not None:
        if category(asked) != category(dtype):
            raise ShapeError(f"a {dtype} tensor has no norm in {asked}")
        if DTYPES[asked].itemsize < DTYPES[dtype].itemsize or (
            asked != dtype and {asked, dtype} == set(_HALF)
        ):
            raise ShapeError(f"a norm of a {dtype} tensor in {asked} would lose precision")
    return to_real(asked or dtype)


def _not_empty(shape: Shape, dims: tuple[int, ...], order: Any) -> None:
    """Norms of negative or infinite order have no value over no elements."""
    if isinstance(order, int | float) and (order < 0 or order == INF):
        sizes = [shape[d] for d in dims]
        if any(size == 0 for size in sizes):
            raise ShapeError(f"the norm of order {order} needs elements, found shape {shown(shape)}")


def _vector_norm(bound: Bound) -> TensorSpec:
    x, order = bound["x"], bound["ord"]
    dtype = _norm_dtype(x.dtype, bound["dtype"])
    dims = axes(bound["dim"], x.shape)
    _not_empty(x.shape, dims, order)
    return TensorSpec(reduced(x.shape, dims, bound["keepdim"]), dtype)


def _matrix_norm(bound: Bound) -> TensorSpec:
    x, order, dim = bound["A"], bound["ord"], bound["dim"]
    if order not in _MATRIX_ORDERS:
        raise OpArgumentError(f"'ord' is one of {', '.join(map(repr, _MATRIX_ORDERS))}, found {order!r}")
    if x.ndim < 2:
        raise ShapeError(f"takes matrices, found shape {shown(x.shape)}")
    if len(dim) != 2:
        raise OpArgumentError(f"'dim' names two axes, found {list(dim)}")
    dtype = _norm_dtype(x.dtype, bound["dtype"])
    if order in ("nuc", 2, -2) and x.dtype in _HALF:
        raise ShapeError(f"takes float32, float64 or complex, found {x.dtype}; convert with .float()")
    dims = axes(dim, x.shape)
    _matrix_not_empty(x.shape, dims, order)
    return TensorSpec(reduced(x.shape, dims, bound["keepdim"]), dtype)


def _matrix_not_empty(shape: Shape, dims: tuple[int, ...], order: Any) -> None:
    if order in (2, -2):
        _not_empty((min(shape[d] for d in dims),), (0,), INF)
    elif order in (1, -1, INF, -INF):
        _not_empty(shape, (dims[1] if abs(order) == 1 else dims[0],), INF)


def _norm(bound: Bound) -> TensorSpec:
    x, order, dim = bound["A"], bound["ord"], bound["dim"]
    if dim is not None and len(dim) not in (1, 2):
        raise OpArgumentError(f"'dim' names one or two axes, found {list(dim)}")
    if order is None:
        return _vector_norm({**bound, "x": x, "ord": 2})
    if dim is None and x.ndim not in (1, 2):
        raise ShapeError(f"an order without 'dim' is for a vector or a matrix, found shape {shown(x.shape)}")
    if (len(dim) if dim is not None else x.ndim) == 2:
        return _matrix_norm({**bound, "dim": dim or (0, 1)})
    if isinstance(order, str):
        raise OpArgumentError(f"the order of a vector norm is a number, found {order!r}")
    return _vector_norm({**bound, "x": x})


def _norm_cost(bound: Bound, result: TensorSpec) -> Cost:
    x: TensorSpec = bound["A"]
    spectral = bound["ord"] in ("nuc", 2, -2) and x.ndim >= 2
    side = sorted(map(int, x.shape))[-2] if spectral else 1
    return Cost((4 * side if spectral else 2) * int(x.numel), result.nbytes)


_DIM = Param("dim", Kind.INTS, None, optional=True)
_define(
    "vector_norm",
    (Param("x", Kind.TENSOR), Param("ord", Kind.NUMBER, 2, low=-INF, high=INF), _DIM, KEEPDIM, _DTYPE),
    _vector_norm,
    per_input(2),
)
_define(
    "matrix_norm",
    (A, Param("ord", Kind.ANY, "fro"), Param("dim", Kind.INTS, (-2, -1)), KEEPDIM, _DTYPE),
    _matrix_norm,
    _norm_cost,
)
_define("norm", (A, Param("ord", Kind.ANY, None), _DIM, KEEPDIM, _DTYPE), _norm, _norm_cost)

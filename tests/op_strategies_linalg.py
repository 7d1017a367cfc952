"""Generated arguments for products and ``torch.linalg``; see ``op_strategies`` for the terms."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from op_values import DIMS, DTYPE_VALUES, Call, call, fitting, specs
from pellucid_shared.specs import TensorSpec

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

_NUMERIC = ["float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "complex64"]
_SIDES = st.sampled_from([1, 2, 3, 3])


@st.composite
def _dtypes(draw: st.DrawFn, count: int) -> list[str]:
    """Mostly one dtype."""
    first = draw(st.sampled_from(_NUMERIC))
    found = [first] * count
    if draw(st.integers(0, 5)) == 0:
        found[-1] = draw(st.sampled_from(_NUMERIC))
    return found


def chain(*layouts: str) -> SearchStrategy[Call]:
    """Tensors whose axes are letters: those of one letter mostly agree."""

    @st.composite
    def make(draw: st.DrawFn) -> Call:
        layout = draw(st.sampled_from(layouts)).split(",")
        sizes = {letter: draw(_SIDES) for letter in "abijkl"}
        sizes["c"] = 3
        dtypes = draw(_dtypes(len(layout)))
        found = []
        for letters, dtype in zip(layout, dtypes, strict=True):
            shape = [sizes[letter] for letter in letters]
            if shape and draw(st.integers(0, 6)) == 0:
                shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 2, 4]))
            found.append(TensorSpec(tuple(shape), dtype))
        return tuple(found), {}

    return make()


def also(strategy: SearchStrategy[Call], **kwargs: SearchStrategy[object]) -> SearchStrategy[Call]:
    """The calls of ``strategy`` with keywords, each left out half the time."""
    more = st.fixed_dictionaries({}, optional=kwargs)
    return st.tuples(strategy, more).map(lambda pair: (pair[0][0], {**pair[0][1], **pair[1]}))


def listed(strategy: SearchStrategy[Call]) -> SearchStrategy[Call]:
    """The positional arguments as one list."""
    return strategy.map(lambda found: ((list(found[0]),), found[1]))


STRATEGIES["torch.matmul"] = chain(
    "ij,jk", "j,jk", "ij,j", "j,j", "aij,ajk", "baij,ajk", "aij,j", "i,aij", ",i"
)
STRATEGIES["torch.mm"] = chain("ij,jk", "ij,jk", "aij,jk", "ij,j")
STRATEGIES["torch.bmm"] = chain("aij,ajk", "aij,ajk", "ij,jk")
STRATEGIES["torch.mv"] = chain("ij,j", "ij,j", "aij,j")
STRATEGIES["torch.dot"] = STRATEGIES["torch.vdot"] = chain("i,i", "i,i", "ij,j")
STRATEGIES["torch.inner"] = chain("i,i", "aij,kj", "ij,j", ",ij", "ij,")
STRATEGIES["torch.outer"] = chain("i,j", "i,j", "ij,j")
STRATEGIES["torch.kron"] = chain("i,j", "ij,k", "ij,kl", ",ij")
_SCALES = st.sampled_from([2, 0.5, 0, 1j])
STRATEGIES["torch.addmm"] = also(
    chain("ik,ij,jk", "k,ij,jk", ",ij,jk", "aik,ij,jk"), alpha=_SCALES, beta=_SCALES
)
STRATEGIES["torch.baddbmm"] = also(chain("aik,aij,ajk", "k,aij,ajk"), alpha=_SCALES, beta=_SCALES)
STRATEGIES["torch.linalg.multi_dot"] = listed(
    chain("ij,jk", "i,ij,jk,k", "ij,jk,k", "ij", "i,i", "ij,aij,jk")
)
STRATEGIES["torch.tensordot"] = st.one_of(
    also(chain("aij,ijk", "ij,jk", "i,j"), dims=st.integers(-1, 3)),
    also(chain("aij,jik"), dims=st.just(([1, 2], [1, 0]))),
    also(chain("aij,jik", "aij,kja"), dims=st.just(([-1], [1]))),
    also(chain("aij,jik"), dims=st.just(([1, 2], [1]))),
)
STRATEGIES["torch.linalg.cross"] = also(
    st.one_of(chain("aic,aic", "ac,ac", "c,c", "ac,c"), st.tuples(fitting(2), st.just({}))), dim=DIMS
)
STRATEGIES["torch.cdist"] = also(
    chain("ik,jk", "aik,ajk", "baik,ajk", "i,ij"), p=st.sampled_from([1.0, 2.0, 3.0, -1.0])
)
STRATEGIES["torch.cosine_similarity"] = also(st.tuples(fitting(2), st.just({})), dim=DIMS, eps=st.just(1e-6))
STRATEGIES["torch.pairwise_distance"] = also(
    st.tuples(fitting(2), st.just({})), p=st.sampled_from([1.0, 2.0]), keepdim=st.booleans()
)
for _name in ("trace", "cov", "corrcoef"):
    STRATEGIES[f"torch.{_name}"] = call(specs(sizes=_SIDES))

# --- torch.linalg ------------------------------------------------------------------------------------------

_DTYPES = st.sampled_from(
    ["float32", "float32", "float64", "complex64", "complex128", "float16", "int64", "bool"]
)
_RAGGED = specs(1, 4, _DTYPES, st.sampled_from([1, 2, 3]))
_ORDERS = st.sampled_from([None, "fro", "nuc", float("inf"), float("-inf"), 1, -1, 2, -2, 3, 0.5])


@st.composite
def _square(draw: st.DrawFn) -> TensorSpec:
    x = draw(_RAGGED)
    return TensorSpec(
        (*x.shape[:-1], x.shape[-2]) if x.ndim > 1 and draw(st.integers(0, 5)) else x.shape, x.dtype
    )


def _linalg(name: str, strategy: SearchStrategy[Call]) -> None:
    STRATEGIES[f"torch.linalg.{name}"] = strategy


_linalg("svd", call(_RAGGED, full_matrices=st.booleans()))
_linalg("svdvals", call(_RAGGED))
_linalg("qr", call(_RAGGED, mode=st.sampled_from(["reduced", "complete", "r"])))
for _name in ("eigh", "eigvalsh"):
    _linalg(_name, call(_square(), UPLO=st.sampled_from(["L", "U"])))
for _name in ("cholesky", "det", "slogdet", "inv"):
    _linalg(_name, call(_square()))
for _name in ("pinv", "matrix_rank"):
    _linalg(_name, call(_square(), hermitian=st.booleans(), rtol=st.just(1e-3)))
_linalg("cond", call(_square(), p=_ORDERS))
_linalg(
    "solve",
    also(
        chain("ii,i", "ii,ik", "aii,ai", "aii,aik", "aii,ik", "baii,aik", "aii,i", "aii,aki"),
        left=st.booleans(),
    ),
)
_PAIRS = st.tuples(DIMS, DIMS)
_ANY = specs(0, 3)
_KEPT = {"keepdim": st.booleans(), "dtype": DTYPE_VALUES}
_POWERS = st.sampled_from([2, 0, 1, float("inf"), -1, 2.5])
_linalg("vector_norm", call(_ANY, ord=_POWERS, dim=st.one_of(DIMS, _PAIRS), **_KEPT))
_linalg("matrix_norm", call(_ANY, ord=_ORDERS.filter(lambda order: order is not None), dim=_PAIRS, **_KEPT))
_linalg("norm", call(_ANY, ord=_ORDERS, dim=st.one_of(DIMS, _PAIRS), **_KEPT))

# Whether a matrix is singular or not positive definite is a matter of its values.
for _name in ("cholesky", "inv", "solve", "cond"):
    META_ONLY.add(f"torch.linalg.{_name}")
    if _name != "inv":
        STRICTER[f"torch.linalg.{_name}"] = "half precision, which only meta tensors take"
STRICTER["torch.bmm"] = "dtypes that differ, which torch overlooks in tensors without elements"
STRICTER["torch.baddbmm"] = "as bmm; and scales that would lose a fraction"
STRICTER["torch.addmm"] = "scales that would lose a fraction"

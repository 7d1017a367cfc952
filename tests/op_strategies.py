"""Generated arguments for each op: arithmetic, comparison, reduction, creation, complex, activations.

``STRATEGIES`` maps an op id to a strategy of ``(args, kwargs)`` as a graph node would hold them, with a
``TensorSpec`` wherever a tensor stands and ``DType``/``Device`` for dtypes and devices. Arguments that torch
refuses belong in it too: rule and torch must refuse the same ones.

``STRICTER`` maps an op id to the reason why its rule refuses some calls that torch takes.
``META_ONLY`` and ``REAL_ONLY`` name the ops compared on meta tensors alone (values decide whether torch
raises) or on real tensors alone (torch has no meta kernel, or one that disagrees with its real ones).
``INTEGER_FILL`` gives the value that fills an op's real integer tensors, where 1 will not do.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from op_values import DIMS, DTYPE_NAMES, DTYPE_VALUES, call, fitting, specs
from pellucid_shared.specs import TensorSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {
    "torch.addcmul": "a value of a higher kind than the operands, which torch takes and cuts off",
    "tensor.addcmul_": "a value of a higher kind than the operands, which torch takes and cuts off",
    "torch.lerp": "a 0-d tensor of another dtype",
    "tensor.lerp_": "a 0-d tensor of another dtype",
}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

# --- one tensor --------------------------------------------------------------------------------------------

ONE = call(specs())
NUMBERS = st.sampled_from([2, -1, 0, 0.5, -1.5, True, 1 + 1j])
REALS = st.sampled_from([2, -1, 0, 0.5, -1.5])


def _names(text: str) -> list[str]:
    return text.split()


def _either(*choices: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.one_of(*choices)


def _spread(pair: SearchStrategy[tuple[Any, ...]], **kwargs: SearchStrategy[Any]) -> SearchStrategy[Call]:
    """A call whose positional arguments are drawn together."""
    return st.tuples(pair, st.fixed_dictionaries({}, optional=kwargs))


def _with_number(first: bool = False) -> SearchStrategy[tuple[Any, ...]]:
    """A tensor and a number; ``first``: or the other way round."""
    after = st.tuples(specs(), NUMBERS)
    return _either(after, st.tuples(NUMBERS, specs())) if first else after


def _pair(name: str, strategy: SearchStrategy[Call], own: SearchStrategy[Call] | None = None) -> None:
    """The strategy of a function and its in-place method."""
    STRATEGIES[f"torch.{name}"] = strategy
    STRATEGIES[f"tensor.{name}_"] = own if own is not None else strategy


for _name in _names(
    "abs neg sign sgn floor ceil trunc frac sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p "
    "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid sinc erf erfc erfinv lgamma digamma "
    "deg2rad rad2deg logical_not bitwise_not square"
):
    _pair(_name, ONE)
for _name in _names("isnan isinf isfinite isposinf isneginf isreal signbit positive"):
    STRATEGIES[f"torch.{_name}"] = ONE
_pair("round", call(specs(), decimals=st.integers(-2, 2)))
_pair("nan_to_num", call(specs(), nan=REALS, posinf=REALS, neginf=REALS))
_pair("logit", call(specs(), eps=st.just(0.1)))

# --- two and three operands --------------------------------------------------------------------------------

_TENSORS = fitting(2)
_TENSOR_OR_NUMBER = _either(_TENSORS, _with_number())
_ANY_SIDE = _either(_TENSORS, _with_number(first=True))

for _name in ("add", "sub"):
    _pair(_name, _spread(_ANY_SIDE, alpha=NUMBERS), _spread(_TENSOR_OR_NUMBER, alpha=NUMBERS))
for _name in _names(
    "mul true_divide floor_divide remainder pow xlogy bitwise_and bitwise_or bitwise_xor "
    "bitwise_left_shift bitwise_right_shift"
):
    _pair(_name, _spread(_ANY_SIDE), _spread(_TENSOR_OR_NUMBER))
_ROUNDING = st.sampled_from([None, "trunc", "floor", "up"])
_pair(
    "div",
    _spread(_ANY_SIDE, rounding_mode=_ROUNDING),
    _spread(_TENSOR_OR_NUMBER, rounding_mode=_ROUNDING),
)
for _name in ("fmod", "copysign"):
    _pair(_name, _spread(_TENSOR_OR_NUMBER))
STRATEGIES["torch.rsub"] = _spread(_TENSOR_OR_NUMBER, alpha=NUMBERS)
for _name in ("atan2", "hypot", "logical_and", "logical_or", "logical_xor"):
    _pair(_name, _spread(_TENSORS))
for _name in ("logaddexp", "logaddexp2", "maximum", "minimum", "fmax", "fmin"):
    STRATEGIES[f"torch.{_name}"] = _spread(_TENSORS)

_pair("clamp", _either(_spread(fitting(3)), call(specs(), min=NUMBERS, max=NUMBERS), _spread(fitting(2))))
for _name in ("clamp_min", "clamp_max"):
    _pair(_name, _spread(_TENSOR_OR_NUMBER))
for _name in ("addcmul", "addcdiv"):
    _pair(_name, _spread(fitting(3), value=NUMBERS))


@st.composite
def _like_dtyped(draw: st.DrawFn, count: int) -> tuple[TensorSpec, ...]:
    """Tensors that mostly broadcast and mostly share one dtype."""
    dtype = draw(DTYPE_NAMES)
    return draw(fitting(count, st.sampled_from([dtype, dtype, dtype, dtype, "float32"])))


_pair(
    "lerp",
    _either(_spread(_like_dtyped(3)), _spread(st.builds(lambda p, w: (*p, w), _like_dtyped(2), NUMBERS))),
)
_CONDITIONS = st.sampled_from(["bool", "bool", "bool", "uint8", "float32"])


def _conditional(order: tuple[int, int, int]) -> SearchStrategy[Call]:
    """Condition and two operands, of which one or both may be numbers, in the given order."""

    def arrange(condition: str, operands: tuple[Any, ...], numbers: tuple[Any, Any]) -> tuple[Any, ...]:
        first, *rest = operands
        rest = [n if n is not None else t for n, t in zip(numbers, rest, strict=True)]
        made = (TensorSpec(first.shape, condition), *rest)
        return tuple(made[i] for i in order)

    maybe = _either(st.none(), st.none(), NUMBERS)
    return _spread(st.builds(arrange, _CONDITIONS, fitting(3), st.tuples(maybe, maybe)))


STRATEGIES["torch.where"] = _conditional((0, 1, 2))
STRATEGIES["tensor.where"] = _conditional((1, 0, 2))
STRATEGIES["tensor.zero_"] = ONE
STRATEGIES["tensor.fill_"] = _either(call(specs(), NUMBERS), call(specs(), specs(0, 1)))
STRATEGIES["tensor.copy_"] = _spread(_TENSORS)

# --- comparison --------------------------------------------------------------------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    STRATEGIES[f"torch.{_name}"] = _spread(_TENSOR_OR_NUMBER)
STRATEGIES["torch.isclose"] = _spread(_like_dtyped(2), rtol=st.just(0.1), equal_nan=st.booleans())

# --- reductions --------------------------------------------------------------------------------------------

_SOME_DIMS = _either(DIMS, st.lists(DIMS, min_size=1, max_size=2, unique=True).map(tuple))
_KEEP = st.booleans()


def _reduces(
    names: str, dim: SearchStrategy[Any], *, dtype: bool = False, alone: bool = True, keepdim: bool = True
) -> None:
    """Reductions of these names: over all, over a positional dim, by keyword."""
    more = {"dtype": DTYPE_VALUES} if dtype else {}
    keep = {"keepdim": _KEEP} if keepdim else {}
    for name in _names(names):
        STRATEGIES[f"torch.{name}"] = _either(
            call(specs(), **more),
            call(specs(), dim, **keep, **more),
            call(specs(), dim=dim, **(keep if alone else {}), **more),
        )


_MAYBE_DIMS = _either(st.none(), _SOME_DIMS)
_reduces("sum mean", _MAYBE_DIMS, dtype=True)
_reduces("nansum nanmean", _MAYBE_DIMS, dtype=True)
_reduces("any all amax amin", _MAYBE_DIMS)
_reduces("count_nonzero", _MAYBE_DIMS, keepdim=False)
_reduces("prod", DIMS, dtype=True)
_reduces("argmax argmin", _either(st.none(), DIMS))
_reduces("median nanmedian", DIMS)
STRATEGIES["torch.logsumexp"] = call(specs(), _SOME_DIMS, keepdim=_KEEP)
STRATEGIES["torch.aminmax"] = call(specs(), dim=_either(st.none(), DIMS), keepdim=_KEEP)
for _name in _names("std var std_mean var_mean"):
    STRATEGIES[f"torch.{_name}"] = _either(
        call(specs(), unbiased=_KEEP),
        call(specs(), _MAYBE_DIMS, unbiased=_KEEP, keepdim=_KEEP),
        call(specs(), _MAYBE_DIMS, correction=st.integers(0, 2), keepdim=_KEEP),
        call(specs(), dim=_MAYBE_DIMS, correction=st.integers(0, 2), keepdim=_KEEP, unbiased=_KEEP),
    )
_P = st.sampled_from([1, 2, 2.0, 0, 3, -1, float("inf"), float("-inf"), "fro"])
STRATEGIES["torch.norm"] = _either(
    call(specs(), p=_P, dim=_MAYBE_DIMS, keepdim=_KEEP, dtype=DTYPE_VALUES),
    call(specs(), _P, _MAYBE_DIMS, _KEEP),
)
for _name in ("max", "min"):
    STRATEGIES[f"torch.{_name}"] = _either(
        call(specs(), keepdim=_KEEP),
        call(specs(), DIMS, keepdim=_KEEP),
        call(specs(), dim=DIMS, keepdim=_KEEP),
        _spread(_TENSORS),
        st.builds(lambda pair: (pair[:1], {"other": pair[1]}), _TENSORS),
    )
_REAL_FLOATS = st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16", "int64"])
for _name in ("quantile", "nanquantile"):
    STRATEGIES[f"torch.{_name}"] = call(
        specs(dtypes=_REAL_FLOATS),
        _either(st.sampled_from([0, 0.5, 1, 1.5]), specs(0, 2, ["float32"])),
        dim=_either(st.none(), DIMS),
        keepdim=_KEEP,
        interpolation=st.sampled_from(["linear", "lower", "nearest", "cubic"]),
    )
for _name in ("cumsum", "cumprod"):
    _pair(_name, call(specs(), DIMS, dtype=DTYPE_VALUES))
for _name in _names("logcumsumexp cummax cummin"):
    STRATEGIES[f"torch.{_name}"] = call(specs(), DIMS)

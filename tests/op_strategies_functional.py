"""Generated arguments for ``torch.nn.functional`` and for sorting; see ``op_strategies`` for the terms."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from op_strategies_linalg import also, chain
from op_values import DIMS, DTYPE_VALUES, Call, call, fitting, shapes, specs
from pellucid_shared.specs import TensorSpec

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

_FLOATS = st.sampled_from(["float32", "float32", "float64", "bfloat16", "int64"])
_SIZES = st.sampled_from([1, 2, 3, 4])
_BOOLS = st.booleans()


def _functional(name: str, strategy: SearchStrategy[Call], stricter: str = "") -> None:
    STRATEGIES[f"torch.nn.functional.{name}"] = strategy
    if stricter:
        STRICTER[f"torch.nn.functional.{name}"] = stricter


def _maybe(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> TensorSpec | None:
    """Mostly a tensor of this shape, or None."""
    return draw(
        st.sampled_from([None, TensorSpec(shape, dtype), TensorSpec(shape, dtype), TensorSpec((2,), dtype)])
    )


_functional(
    "linear",
    chain("ij,kj", "ij,kj,k", "aij,kj", "j,kj,k", "j,j", "ij,kj,i", ",kj"),
    "weights that broadcast, or that are vectors",
)
_functional(
    "embedding",
    call(
        specs(0, 2, st.sampled_from(["int64", "int32", "float32"])),
        specs(1, 2, sizes=_SIZES),
        padding_idx=st.integers(-2, 2),
    ),
)
INTEGER_FILL["torch.nn.functional.embedding"] = 0
_functional(
    "one_hot",
    call(specs(0, 2, st.sampled_from(["int64", "int64", "int32"])), st.integers(1, 4)),
)
INTEGER_FILL["torch.nn.functional.one_hot"] = 0


@st.composite
def _normed(draw: st.DrawFn, bias: bool) -> Call:
    x = draw(specs(1, 3, _FLOATS, _SIZES))
    shape = x.shape[-draw(st.integers(1, 2)) :] if draw(st.integers(0, 5)) else draw(shapes(0, 2))
    weights = [_maybe(draw, shape, x.dtype) for _ in range(2 if bias else 1)]
    return (x, shape, *weights), {}


@st.composite
def _grouped(draw: st.DrawFn) -> Call:
    x = draw(specs(1, 3, _FLOATS, _SIZES))
    channels = x.shape[1] if x.ndim > 1 else 2
    weights = [_maybe(draw, (channels,), x.dtype) for _ in range(2)]
    return (x, draw(st.integers(1, 3)), *weights), {}


_functional("layer_norm", _normed(True))
_functional("rms_norm", _normed(False))
_functional("group_norm", _grouped())
_functional("normalize", call(specs(1, 3), p=st.sampled_from([1.0, 2.0]), dim=DIMS))
for _name in ("softmax", "log_softmax"):
    _functional(
        _name,
        call(specs(), DIMS, dtype=DTYPE_VALUES, _stacklevel=st.just(3)),
        "dtypes that torch overlooks in tensors without elements",
    )
_functional("dropout", call(specs(), st.just(0.5), _BOOLS), "training=True, which a trace has no use for")


@st.composite
def _attention(draw: st.DrawFn) -> Call:
    batch = draw(st.sampled_from([(), (2,), (2, 4)]))
    tokens, others, size, wide = (draw(_SIZES) for _ in range(4))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "int64"]))
    keys = (*batch[:-1], draw(st.sampled_from([batch[-1], 1, 2]))) if batch else ()
    kwargs: dict[str, Any] = draw(
        st.fixed_dictionaries({}, optional={"is_causal": _BOOLS, "scale": st.just(0.5), "enable_gqa": _BOOLS})
    )
    if draw(_BOOLS):
        mask = draw(st.sampled_from([(tokens, others), (others,), (*batch, tokens, others), (tokens, 3)]))
        kwargs["attn_mask"] = TensorSpec(mask, draw(st.sampled_from([dtype, "bool", "float64"])))
    return (
        TensorSpec((*batch, tokens, size), dtype),
        TensorSpec((*keys, others, draw(st.sampled_from([size, size, size, 3]))), dtype),
        TensorSpec((*keys, others, wide), draw(st.sampled_from([dtype, dtype, dtype, "float64"]))),
    ), kwargs


_functional(
    "scaled_dot_product_attention", _attention(), "masks of one dimension, which only some kernels take"
)

# --- losses ------------------------------------------------------------------------------------------------

_REDUCTION = {"reduction": st.sampled_from(["none", "mean", "sum"])}
_PAIR = st.tuples(
    fitting(2, st.sampled_from(["float32", "float32", "float64", "int64", "complex64"])), st.just({})
)
for _name in ("mse_loss", "smooth_l1_loss", "huber_loss"):
    _functional(_name, also(_PAIR, **_REDUCTION))
STRICTER["torch.nn.functional.huber_loss"] = "dtypes that differ"
_functional("l1_loss", also(_PAIR, **_REDUCTION), "whole numbers, which have no mean")
_functional(
    "kl_div",
    also(_PAIR, reduction=st.sampled_from(["none", "mean", "sum", "batchmean"]), log_target=_BOOLS),
)


@st.composite
def _binary(draw: st.DrawFn, logits: bool) -> Call:
    x = draw(specs(0, 2, _FLOATS))
    target = draw(st.sampled_from([x, x, x, TensorSpec((2,), x.dtype), TensorSpec(x.shape, "float64")]))
    kwargs: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=_REDUCTION))
    for name in ("weight", "pos_weight") if logits else ("weight",):
        if (weight := _maybe(draw, x.shape[-1:], x.dtype)) is not None:
            kwargs[name] = weight
    return (x, target), kwargs


_functional("binary_cross_entropy", _binary(False))
_functional("binary_cross_entropy_with_logits", _binary(True), "dtypes that differ")


@st.composite
def _classes(draw: st.DrawFn, probabilities: bool) -> Call:
    x = draw(specs(0, 3, _FLOATS, _SIZES))
    classes = x.shape[1] if x.ndim > 1 else 2
    rest = (*x.shape[:1], *x.shape[2:]) if x.ndim > 1 else ()
    options = [TensorSpec(rest, "int64")] * 3 + [TensorSpec(rest, "int32"), TensorSpec((*rest, 2), "int64")]
    options += [x, x, TensorSpec(x.shape, "float64")] if probabilities else []
    kwargs: dict[str, Any] = draw(
        st.fixed_dictionaries({}, optional={**_REDUCTION, "ignore_index": st.sampled_from([-100, 1])})
    )
    if probabilities and draw(_BOOLS):
        kwargs["label_smoothing"] = 0.1
    if (weight := _maybe(draw, (classes,), x.dtype)) is not None:
        kwargs["weight"] = weight
    return (x, draw(st.sampled_from(options))), kwargs


for _name in ("nll_loss", "cross_entropy"):
    _functional(_name, _classes(_name == "cross_entropy"))
    INTEGER_FILL[f"torch.nn.functional.{_name}"] = 0

STRICTER["torch.nn.functional.cross_entropy"] = "targets of other dtypes or shapes"

# --- windows -----------------------------------------------------------------------------------------------


@st.composite
def _padded(draw: st.DrawFn) -> Call:
    x = draw(specs(1, 4))
    pad = tuple(draw(st.lists(st.integers(-1, 3), max_size=5)))
    if len(pad) % 2 and draw(st.integers(0, 5)):
        pad = pad[1:]
    mode = draw(st.sampled_from(["constant", "constant", "reflect", "replicate", "circular"]))
    return (x, pad, mode), draw(st.fixed_dictionaries({}, optional={"value": st.sampled_from([0, 1.5])}))


@st.composite
def _convolved(draw: st.DrawFn) -> Call:
    groups, share, size = draw(st.sampled_from([1, 1, 2])), draw(_SIZES), draw(_SIZES)
    dtype, out = draw(_FLOATS), draw(_SIZES)
    channels = share * groups if draw(st.integers(0, 7)) else 3
    x = TensorSpec((*draw(shapes(0, 1, _SIZES)), channels, draw(st.integers(1, 7))), dtype)
    bias = _maybe(draw, (out,), dtype)
    optional = {
        "stride": st.sampled_from([1, 2, (2,)]),
        "padding": st.sampled_from([0, 1, 2, "same", "valid"]),
        "dilation": st.sampled_from([1, 2]),
    }
    return (x, TensorSpec((out, share, size), dtype), bias), {
        "groups": groups,
        **draw(st.fixed_dictionaries({}, optional=optional)),
    }


_functional("pad", _padded())
_functional("conv1d", _convolved(), "whole numbers, which only the CPU takes")
_POOL = {"stride": st.sampled_from([1, 2, 3, None]), "padding": st.integers(0, 2), "ceil_mode": _BOOLS}
_INPUTS = specs(1, 3, _FLOATS, st.integers(1, 7))
_functional("avg_pool1d", call(_INPUTS, st.integers(1, 4), **_POOL), "whole numbers")
_functional(
    "max_pool1d",
    call(_INPUTS, st.integers(1, 4), **_POOL, dilation=st.integers(1, 2), return_indices=_BOOLS),
    "whole numbers, which only some versions take",
)

# --- sorting -----------------------------------------------------------------------------------------------

_ORDERED = {"dim": DIMS, "descending": _BOOLS, "stable": _BOOLS}
STRATEGIES["torch.sort"] = call(specs(), **_ORDERED)
STRATEGIES["torch.argsort"] = call(specs(), **_ORDERED)
STRATEGIES["torch.msort"] = call(specs())
STRATEGIES["torch.topk"] = call(specs(), st.integers(0, 4), dim=DIMS, largest=_BOOLS, sorted=_BOOLS)
STRATEGIES["torch.kthvalue"] = call(specs(), st.integers(0, 4), dim=DIMS, keepdim=_BOOLS)
STRICTER["torch.unique"] = "distinct slices of tensors without elements"
STRATEGIES["torch.unique"] = call(
    specs(), sorted=_BOOLS, return_inverse=_BOOLS, return_counts=_BOOLS, dim=DIMS
)
_WHERE = {"right": _BOOLS, "out_int32": _BOOLS}
_SAME = st.sampled_from(["float32", "float32", "int64", "bool"])
_NUMBERS = st.sampled_from([0.5, 2])
STRATEGIES["torch.searchsorted"] = st.one_of(
    call(specs(0, 2, _SAME, _SIZES), st.one_of(specs(0, 2, _SAME, _SIZES), _NUMBERS), **_WHERE),
    also(chain("ai,aj", "i,aj", "i,"), **_WHERE),
)
STRATEGIES["torch.bucketize"] = call(st.one_of(specs(0, 2, _SAME), _NUMBERS), specs(0, 2, _SAME), **_WHERE)
for _name in ("searchsorted", "bucketize"):
    STRICTER[f"torch.{_name}"] = "dtypes that differ, which torch overlooks in tensors without elements"
_MEMBERS = st.one_of(specs(), st.sampled_from([1, 0.5]))
STRATEGIES["torch.isin"] = call(_MEMBERS, _MEMBERS, assume_unique=_BOOLS, invert=_BOOLS)
STRATEGIES["torch.histc"] = call(
    specs(), bins=st.integers(0, 4), min=st.sampled_from([0, -1.0]), max=st.sampled_from([1, 0, -2.0])
)
STRATEGIES["torch.multinomial"] = call(specs(1, 2, _FLOATS), st.integers(0, 4), _BOOLS)
STRICTER["torch.multinomial"] = "no categories, which torch overlooks in tensors without rows"

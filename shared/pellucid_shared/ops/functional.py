"""``torch.nn.functional``: layers without state. Losses and convolutions have files of their own."""

from __future__ import annotations

from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec, broadcast, same_size
from .products import agree
from .registry import Alias, Bound, Cost, Kind, Param
from .rules import (
    INPUT,
    Shape,
    axes,
    axis,
    define,
    free,
    per_result,
    same_dtype,
    shown,
    spelled,
    take,
)

WEIGHT = Param("weight", Kind.TENSOR, None, optional=True)
BIAS = Param("bias", Kind.TENSOR, None, optional=True)


def of_shape(spec: TensorSpec | None, shape: Shape, name: str) -> None:
    """Raise ShapeError unless an optional tensor is absent or has this shape."""
    if spec is not None and not (spec.ndim == len(shape) and all(map(same_size, spec.shape, shape))):
        raise ShapeError(f"{name} has shape {shown(spec.shape)} where {shown(shape)} is needed")


def given(*specs: TensorSpec | None) -> list[TensorSpec]:
    """Those that are not None."""
    return [spec for spec in specs if spec is not None]


# --- linear and embedding ----------------------------------------------------------------------------------


def _linear(bound: Bound) -> TensorSpec:
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if not x.shape or weight.ndim != 2:
        raise ShapeError(f"takes vectors and a weight matrix, found shapes {shown(x.shape, weight.shape)}")
    agree(x.shape[-1], weight.shape[1], x.shape, weight.shape)
    of_shape(bias, weight.shape[:1], "bias")
    return TensorSpec((*x.shape[:-1], weight.shape[0]), same_dtype(*given(x, weight, bias)))


def _embedding(bound: Bound) -> TensorSpec:
    x, weight, padding = bound["input"], bound["weight"], bound["padding_idx"]
    if x.dtype not in ("int64", "int32"):
        raise ShapeError(f"indices are int64 or int32, found {x.dtype}")
    if weight.ndim != 2:
        raise ShapeError(f"weight is a matrix, found shape {shown(weight.shape)}")
    if padding is not None and not -weight.shape[0] <= padding < weight.shape[0]:
        raise OpArgumentError(f"padding_idx {padding} names no row of weight {shown(weight.shape)}")
    return TensorSpec((*x.shape, weight.shape[1]), weight.dtype)


def _one_hot(bound: Bound) -> TensorSpec:
    x, classes = bound["tensor"], bound["num_classes"]
    if x.dtype != "int64":
        raise ShapeError(f"takes int64 classes, found {x.dtype}; convert with .long()")
    return TensorSpec((*x.shape, classes), "int64")


define(
    "torch.nn.functional.linear",
    (INPUT, Param("weight", Kind.TENSOR), BIAS),
    _linear,
    lambda bound, result: Cost(2 * int(result.numel) * int(bound["input"].shape[-1]), result.nbytes),
    spellings=spelled("linear", "F"),
)
define(
    "torch.nn.functional.embedding",
    (INPUT, Param("weight", Kind.TENSOR), Param("padding_idx", Kind.INT, None, optional=True)),
    _embedding,
    per_result(),
    spellings=spelled("embedding", "F"),
)
define(
    "torch.nn.functional.one_hot",
    # torch's default, one more than the largest class, would be a size that no rule can bound.
    (Param("tensor", Kind.TENSOR), Param("num_classes", Kind.INT, low=1, high=2**31)),
    _one_hot,
    per_result(),
    spellings=spelled("one_hot", "F"),
)


# --- norms -------------------------------------------------------------------------------------------------


def _layer_norm(bound: Bound) -> TensorSpec:
    x, shape = bound["input"], bound["normalized_shape"]
    if not shape:
        raise OpArgumentError("normalized_shape names one axis at least")
    tail = x.shape[x.ndim - len(shape) :] if x.ndim >= len(shape) else ()
    if len(tail) != len(shape) or not all(map(same_size, tail, shape)):
        raise ShapeError(f"normalized_shape {shown(shape)} is not the tail of shape {shown(x.shape)}")
    weights = given(bound["weight"], bound.get("bias"))
    for name in ("weight", "bias"):
        of_shape(bound.get(name), shape, name)
    return TensorSpec(x.shape, take(same_dtype(x, *weights), "f"))


def _group_norm(bound: Bound) -> TensorSpec:
    x, groups = bound["input"], bound["num_groups"]
    if x.ndim < 2:
        raise ShapeError(f"takes [batch, channels, ...], found shape {shown(x.shape)}")
    channels = x.shape[1]
    if channels % groups:
        raise ShapeError(f"{channels} channels do not part into {groups} groups")
    if int(x.numel) and int(x.numel) // groups <= 1:
        raise ShapeError(f"a group of shape {shown(x.shape)} has one element, and one has no variance")
    for name in ("weight", "bias"):
        of_shape(bound[name], (channels,), name)
    return TensorSpec(x.shape, take(same_dtype(x, *given(bound["weight"], bound["bias"])), "f"))


def _normalize(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    axes(bound["dim"], x.shape)
    return TensorSpec(x.shape, take(x.dtype, "fc"))


_EPS = Param("eps", Kind.NUMBER, 1e-5)
_SHAPE = Param("normalized_shape", Kind.INTS)
define(
    "torch.nn.functional.layer_norm",
    (INPUT, _SHAPE, WEIGHT, BIAS, _EPS),
    _layer_norm,
    per_result(8),
    spellings=spelled("layer_norm", "F"),
)
define(
    "torch.nn.functional.rms_norm",
    (INPUT, _SHAPE, WEIGHT, Param("eps", Kind.NUMBER, None, optional=True)),
    _layer_norm,
    per_result(5),
    spellings=spelled("rms_norm", "F"),
)
define(
    "torch.nn.functional.group_norm",
    (INPUT, Param("num_groups", Kind.INT, low=1), WEIGHT, BIAS, _EPS),
    _group_norm,
    per_result(8),
    spellings=spelled("group_norm", "F"),
)
define(
    "torch.nn.functional.normalize",
    (
        INPUT,
        Param("p", Kind.NUMBER, 2.0, low=0, high=float("inf")),
        Param("dim", Kind.INTS, 1),
        Param("eps", Kind.NUMBER, 1e-12),
    ),
    _normalize,
    per_result(4),
    spellings=spelled("normalize", "F"),
)


# --- softmax with functional's own parameters --------------------------------------------------------------


def _softmax(bound: Bound) -> TensorSpec:
    x: TensorSpec = bound["input"]
    axis(bound["dim"], x.shape)
    return TensorSpec(x.shape, take(bound["dtype"] or x.dtype, "f"))


for _name in ("softmax", "log_softmax"):
    define(
        f"torch.nn.functional.{_name}",
        (
            INPUT,
            Param("dim", Kind.INT),
            Param("_stacklevel", Kind.INT, 3),
            Param("dtype", Kind.DTYPE, None, optional=True),
        ),
        _softmax,
        per_result(5),
        spellings=spelled(_name, "F"),
    )


def _dropout(bound: Bound) -> Any:
    if bound["training"]:
        raise OpArgumentError("dropout is off while a model is traced; say training=False")
    return bound["input"]


define(
    "torch.nn.functional.dropout",
    (
        INPUT,
        Param("p", Kind.NUMBER, 0.5, low=0, high=1),
        Param("training", Kind.BOOL, True),
    ),
    _dropout,
    free,
    alias=Alias.VIEW,
    spellings=spelled("dropout", "F"),
)


# --- attention ---------------------------------------------------------------------------------------------


def _attention(bound: Bound) -> TensorSpec:
    q, k, v, mask = bound["query"], bound["key"], bound["value"], bound["attn_mask"]
    shapes = (q.shape, k.shape, v.shape)
    if any(len(shape) < 2 for shape in shapes):
        raise ShapeError(f"takes [..., tokens, size] tensors, found shapes {shown(*shapes)}")
    agree(q.shape[-1], k.shape[-1], *shapes)
    agree(k.shape[-2], v.shape[-2], *shapes)
    batches = [shape[:-2] for shape in shapes]
    if bound["enable_gqa"]:
        batches[1:] = [_grouped(q, x) for x in (k, v)]
    batch = broadcast(*batches)
    if batch is None:
        raise ShapeError(f"the batches of shapes {shown(*shapes)} do not broadcast")
    if mask is not None:
        if bound["is_causal"]:
            raise OpArgumentError("attn_mask and is_causal exclude each other")
        scores = (*batch, q.shape[-2], k.shape[-2])
        if mask.dtype not in ("bool", q.dtype):
            raise ShapeError(f"attn_mask is bool or {q.dtype}, found {mask.dtype}")
        if mask.ndim < 2 or broadcast(mask.shape, scores) != scores:
            raise ShapeError(f"attn_mask {shown(mask.shape)} does not broadcast to scores {shown(scores)}")
    return TensorSpec((*batch, q.shape[-2], v.shape[-1]), take(same_dtype(q, k, v), "f"))


def _grouped(query: TensorSpec, other: TensorSpec) -> Shape:
    """The batch of keys or values whose heads are shared by several of the query's."""
    if query.ndim < 3 or other.ndim < 3 or not other.shape[-3] or query.shape[-3] % other.shape[-3]:
        raise ShapeError(f"the heads of {shown(other.shape)} do not divide those of {shown(query.shape)}")
    return (*other.shape[:-3], query.shape[-3])


def _attention_cost(bound: Bound, result: TensorSpec) -> Cost:
    q, k = bound["query"], bound["key"]
    rows = int(TensorSpec(result.shape[:-1]).numel)
    scores = rows * int(k.shape[-2])
    return Cost(scores * (2 * int(q.shape[-1]) + 2 * int(result.shape[-1]) + 5), result.nbytes + 4 * scores)


define(
    "torch.nn.functional.scaled_dot_product_attention",
    (
        Param("query", Kind.TENSOR),
        Param("key", Kind.TENSOR),
        Param("value", Kind.TENSOR),
        Param("attn_mask", Kind.TENSOR, None, optional=True),
        Param("dropout_p", Kind.NUMBER, 0.0, low=0, high=0),
        Param("is_causal", Kind.BOOL, False),
        Param("scale", Kind.NUMBER, None, optional=True, keyword_only=True),
        Param("enable_gqa", Kind.BOOL, False, keyword_only=True),
    ),
    _attention,
    _attention_cost,
    spellings=spelled("scaled_dot_product_attention", "F"),
)

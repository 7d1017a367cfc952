"""Windows along an axis: padding, one-dimensional convolution and pooling."""

from __future__ import annotations

from typing import Any

from ..errors import OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .functional import BIAS, given, of_shape
from .registry import Alias, Bound, Cost, Kind, Param
from .rules import INPUT, Shape, define, per_result, same_dtype, shown, spelled, take

# --- padding -----------------------------------------------------------------------------------------------


def _pad(bound: Bound) -> TensorSpec:
    x, pad, mode = bound["input"], bound["pad"], bound["mode"]
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise OpArgumentError(
            f"pad gives two numbers an axis, last axis first; found {len(pad)} for {shown(x.shape)}"
        )
    if mode != "constant":
        _check_mode(x.shape, pad, mode, bound["value"])
    sizes = list(x.shape)
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        size = sizes[-1 - i] + before + after
        if size < 0 or sizes[-1 - i] + min(before, 0) + min(after, 0) < 0:
            raise ShapeError(f"pad {list(pad)} takes more from shape {shown(x.shape)} than there is")
        sizes[-1 - i] = Dim(size) if isinstance(sizes[-1 - i], Dim) else size
    return TensorSpec(tuple(sizes), x.dtype)


def _check_mode(shape: Shape, pad: tuple[int, ...], mode: str, value: float | None) -> None:
    count = len(pad) // 2
    if value not in (None, 0):
        raise OpArgumentError(f"mode {mode!r} takes no value")
    if any(p < 0 for p in pad):
        raise OpArgumentError(f"mode {mode!r} adds elements; narrow the tensor instead of a negative pad")
    if count not in (1, 2, 3) or len(shape) not in (count + 1, count + 2):
        raise ShapeError(f"mode {mode!r} pads all axes but the first one or two, found shape {shown(shape)}")
    for i, size in enumerate(reversed(shape[-count:])):
        most = max(pad[2 * i], pad[2 * i + 1])
        limit = {"reflect": size - 1, "circular": size}.get(mode, most if size else 0)
        if most > limit or not all(shape[1:]):
            raise ShapeError(f"mode {mode!r} cannot pad {most} onto an axis of {size}, of {shown(shape)}")


define(
    "torch.nn.functional.pad",
    (
        INPUT,
        Param("pad", Kind.INTS, low=-(2**31), high=2**31),
        Param("mode", Kind.STR, "constant", choices=("constant", "reflect", "replicate", "circular")),
        Param("value", Kind.NUMBER, None, optional=True, low=-float("inf"), high=float("inf")),
    ),
    _pad,
    per_result(),
    alias=Alias.MAYBE_VIEW,
    spellings=spelled("pad", "F"),
)


# --- convolution and pooling -------------------------------------------------------------------------------


def _single(value: Any, name: str, default: int, low: int) -> int:
    """A whole number, or a tuple of one."""
    members = value if isinstance(value, tuple) else (value,)
    if not members:
        return default
    number = members[0]
    if len(members) != 1 or not isinstance(number, int) or number < low:
        raise OpArgumentError(f"{name} is one whole number, at least {low}, found {value!r}")
    return number


def _windows(length: int, size: int, stride: int, padding: int, dilation: int, *, ceil: bool = False) -> int:
    """How many windows fit; with ``ceil``, one that is cut off counts if it starts inside."""
    room = int(length) + 2 * padding - dilation * (size - 1) - 1
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= int(length) + padding:
        count -= 1
    if room < 0 and count < 1:
        raise ShapeError(f"a window of {dilation * (size - 1) + 1} does not fit an axis of {length}")
    return Dim(count) if isinstance(length, Dim) else count


def _channels(x: TensorSpec) -> None:
    if x.ndim not in (2, 3) or not all(x.shape[-2:]):
        raise ShapeError(f"takes [batch, channels, length] or [channels, length], found {shown(x.shape)}")


def _conv1d(bound: Bound) -> TensorSpec:
    x, weight, bias, groups = bound["input"], bound["weight"], bound["bias"], bound["groups"]
    _channels(x)
    if weight.ndim != 3 or not all(weight.shape):
        raise ShapeError(f"weight is [out, in / groups, size], found shape {shown(weight.shape)}")
    out, share, size = weight.shape
    if out % groups or not same_size(x.shape[-2], share * groups):
        raise ShapeError(
            f"weight {shown(weight.shape)} in {groups} groups does not fit the channels of {shown(x.shape)}"
        )
    of_shape(bias, (out,), "bias")
    stride = _single(bound["stride"], "stride", 1, 1)
    dilation = _single(bound["dilation"], "dilation", 1, 1)
    if bound["padding"] == "same":
        if stride != 1:
            raise OpArgumentError("padding='same' is for stride 1")
        length = x.shape[-1]
    else:
        padding = 0 if bound["padding"] == "valid" else _single(bound["padding"], "padding", 0, 0)
        length = _windows(x.shape[-1], size, stride, padding, dilation)
    return TensorSpec((*x.shape[:-2], out, length), take(same_dtype(*given(x, weight, bias)), "fc"))


def _conv_cost(bound: Bound, result: TensorSpec) -> Cost:
    _, share, size = bound["weight"].shape
    return Cost(2 * int(result.numel) * int(share) * int(size), result.nbytes)


def _pool(bound: Bound) -> Any:
    x: TensorSpec = bound["input"]
    _channels(x)
    size = _single(bound["kernel_size"], "kernel_size", 1, 1)
    stride = size if bound["stride"] is None else _single(bound["stride"], "stride", size, 1)
    padding = _single(bound["padding"], "padding", 0, 0)
    dilation = _single(bound.get("dilation", 1), "dilation", 1, 1)
    if 2 * padding > size:
        raise OpArgumentError(f"padding is at most half of kernel_size {size}, found {padding}")
    count = _windows(x.shape[-1], size, stride, padding, dilation, ceil=bound["ceil_mode"])
    pooled = TensorSpec((*x.shape[:-1], count), take(x.dtype, "f"))
    return (pooled, TensorSpec(pooled.shape, "int64")) if bound.get("return_indices") else pooled


def _pool_cost(bound: Bound, result: Any) -> Cost:
    return per_result(_single(bound["kernel_size"], "kernel_size", 1, 1))(bound, result)


_STRIDE = Param("stride", Kind.INTS, None, optional=True)  # None: the kernel's size
_PADDING = Param("padding", Kind.INTS, 0)
_CEIL = Param("ceil_mode", Kind.BOOL, False)
define(
    "torch.nn.functional.conv1d",
    (
        INPUT,
        Param("weight", Kind.TENSOR),
        BIAS,
        Param("stride", Kind.INTS, 1),
        Param("padding", Kind.ANY, 0),
        Param("dilation", Kind.INTS, 1),
        Param("groups", Kind.INT, 1, low=1),
    ),
    _conv1d,
    _conv_cost,
    spellings=spelled("conv1d", "F") + spelled("conv1d", "torch"),
)
define(
    "torch.nn.functional.avg_pool1d",
    (
        INPUT,
        Param("kernel_size", Kind.INTS),
        _STRIDE,
        _PADDING,
        _CEIL,
        Param("count_include_pad", Kind.BOOL, True),
    ),
    _pool,
    _pool_cost,
    spellings=spelled("avg_pool1d", "F"),
)
define(
    "torch.nn.functional.max_pool1d",
    (
        INPUT,
        Param("kernel_size", Kind.INTS),
        _STRIDE,
        _PADDING,
        Param("dilation", Kind.INTS, 1),
        _CEIL,
        Param("return_indices", Kind.BOOL, False),
    ),
    _pool,
    _pool_cost,
    # With indices asked for, torch's max_pool1d passes the call on to the second.
    spellings=spelled("max_pool1d", "F") + spelled("max_pool1d_with_indices", "F"),
)

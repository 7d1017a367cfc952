"""Values where torch is installed: a ``torch.Tensor`` subclass that records what is asked of it.

A value is made empty and written to no device. When the run completes, ``p.__class__ = torch.Tensor`` and
``p.data = result``, as torch's own ``UninitializedParameter.materialize`` does: the name the user holds is
then a plain tensor.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pellucid_shared.errors import RecordingError, UnknownOpError
from pellucid_shared.ops import Kind, Op, lookup
from pellucid_shared.packing import WireTensor

from . import _values
from ._call import call, nearest_to, spellings, values_in
from ._later import VALUE, refuse
from ._lines import is_users, users_line
from ._operators import Operators
from ._recorder import Recorder, recording
from ._sizes import Shape, Size, refuse_sizes
from ._value import Value

_SPACES = ("torch", "torch.Tensor", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special")
_EMPTY = torch.empty(0)
_LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)
_TENSOR_KINDS = (Kind.TENSOR, Kind.OPERAND, Kind.TENSORS)

#: Methods a value answers without recording, also when they are written as functions.
_ANSWERED = frozenset(
    (
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "item",
        "tolist",
        "numpy",
        "__len__",
        "__bool__",
        "__float__",
        "__int__",
        "__complex__",
        "__index__",
        "__contains__",
        "__array__",
        "__reduce_ex__",
        "__copy__",
        "__deepcopy__",
        "cpu",
        "cuda",
        "__format__",
        "__repr__",
        "__iter__",
        "__hash__",
    )
)


# torch declares as plain attributes what a value answers by properties.
class TensorValue(Operators, torch.Tensor):  # type: ignore[misc, override]
    """A value that torch's own functions take, and record."""

    __hash__ = Operators.__hash__

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        op = _functions().get(id(func))
        if name == "__get__":  # a property that a value does not answer itself, or one of torch.Tensor
            return _property(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
        if op is None and name in _ANSWERED and args and isinstance(args[0], Value):
            return getattr(Operators, name)(*args, **kwargs)
        value = next(values_in((*args, *kwargs.values())))
        value.recorder.require_open(value)
        if op is None:
            refuse(VALUE, name, f".{name} of a value")
            raise _unknown(func, name)
        return call(op, args, _said(op, func, kwargs))


class RecordingMode(TorchFunctionMode):
    """While a trace is written: factories become values, and Python lists of values are refused with the
    right spelling. Thread-local, as all of torch's modes are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not recording():
            return func(*args, **kwargs)
        listed = [v for v in args[:1] if not isinstance(v, Value)]
        if func in _LITERALS and next(values_in(listed), None) is not None:
            raise RecordingError(
                f"torch.{func.__name__} makes a tensor of numbers, and these are values only the run knows; "
                "use torch.stack([...])",
                where=users_line(),
            )
        if func in _LITERALS:
            refuse_sizes(args[:1])
        op = _factories().get(id(func))
        # Factories that torch and transformers call (a module's initialisation, printing) are not the user's.
        if op is not None and is_users(sys._getframe(1).f_code.co_filename) and _takes(op, kwargs):
            return call(op, args, kwargs)
        return func(*args, **kwargs)


class TorchBackend:
    """See :class:`pellucid._backend.Backend`."""

    def tensor(self, recorder: Recorder, node: int) -> TensorValue:
        value: TensorValue = torch.Tensor._make_subclass(TensorValue, _EMPTY)
        value.__dict__.update(_recorder=recorder, _node=node)
        return value

    def received(self, result: Any) -> Any:
        return _values.to_torch(result) if isinstance(result, WireTensor) else result

    def fill(self, value: Any, result: Any) -> None:
        tensor = self.received(result)
        original = value.__dict__.pop("_adopted", None)
        _forget(value)
        if original is not None:
            value.copy_(tensor)  # in place, for whoever else holds the user's tensor
        else:
            value.data = tensor
        value.value = value.detach()

    def adopt(self, recorder: Recorder, target: Any) -> Any:
        if type(target) is not torch.Tensor or target.requires_grad:
            raise RecordingError(
                f"a {type(target).__name__} of yours cannot be written with a value of the trace; write to a "
                "plain tensor without gradients, or start from .clone() of it inside the trace",
                where=users_line(),
            )
        node = recorder.add(lookup("torch.clone").id, (recorder.add_literal(_values.from_torch(target)),))
        target.__class__ = TensorValue
        target._recorder, target._node, target._adopted = recorder, node, True  # type: ignore[attr-defined]
        recorder.adopted.append(target)
        target.save()  # type: ignore[attr-defined]
        return target

    def release(self, recorder: Recorder) -> None:
        for value in recorder.adopted:
            if isinstance(value, TensorValue):
                del value._adopted
                _forget(value)

    def tracks(self) -> bool:
        return torch.is_grad_enabled()

    def recording(self, recorder: Recorder) -> RecordingMode:
        return RecordingMode()

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return torch.Size(sizes) if not any(isinstance(size, Size) for size in sizes) else Shape(sizes)

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, name)
        return found

    def device(self) -> torch.device:
        return torch.device("cpu")


def _forget(value: Any) -> None:
    """Make a value a plain tensor, with nothing of the recording left on it."""
    value.__class__ = torch.Tensor
    del value._recorder, value._node


@functools.cache
def _functions() -> dict[int, Op]:
    """id of each of torch's functions that has an op -> the op."""
    table = {id(torch.Tensor.__getitem__): lookup("getitem"), id(torch.Tensor.__setitem__): lookup("setitem")}
    for name, op in spellings().items():
        found = _resolve(name)
        if found is not None:
            table[id(found)] = op
    return table


@functools.cache
def _factories() -> dict[int, Op]:
    """The part of :func:`_functions` that takes no tensor: zeros, randn, arange, ..."""
    return {
        key: op
        for key, op in _functions().items()
        if op.id != "getitem" and not any(p.kind in _TENSOR_KINDS for p in op.params)
    }


def _resolve(name: str) -> Any:
    """torch's object of that dotted name, or None where this torch has none."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def _said(op: Op, func: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords without those an op lacks that say nothing: torch's functions in Python pass on all of their
    own, the retired ones too (``size_average=None``)."""
    own = {param.name for param in op.params}
    return {k: v for k, v in kwargs.items() if k in own or k not in (d := _defaults(func)) or v != d[k]}


@functools.cache
def _defaults(func: Callable[..., Any]) -> dict[str, Any]:
    """What a function in Python takes where the user says nothing; builtins do not tell."""
    try:
        parameters = inspect.signature(func).parameters.values()
    except ValueError:
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _takes(op: Op, kwargs: Mapping[str, Any]) -> bool:
    """Whether an op has these keywords; a factory with others (generator=, out=) runs here and now."""
    return set(kwargs) <= {param.name for param in op.params}


def _unknown(func: Callable[..., Any], name: str) -> UnknownOpError:
    full = _dotted(func, name)
    return UnknownOpError(
        f"{full} is not an operation a graph may hold.{nearest_to(full)}", where=users_line()
    )


def _property(value: TensorValue, name: str) -> Any:
    answered = getattr(Operators, name, None)
    if isinstance(answered, property):
        return answered.__get__(value)
    raise UnknownOpError(f"a value has no {name!r}.{nearest_to(f'torch.Tensor.{name}')}", where=users_line())


def _dotted(func: Callable[..., Any], name: str) -> str:
    """The name under which the user finds a function of torch."""
    for space in _SPACES:
        for short in (name, name.partition("_")[2]):
            if short and getattr(_resolve(space), short, None) is func:
                return f"{space}.{short}"
    return name

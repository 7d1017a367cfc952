"""Values without torch: torch's methods under torch's names, and those of a numpy array once filled."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from pellucid_shared.errors import RecordingError
from pellucid_shared.packing import WireTensor
from pellucid_shared.values import Device, DType

from ._lines import users_line
from ._operators import BINARY, COMPARISONS, INPLACE, Operators
from ._recorder import Recorder


class _Layout:
    """What both classes have first among their bases: a class may change only to one of the same layout."""


class PlainValue(_Layout, Operators):
    """A value of the trace. Once the run completes it becomes a :class:`FilledValue`."""

    def __init__(self, recorder: Recorder, node: int) -> None:
        self._recorder, self._node = recorder, node


class FilledValue(_Layout):
    """A saved value after its run: behaves as the numpy array ``value``."""

    value: Any

    def save(self, name: str | None = None) -> NoReturn:
        raise RecordingError("the run is over: this is the value itself", where=users_line())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        return numpy.array(self.value, dtype=dtype) if copy else numpy.asarray(self.value, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "value" or (name.startswith("__") and not name.startswith("__array_")):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> Any:
        return self.value[_bare(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value[_bare(index)] = _bare(value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __contains__(self, item: Any) -> bool:
        return _bare(item) in self.value

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __complex__(self) -> complex:
        return complex(self.value)

    def __index__(self) -> int:
        return operator.index(self.value[()] if self.value.ndim == 0 else self.value)

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value[()] if self.value.ndim == 0 else self.value, spec)

    __hash__ = object.__hash__


class PlainBackend:
    """See :class:`pellucid._backend.Backend`."""

    def tensor(self, recorder: Recorder, node: int) -> PlainValue:
        return PlainValue(recorder, node)

    def received(self, result: Any) -> Any:
        return result.numpy() if isinstance(result, WireTensor) else result

    def fill(self, value: Any, result: Any) -> None:
        value.__dict__.clear()
        value.__class__ = FilledValue
        value.value = self.received(result)

    def adopt(self, recorder: Recorder, target: Any) -> NoReturn:
        raise RecordingError(
            f"a {type(target).__name__} of yours cannot be written with a value of the trace; write to a "
            "value, such as torch.zeros(...) of pellucid.torch",
            where=users_line(),
        )

    def release(self, recorder: Recorder) -> None:
        """Nothing is ever adopted."""

    def tracks(self) -> bool:
        return True

    def recording(self, recorder: Recorder) -> AbstractContextManager[None]:
        if "einops" in sys.modules:
            from . import _einops  # noqa: F401 (einops finds the backend by its base class)
        return nullcontext()

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return sizes

    def dtype(self, name: str) -> DType:
        return DType(name)

    def device(self) -> Device:
        return Device("cpu")


def _bare(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_bare(v) for v in value)
    return value.value if isinstance(value, FilledValue) else value


def _delegated(name: str, reflected: bool) -> Callable[[FilledValue, Any], Any]:
    apply = getattr(operator, f"__{name}__")

    def both(self: FilledValue, other: Any) -> Any:
        pair = (_bare(other), self.value) if reflected else (self.value, _bare(other))
        return apply(*pair)

    return both


def _delegated_inplace(name: str) -> Callable[[FilledValue, Any], FilledValue]:
    apply = getattr(operator, f"__{name}__")

    def changed(self: FilledValue, other: Any) -> FilledValue:
        self.value = apply(self.value, _bare(other))
        return self

    return changed


for _name in (*BINARY, *COMPARISONS):
    setattr(FilledValue, f"__{_name}__", _delegated(_name, reflected=False))
for _name in BINARY:
    setattr(FilledValue, f"__r{_name}__", _delegated(_name, reflected=True))
for _name in INPLACE:
    setattr(FilledValue, f"__{_name}__", _delegated_inplace(_name))
for _name in ("neg", "abs", "invert", "pos"):
    _apply = getattr(operator, _name)
    setattr(FilledValue, f"__{_name}__", lambda self, apply=_apply: apply(self.value))

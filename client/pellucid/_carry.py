"""What a loop carries from turn to turn."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from pellucid_shared.errors import RecordingError
from pellucid_shared.flow import CARRIED, CARRY, CARRY_SET
from pellucid_shared.values import Ref

from ._lines import users_line
from ._recorder import Recorder

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "abs", "invert", "pos")


class Carry:
    """``acc = loop.carry(start)``: ``acc.value`` is what it is at that line, ``acc.set(value)`` changes it.

    In arithmetic, and in torch's functions, it stands for its value, and ``acc += x`` sets it. Behind the
    loop it is what the last turn that ran left.
    """

    def __init__(self, recorder: Recorder, start: Any) -> None:
        self._recorder, self._start = recorder, start
        self._node: int | None = None

    def begin(self) -> None:
        """The loop begins here."""
        from ._call import graph_value

        self._node = self._recorder.add(CARRY, (graph_value(self._start, self._recorder),))

    @property
    def value(self) -> Any:
        """The value it has here.

        Raises:
            RecordingError: before its loop.
        """
        from ._call import value_of

        return value_of(self._recorder, self._recorder.add(CARRIED, (self._own(),)))

    @value.setter
    def value(self, value: Any) -> None:
        self.set(value)

    def set(self, value: Any) -> None:
        """Carry this from here on.

        Raises:
            ShapeError: it has not the shape and dtype of what is carried.
        """
        from ._call import graph_value

        self._recorder.add(CARRY_SET, (self._own(), graph_value(value, self._recorder)))

    def save(self, name: str | None = None) -> Any:
        """Send the value it has here back."""
        return self.value.save(name)

    def _own(self) -> Ref:
        if self._node is None:
            raise RecordingError(
                "what a loop carries is used in its block, and behind it", where=users_line()
            )
        return Ref(self._node)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return func(*map(_valued, args), **{k: _valued(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value[index] = value

    def __bool__(self) -> bool:
        return bool(self.value)

    __hash__ = object.__hash__


def _valued(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return type(arg)(map(_valued, arg))
    return arg.value if isinstance(arg, Carry) else arg


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Carry, Any], Any]:
    return lambda self, other: function(self.value, _valued(other))


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Carry, Any], Any]:
    return lambda self, other: function(other, self.value)


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[Carry, Any], Carry]:
    def set_to(self: Carry, other: Any) -> Carry:
        self.set(function(self.value, _valued(other)))
        return self

    return set_to


def _unary(function: Callable[[Any], Any]) -> Callable[[Carry], Any]:
    return lambda self: function(self.value)


for _name in (*_OPERATORS, *_COMPARISONS):
    setattr(Carry, f"__{_name.strip('_')}__", _binary(getattr(operator, _name)))
for _name in _OPERATORS:
    setattr(Carry, f"__r{_name.strip('_')}__", _reflected(getattr(operator, _name)))
    setattr(Carry, f"__i{_name.strip('_')}__", _augmented(getattr(operator, _name)))
for _name in _UNARY:
    setattr(Carry, f"__{_name}__", _unary(getattr(operator, _name)))

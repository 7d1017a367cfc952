"""Numbers that each turn of a loop knows: its own, members of lists of numbers, and arithmetic on them.

A body is written once, so while it is written such a number is not one yet; when the graph is written out it
is a plain constant of each turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from pellucid_shared.errors import RecordingError
from pellucid_shared.values import Ref

from ._lines import users_line
from ._recorder import Recorder

_BINARY = ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge")
_REFLECTED = ("add", "sub", "mul", "floordiv", "mod")


class Number:
    """A whole number, a float, or whether something is so: another in each turn.

    It is used in arithmetic with numbers and values, as an index or a bound of a slice, as an argument of
    ops, and as the condition of a branch.
    """

    def __init__(self, recorder: Recorder, node: int) -> None:
        self._recorder, self._node = recorder, node

    def ref(self, recorder: Recorder) -> Ref:
        """This number as an argument in the graph of ``recorder``."""
        self._recorder.require_open(self)
        if self._recorder is not recorder:
            raise RecordingError(f"{self!r} belongs to another trace that is still open", where=users_line())
        return Ref(self._node)

    def save(self, name: str | None = None) -> Any:
        """Send it back, as ``pellucid.save`` does: a list by turn."""
        from ._save import save

        return save(self, name)

    def _op(self, name: str, *args: Any) -> Any:
        if not all(isinstance(arg, Number | bool | int | float) for arg in args):
            return NotImplemented
        own = tuple(arg.ref(self._recorder) if isinstance(arg, Number) else arg for arg in args)
        return Number(self._recorder, self._recorder.add(f"number.{name}", own))

    def __neg__(self) -> Any:
        return self._op("neg", self)

    def __truediv__(self, other: Any) -> Any:
        return self._op("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._op("div", other, self)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        self._refuse("Python cannot branch on it; write `with tracer.cond(i == 2):`")

    def __index__(self) -> int:
        self._refuse(
            "it indexes values, not Python's own lists, counts or the model's modules: loop over what is "
            "wanted, `with tracer.loop(values) as item:`, or write a Python loop"
        )

    __int__ = __index__

    def __float__(self) -> float:
        self._refuse("compute with the number itself")

    def _refuse(self, remedy: str) -> NoReturn:
        raise RecordingError(
            f"{self!r} is another in each turn, and the body is written once: {remedy}", where=users_line()
        )

    def __repr__(self) -> str:
        return f"<{self._recorder.describe(self._node)}, {self._recorder.lines[self._node]}>"


def _binary(name: str) -> Callable[[Number, Any], Any]:
    return lambda self, other: self._op(name, self, other)


def _reflected(name: str) -> Callable[[Number, Any], Any]:
    return lambda self, other: self._op(name, other, self)


for _name in _BINARY:
    setattr(Number, f"__{_name}__", _binary(_name))
for _name in _REFLECTED:
    setattr(Number, f"__r{_name}__", _reflected(_name))

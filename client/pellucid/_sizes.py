"""Sizes that nobody knows yet: those of the prompts an edit will hold for."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

from pellucid_shared.errors import RecordingError

from ._lines import users_line

#: Asked for (node, axis) of an edit; its size in the trace the edit is replayed in.
Known = Callable[[int, int], int]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


class Size(int):
    """A size that depends on the prompt, in an edit. It stands where a whole number stands, in shapes and in
    indices, and is computed with by ``+ - * // %``; what it is only the traces know.

    As an int (which torch's functions want to see) it is a placeholder that no prompt's size comes near.

    Attributes:
        edit: the edit it belongs to.
        what: what it is, for people.
        made: (node, axis), or (left, operation, right).
    """

    edit: object
    what: str
    made: tuple[Any, ...]

    def __new__(cls, placeholder: int, edit: object, what: str, made: tuple[Any, ...]) -> Size:
        size = super().__new__(cls, placeholder)
        size.edit, size.what, size.made = edit, what, made
        return size

    def number(self, known: Known) -> int:
        """What it is in one trace."""
        if len(self.made) == 2:
            return known(*self.made)
        left, operation, right = self.made
        numbers = (p.number(known) if isinstance(p, Size) else p for p in (left, right))
        return _OPERATIONS[operation](*numbers)

    def _refuse(self, *_: Any) -> NoReturn:
        raise RecordingError(
            f"{self.what} is a size of the prompts to come, and an edit is recorded before any of them: it "
            "can stand in shapes and indices, computed with + - * // and %, and Python cannot ask what it is",
            where=users_line(),
        )

    __int__ = __float__ = __complex__ = __bool__ = __trunc__ = __round__ = __index__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __divmod__ = __rdivmod__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rshift__ = _refuse

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size):
            return self.edit is other.edit and bool(self.made == other.made)
        if isinstance(other, int | float):
            self._refuse()
        return NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.made)

    def __neg__(self) -> Any:
        return 0 - self

    def __repr__(self) -> str:
        return f"<{self.what}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)


def refuse_sizes(values: Any) -> None:
    """Raise RecordingError for a size among nested numbers that are to become a tensor."""
    for value in values:
        if isinstance(value, Size):
            value._refuse()
        if isinstance(value, list | tuple):
            refuse_sizes(value)


class Shape(tuple[int, ...]):
    """A shape some of whose sizes are not known yet, where torch would give a ``torch.Size``."""

    def numel(self) -> int:
        """The product of the sizes."""
        total = 1
        for size in self:
            total = total * size
        return total


def _operator(sign: str, *, reflected: bool) -> Callable[[Size, Any], Any]:
    def compute(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        if not isinstance(other, Size):  # einops divides by 1 to see whether a size divides
            if (sign, other) in (_COMMUTING if reflected else _IDENTITIES):
                return self
            if (sign, other) == ("%", 1) and not reflected:
                return 0
        left, right = (other, self) if reflected else (self, other)
        shown = [p.what if isinstance(p, Size) else str(p) for p in (left, right)]
        placeholder = _OPERATIONS[sign](_placeholder(left), _placeholder(right))
        return Size(placeholder, self.edit, f"({shown[0]} {sign} {shown[1]})", (left, sign, right))

    return compute


#: What leaves the other number as it is: on either side of it, and on its right.
_COMMUTING = (("+", 0), ("*", 1))
_IDENTITIES = (*_COMMUTING, ("-", 0), ("//", 1))


def _placeholder(value: int) -> int:
    return int.__add__(value, 0) if isinstance(value, Size) else value


for _sign, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(Size, f"__{_name}__", _operator(_sign, reflected=False))
    setattr(Size, f"__r{_name}__", _operator(_sign, reflected=True))

"""The calls of a module that the model calls more than once in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import IndexOutOfRangeError

from ._lines import users_line
from ._recorder import active, recording

if TYPE_CHECKING:
    from ._tree import Module


class Calls:
    """``module.calls``: the module at each of its calls within one pass, in the model's order."""

    def __init__(self, path: str, card: ModelCard, at: Callable[[int], Module]) -> None:
        self._path, self._card, self._at = path, card, at

    def __len__(self) -> int:
        later = recording() and active().region is not None and active().phase_of(self._path)
        return sum(call.module == self._path for call in (self._card.decode if later else self._card.prefill))

    def __getitem__(self, index: int) -> Module:
        count = len(self)
        if not -count <= index < count:
            often = "called once" if count == 1 else f"called {count} times" if count else "never called"
            raise IndexOutOfRangeError(
                f"{self._path or 'the model'} is {often} in a pass; call {index} was asked (from 0)",
                where=users_line(),
            )
        return self._at(index % count)

    def __iter__(self) -> Iterator[Module]:
        return (self[i] for i in range(len(self)))

"""Instructions that run under conditions, and what the ops of a written-out graph's control flow do.

A flag is a Python bool in its slot once it was taken. Where its own conditions did not hold, or its step
never ran, the slot is ``MISSING``, and whatever waits for the flag does not run either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pellucid_shared.errors import LimitError
from pellucid_shared.flat import Guards
from pellucid_shared.flow import BOUND, EITHER, FLAG, KEPT

from .plan import Backward, Call, Get, Guarded, Instruction


class Missing:
    """In a slot: what would have been made at a step that never ran, or in a branch that did not."""


MISSING = Missing()


def guarded(inner: Instruction, guards: Guards) -> Instruction:
    """The instruction under conditions, if there are any; flags lie in the slots of their nodes."""
    if not guards:
        return inner
    assert not isinstance(inner, Backward | Guarded)
    flags = tuple(flag for flag, _ in guards)
    out = inner.out if isinstance(inner, Call | Get) else flags[0]
    return Guarded(inner.node, guards, inner, out, (*flags, *inner.reads))


def keep(value: Any) -> Any:
    """A copy of the present version of a value; of one that is missing there is none to keep."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def either(flags: list[tuple[Any, bool]], new: Any, old: Any) -> Any:
    """``new`` where all flags are as wanted."""
    return new if all(flag is wanted for flag, wanted in flags) else old


def _kept(value: Any) -> Any:
    return value


def _bound(count: int) -> Any:
    raise LimitError(
        f"the loop has not ended in {count} turns: its condition still holds; raise max_turns, or let the "
        "condition become false"
    )


#: Each op of control flow that runs, as ``kernels.KERNELS`` has those of the registry.
KERNELS: dict[str, Callable[..., Any]] = {FLAG: bool, EITHER: either, KEPT: _kept, BOUND: _bound}


def takes_missing(instruction: Any) -> bool:
    """Whether an instruction knows what to do where a value it reads is missing."""
    return type(instruction) is Guarded or (
        type(instruction) is Call and instruction.function in (keep, either)
    )


def by_turn(entries: list[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """Values by their turns, in whatever order they were made: a list, of lists where bodies are nested."""
    entries = sorted(entries, key=lambda entry: entry[0])
    if not entries or len(entries[0][0]) == 1:
        return [value for _, value in entries]
    inner: dict[int, list[tuple[tuple[int, ...], Any]]] = {}
    for turns, value in entries:
        inner.setdefault(turns[0], []).append((turns[1:], value))
    return [by_turn(own) for own in inner.values()]

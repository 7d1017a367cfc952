"""What a compiled graph is: flat lists of instructions, one list for each event of the model's pass.

A plan holds no tensors. Values live in slots: slot i is node i's, and behind the nodes' come those of the
copies the compiler makes and of the literals the request brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid_shared.values import Site

Slots = list[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """Call ``function`` on arguments drawn from constants and slots; the result goes to slot ``out``.

    Attributes:
        node: the graph node this carries out, for errors.
        args, kwargs: constants, with anything in place of what ``fills`` replaces.
        fills: (position in args, slot).
        build: makes (args, kwargs) from the slots where a plain fill does not do (nested or keyword refs).
        reads: the slots read.
        frees: slots that no later instruction reads.
    """

    node: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fills: tuple[tuple[int, int], ...]
    build: Callable[[Slots], tuple[list[Any], dict[str, Any]]] | None
    out: int
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Get:
    """Read the tensor at a site into slot ``out``; ``edited``: this event overwrites it in place."""

    node: int
    site: Site
    out: int
    edited: bool
    reads: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Set:
    """Replace the tensor at a site by what ``build`` gives; ``copied``: a later edit is not the model's."""

    node: int
    site: Site
    build: Callable[[Slots], Any]
    copied: bool
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Save:
    """Take a structure of slots out under a name; ``shared``: its tensors may lie in memory not their own."""

    node: int
    name: str
    build: Callable[[Slots], Any]
    shared: bool
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


Instruction = Call | Get | Set | Save


@dataclass(frozen=True, slots=True)
class Event:
    """The instructions of one site event: a module's input (``enter``) or output in one of its calls."""

    module: str
    kind: str
    call: int
    last: bool  # nothing of the pass is needed after it
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: over all invokes together (packed), or over one."""

    invokes: tuple[int, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled graph.

    Attributes:
        before: instructions that need no pass.
        passes: the forward passes, in order; one that nothing needs is not there.
        slots: how many slots there are.
        literals: digest of each literal -> its slot.
    """

    before: tuple[Instruction, ...]
    passes: tuple[Pass, ...]
    slots: int
    literals: Mapping[str, int] = field(default_factory=dict)

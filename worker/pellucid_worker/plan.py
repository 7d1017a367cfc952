"""What a compiled graph is: flat lists of instructions, one list for each event of the model's pass.

A plan holds no tensors. Values live in slots: slot i is that of the flat graph's node i, and behind those
come the slots of the copies the compiler makes and of the literals the request brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid_shared.flat import Flat, Guards, SaveTo
from pellucid_shared.values import Site

Slots = list[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """Call ``function`` on arguments drawn from constants and slots; the result goes to slot ``out``.

    Attributes:
        node: the node of the flat graph this carries out.
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
class Gradient:
    """Where a gradient is read and written, in the place of a site; ``value`` is the node it is that of."""

    value: int


@dataclass(frozen=True, slots=True)
class Get:
    """Read the tensor at a site into slot ``out``; ``edited``: this event overwrites it in place."""

    node: int
    site: Site | Gradient
    out: int
    edited: bool
    reads: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Set:
    """Replace the tensor at a site by what ``build`` gives; ``copied``: a later edit is not the model's."""

    node: int
    site: Site | Gradient
    build: Callable[[Slots], Any]
    copied: bool
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Save:
    """Take a structure of slots out under a name, or as the next entry of the list of that name; ``shared``:
    its tensors may lie in memory not their own."""

    node: int
    to: SaveTo
    build: Callable[[Slots], Any]
    shared: bool
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Act:
    """An instruction that says itself how it is carried out: those of ``acts.py``."""

    node: int
    reads: tuple[int, ...]
    frees: tuple[int, ...] = field(default=(), kw_only=True)

    def carry_out(self, slots: Slots, view: Any, run: Any) -> None:
        """Do it. ``view`` is that of the event's site; ``run`` is the ``Run`` it is part of."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Track:
    """Let gradients reach the tensor in a slot from here on.

    Attributes:
        site: the tensor is the model's own there; None: it is one of the graph's.
        watched: its gradient is read or changed.
        edited: it is what a module returned, and is overwritten later.
    """

    node: int
    slot: int
    site: Site | None
    watched: bool
    edited: bool
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """What happens once the gradients of one tensor have come.

    Attributes:
        changes: the values whose gradients it changes: it must happen before they go on.
        needs: arrivals, by their place in the pass, that must have happened before.
    """

    changes: tuple[int, ...]
    needs: tuple[int, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Backward:
    """One backward pass.

    Attributes:
        loss: the slot of what it starts from.
        build: makes the gradient it starts with from the slots; None: 1.
        values: nodes whose gradients are wanted.
        arrivals: in order.
        retain: a later pass goes through what this one does.
        done: nodes of whose gradients no later pass has any.
    """

    node: int
    loss: int
    build: Callable[[Slots], Any] | None
    values: tuple[int, ...]
    arrivals: tuple[Arrival, ...]
    retain: bool
    done: tuple[int, ...]
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Guarded:
    """Carry out ``inner`` only where each flag's slot holds what is wanted; else its result is missing.

    Attributes:
        node, reads, frees: as of every instruction.
        out: the slot of the result; of an instruction without one, a slot it reads.
    """

    node: int
    guards: Guards
    inner: Call | Get | Set | Save | Act | Track
    out: int
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()

    def holds(self, slots: Slots) -> bool:
        return all(slots[flag] is wanted for flag, wanted in self.guards)


Instruction = Call | Get | Set | Save | Act | Track | Backward | Guarded


@dataclass(frozen=True, slots=True)
class Event:
    """The instructions of one site event: a module's input (``enter``) or output in one of its calls; or of
    the call ``name`` inside it, which is one of ``names``."""

    module: str
    kind: str
    call: int
    last: bool  # nothing of the pass is needed after it
    instructions: tuple[Instruction, ...]
    name: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: a step of its group."""

    step: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The passes of invokes that share them, or of one that has them to itself.

    Attributes:
        trace: number of the trace.
        invokes: which of its invokes.
        passes: those that carry out instructions, in order of their steps.
        whole: what the generation ends with is wanted: it goes on after the last of ``passes``.
        after: instructions that come behind all passes.
        eager: attention is written out, so that its calls can be seen.
    """

    trace: int
    invokes: tuple[int, ...]
    passes: tuple[Pass, ...]
    whole: bool
    after: tuple[Instruction, ...]
    eager: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled graph.

    Attributes:
        flat: the graph it is made of.
        before: instructions that need no pass.
        groups: the passes, in order; one that nothing needs is not there.
        slots: how many slots there are.
        literals: digest of each literal -> its slot.
        tracked: number of the last trace that a backward pass may reach into; -1: there is none.
        mutates: something is overwritten that a backward pass may need as it was.
    """

    flat: Flat
    before: tuple[Instruction, ...]
    groups: tuple[Group, ...]
    slots: int
    literals: Mapping[str, int] = field(default_factory=dict)
    tracked: int = -1
    mutates: bool = False

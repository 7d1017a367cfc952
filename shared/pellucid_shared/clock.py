"""One clock for a whole job: every event of every pass has a position on it; -1 is before the first.

A trace has a pass for each step; its invokes share the passes (packed), or have them one after another.
Behind its passes each trace has one more position, where what a generation ends with exists, and then a
stretch for each of its backward passes: where it begins, and one position for each of its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .card import ModelCard
from .regions import Trace
from .values import RESULT, Site


@dataclass(frozen=True, slots=True)
class Place:
    """Where a position lies.

    Attributes:
        trace: number of the trace.
        turn: the invoke whose pass it is, where invokes take turns; 0 where they share.
        step: which pass of the trace.
        within: position in that pass on the fine clock of ``inside.py``; -1: behind all passes of the trace.
    """

    trace: int
    turn: int
    step: int
    within: int


class Clock:
    """The positions of a job's events.

    Args:
        packed: per trace, whether its invokes share passes.
        backwards: per backward pass its trace, and how many positions it has; in order.
    """

    def __init__(
        self,
        card: ModelCard,
        traces: Sequence[Trace],
        packed: Sequence[bool],
        backwards: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._card, self._traces, self._packed = card, traces, packed
        last = max((c.exit for c in (*card.prefill, *card.decode)), default=0)
        self._length = (1 + last) * card.insides.scale
        self._starts, self._ends = [0], []
        self._backwards = [0] * len(backwards)
        for number, (trace, shared) in enumerate(zip(traces, packed, strict=True)):
            turns = 1 if shared else len(trace.invokes)
            self._ends.append(self._starts[-1] + turns * trace.steps * self._length)
            position = self._ends[-1] + 1
            for index, (where, length) in enumerate(backwards):
                if where == number:
                    self._backwards[index], position = position, position + length
            self._starts.append(position)

    @property
    def end(self) -> int:
        """The position behind the last."""
        return self._starts[-1]

    def at(self, trace: int, site: Site) -> int:
        """The position of a site's event; the site is known to exist."""
        if site.kind == RESULT:
            return self._ends[trace]
        turn = 0 if self._packed[trace] else site.invoke
        passes = turn * self._traces[trace].steps + site.step
        return self._starts[trace] + passes * self._length + self._card.insides.when(site)

    def backward(self, number: int) -> int:
        """Where a backward pass begins; the positions of its gradients follow."""
        return self._backwards[number]

    def in_backward(self, position: int) -> bool:
        """Whether a position is that of a gradient, or where a backward pass begins."""
        return position > self._ends[self._trace_at(position)]

    def place(self, position: int) -> Place:
        """The inverse of :meth:`at`."""
        trace = self._trace_at(position)
        if position >= self._ends[trace]:
            return Place(trace, 0, self._traces[trace].steps, -1)
        passes, within = divmod(position - self._starts[trace], self._length)
        turn, step = divmod(passes, self._traces[trace].steps)
        return Place(trace, turn, step, within)

    def _trace_at(self, position: int) -> int:
        return max(i for i, start in enumerate(self._starts[:-1]) if start <= position)

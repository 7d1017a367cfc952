"""One clock for a whole job: every event of every pass has a position on it; -1 is before the first.

A trace has a pass for each step; its invokes share the passes (packed), or have them one after another.
Behind its passes each trace has one more position, where what a generation ends with exists.
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
        within: position in that pass as the card counts; -1: behind all passes of the trace.
    """

    trace: int
    turn: int
    step: int
    within: int


class Clock:
    """The positions of a job's events.

    Args:
        packed: per trace, whether its invokes share passes.
    """

    def __init__(self, card: ModelCard, traces: Sequence[Trace], packed: Sequence[bool]) -> None:
        self._card, self._traces, self._packed = card, traces, packed
        self._length = 1 + max((c.exit for c in (*card.prefill, *card.decode)), default=0)
        self._starts = [0]
        for trace, shared in zip(traces, packed, strict=True):
            turns = 1 if shared else len(trace.invokes)
            self._starts.append(self._starts[-1] + turns * trace.steps * self._length + 1)

    @property
    def end(self) -> int:
        """The position behind the last."""
        return self._starts[-1]

    def at(self, trace: int, site: Site) -> int:
        """The position of a site's event; the site is known to exist."""
        if site.kind == RESULT:
            return self._starts[trace + 1] - 1
        call = self._card.call_at(site)
        assert call is not None
        turn = 0 if self._packed[trace] else site.invoke
        passes = turn * self._traces[trace].steps + site.step
        return (
            self._starts[trace] + passes * self._length + (call.exit if site.kind == "output" else call.enter)
        )

    def place(self, position: int) -> Place:
        """The inverse of :meth:`at`."""
        trace = max(i for i, start in enumerate(self._starts[:-1]) if start <= position)
        if position == self._starts[trace + 1] - 1:
            return Place(trace, 0, self._traces[trace].steps, -1)
        passes, within = divmod(position - self._starts[trace], self._length)
        turn, step = divmod(passes, self._traces[trace].steps)
        return Place(trace, turn, step, within)

"""Timing two things side by side: interleaved pairs, and the medians of what each pair shows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]

#: Seconds this thread has computed: others on the machine slow it only through the caches they share.
OWN: Clock = time.thread_time
#: Seconds that have passed.
WALL: Clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class Figure:
    """What a row measured.

    Attributes:
        value: the figure, in the row's unit; a median where there are repeats.
        quartiles: of the repeats, where there are repeats.
        repeats: how many.
        beside: the figures it comes from, and the least of the repeats.
    """

    value: float
    quartiles: tuple[float, float] | None = None
    repeats: int = 1
    beside: str = ""

    @staticmethod
    def median(values: Sequence[float], beside: str = "") -> Figure:
        """The figure of repeats."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Figure(middle, (low, high), len(values), beside)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds of two things, taken in turns."""

    first: list[float]
    second: list[float]

    def ratio(self) -> Figure:
        """How many times the second's seconds the first takes."""
        least = min(self.first) / min(self.second)
        return Figure.median(
            [a / b for a, b in zip(self.first, self.second, strict=True)],
            f"{_ms(self.first)} / {_ms(self.second)} ms; of the least {least:.3f}",
        )

    def difference(self, unit: float = 1e3) -> Figure:
        """How much longer the first takes: in milliseconds, or in what there are ``unit`` of in a second."""
        least = unit * (min(self.first) - min(self.second))
        return Figure.median(
            [unit * (a - b) for a, b in zip(self.first, self.second, strict=True)],
            f"{_ms(self.first)} - {_ms(self.second)} ms; of the least {least:.1f}",
        )


def pairs(
    first: Callable[[], object], second: Callable[[], object], count: int, clock: Clock, warm: int = 2
) -> Pairs:
    """Run both ``count`` times in turns, each of them first in half of the pairs."""
    for _ in range(warm):
        first()
        second()
    taken = Pairs([], [])
    for turn in range(count):
        if turn % 2:
            taken.second.append(seconds(second, clock))
            taken.first.append(seconds(first, clock))
        else:
            taken.first.append(seconds(first, clock))
            taken.second.append(seconds(second, clock))
    return taken


def seconds(run: Callable[[], object], clock: Clock) -> float:
    """How long one run takes."""
    start = clock()
    run()
    return clock() - start


def _ms(values: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f}"

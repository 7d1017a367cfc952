"""What was measured as a table: on the terminal, and in docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from limits import Row
from measure import Figure
from rich.console import Console
from rich.table import Table
from subject import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"
_HEADINGS = ("row", "measured", "aim", "limit", "quartiles", "repeats", "beside")
_DECIMALS = {"x": 3, "s": 3, "ms": 1, "us": 0, "MB": 1, "bytes": 0}


def machine(load: float) -> str:
    """Processor, cores, load at the start and now, and the versions that matter."""
    now = os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pellucid"))
    return (
        f"{_processor()}, {os.cpu_count()} cores, load {load:.1f} at the start and {now:.1f} at the end, "
        f"one torch thread; Python {platform.python_version()}, {packages}"
    )


def show(figures: Mapping[Row, Figure | None], about: str) -> None:
    """Print the table; what fails is red."""
    table = Table(title="What Pellucid costs", caption=about, title_justify="left", caption_justify="left")
    for heading in _HEADINGS:
        right = heading in ("measured", "aim", "limit", "repeats")
        table.add_column(heading, justify="right" if right else "left")
    for row, figure in figures.items():
        fails = figure is not None and not row.passes(figure.value)
        table.add_row(*_cells(row, figure), style="red" if fails else None)
    Console(width=None if os.isatty(1) else 160).print(table)


def write(figures: Mapping[Row, Figure | None], about: str) -> None:
    """Put the table into the page, in place of the one that is there."""
    lines = [
        about,
        "",
        f"| {' | '.join(_HEADINGS)} |",
        f"|{'---|' * len(_HEADINGS)}",
        *(f"| {' | '.join(_cells(row, figure))} |" for row, figure in figures.items()),
    ]
    block = "\n".join([_BEGIN, *lines, _END])
    text = PAGE.read_text()
    PAGE.write_text(re.sub(f"{_BEGIN}.*{_END}", lambda _: block, text, flags=re.DOTALL))


def _cells(row: Row, figure: Figure | None) -> tuple[str, ...]:
    aim, limit = (_text(row.unit, value) for value in (row.aim, row.limit))
    if row.allowance:
        limit += f" + {row.allowance:g}"
    if figure is None:
        return row.title, "not measured", aim, limit, "", "", "give --install"
    spread = "" if figure.quartiles is None else " to ".join(_number(row.unit, q) for q in figure.quartiles)
    return row.title, _text(row.unit, figure.value), aim, limit, spread, str(figure.repeats), figure.beside


def _text(unit: str, value: float | None) -> str:
    return "" if value is None else f"{_number(unit, value)} {unit}"


def _number(unit: str, value: float) -> str:
    return f"{value:.{_DECIMALS[unit]}f}"


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()

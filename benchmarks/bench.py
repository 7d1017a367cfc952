"""`make bench`: measures what Pellucid costs, prints one table, and with --check fails past the limits.

python benchmarks/bench.py [--quick] [--only ROW]... [--install] [--check] [--write]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the worker of `pellucid up` inherits it

import sys

import click
import client
import engine
import report
import torch
from limits import ROWS, Row
from measure import Figure
from subject import CannotGetModelError, ServiceError, Subject

import service

MEASURES = client.MEASURES | engine.MEASURES | service.MEASURES


@click.command()
@click.option("--quick", is_flag=True, help="A quarter of the repeats.")
@click.option("--only", multiple=True, metavar="ROW", type=click.Choice([row.key for row in ROWS]))
@click.option("--install", is_flag=True, help="Measure the base install too: needs the package index.")
@click.option("--check", is_flag=True, help="Fail past the limits of limits.py.")
@click.option("--write", is_flag=True, help="Put the table into docs/benchmarks.md.")
def main(quick: bool, only: tuple[str, ...], install: bool, check: bool, write: bool) -> None:
    """Measure what Pellucid costs, side by side with what it is compared with."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    figures: dict[Row, Figure | None] = {}
    try:
        with Subject(quick=quick) as subject:
            for row in ROWS:
                if only and row.key not in only:
                    continue
                if row.key == "install" and not (install or only):
                    figures[row] = None
                    continue
                print(f"measuring {row.title} ...", file=sys.stderr, flush=True)
                figures[row] = MEASURES[row.key](subject)
    except (CannotGetModelError, ServiceError) as error:
        raise click.ClickException(str(error)) from None
    about = report.machine(load)
    report.show(figures, about)
    if write:
        report.write(figures, about)
    if check:
        sys.exit(_check(figures))


def _check(figures: dict[Row, Figure | None]) -> int:
    """1 where a figure is past its limit and allowance."""
    past = [row for row, figure in figures.items() if figure is not None and not row.passes(figure.value)]
    for row in past:
        print(f"past the limit: {row.title} ({row.reason})", file=sys.stderr)
    return 1 if past else 0


if __name__ == "__main__":
    main()

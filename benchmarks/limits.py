"""Every row of the table: what is aimed at, what fails `--check`, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        key: what `--only` calls it.
        title: what the table calls it.
        unit: of the figure: "s", "ms", "us", "MB", "bytes", or "x", a ratio.
        aim: the figure worth having, or None.
        limit: `--check` fails past ``limit + allowance``; None where the figure is only for reading.
        allowance: what the noise of a shared machine may add to a sound figure.
        reason: why this limit.
    """

    key: str
    title: str
    unit: str
    aim: float | None
    limit: float | None
    reason: str
    allowance: float = 0.0

    def passes(self, value: float) -> bool:
        """Whether a figure is within the limit and its allowance."""
        return self.limit is None or value <= self.limit + self.allowance


_HOOKS = "compiled plans cost a few percent of hand-written hooks at most"
_MANY = "what a touched module costs adds up; own-edit says what it is"

ROWS = (
    Row("import", "import pellucid", "s", 0.05, 0.3, "scripts and shells that never trace do not wait"),
    Row(
        "import-model",
        "from pellucid import LanguageModel",
        "s",
        0.3,
        0.6,
        "a notebook's first line; pydantic and the rules of 400 operations come with it",
    ),
    Row("install", "base install on disk", "MB", 120, 120, "a thin client: no torch, no transformers"),
    Row("body", "request for one saved layer", "bytes", 600, 600, "an experiment travels as its graph alone"),
    Row("record", "recording and checking an operation", "us", 100, 250, "a loop of 1,000 is not felt"),
    Row("forward", "engine / hooks: best next token", "x", 1.05, 1.05, _HOOKS, 0.05),
    Row("one-layer", "engine / hooks: one saved layer", "x", 1.05, 1.05, _HOOKS, 0.03),
    Row("every-layer", "engine / hooks: every layer saved", "x", 1.05, 1.1, _MANY, 0.05),
    Row("one-edit", "engine / hooks: one edit", "x", 1.05, 1.05, _HOOKS, 0.05),
    Row("fifty-edits", "engine / hooks: 50 edits", "x", 1.05, 1.1, _MANY, 0.05),
    Row(
        "own-run", "engine - hooks, tiny model: a run", "us", 500, 1000, "below 1 % of a pass of 100 ms", 500
    ),
    Row("own-edit", "engine - hooks, tiny model: an edit", "us", 50, 100, "below 0.1 % of such a pass", 50),
    Row("compile", "new graph, first run: one saved layer", "ms", 1, 5, "small beside the pass it precedes"),
    Row("compile-edits", "new graph, first run: 50 edits", "ms", 20, 50, "below one pass of a small model"),
    Row("ready", "pellucid up to /ready", "s", 10, 30, "torch is imported, SmolLM2 loaded and probed", 30),
    Row("remote", "remote minus local, a small job", "ms", 25, 25, "a trip nobody feels beside a pass", 15),
    Row(
        "eight",
        "8 jobs at once / 8 bare passes",
        "x",
        1.5,
        2.5,
        "the model limits, not the queue",
        1,
    ),
)

"""The service: how soon it is ready, what a trip costs beside a local run, what eight users at once get."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from measure import WALL, Figure, pairs
from subject import PROMPT, Measure, Subject

if TYPE_CHECKING:
    from pellucid import LanguageModel

_TRIPS, _ROUNDS, _USERS = 60, 12, 8


def ready(subject: Subject) -> Figure:
    """Seconds from the command to the first 200 of /ready."""
    return Figure(subject.ready_seconds, beside="once; asked ten times a second")


def remote(subject: Subject) -> Figure:
    """Milliseconds from `with` to the tensor, more than the same lines take in this process."""

    def save_a_layer(model: LanguageModel) -> None:
        with model.trace(PROMPT):
            hidden = model.model.layers[10].output.save()
        assert hidden.shape[-1] == model.config.hidden_size

    there, here = subject.remote, subject.smollm2.model
    taken = pairs(
        lambda: save_a_layer(there), lambda: save_a_layer(here), subject.repeats(_TRIPS), WALL, warm=5
    )
    return taken.difference()


def eight(subject: Subject) -> Figure:
    """How many times as long eight jobs from eight threads take as eight passes in this process."""
    model, bare = subject.remote, subject.smollm2.engine.model
    ids = torch.tensor([subject.smollm2.ids])

    def job(_: int) -> None:
        with model.trace(PROMPT):
            model.lm_head.output[:, -1].argmax(-1).save()

    def passes() -> None:
        with torch.no_grad():
            for _ in range(_USERS):
                bare(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)

    with ThreadPoolExecutor(_USERS) as users:
        taken = pairs(lambda: list(users.map(job, range(_USERS))), passes, subject.repeats(_ROUNDS), WALL)
    found = taken.ratio()
    jobs, forwards = (_USERS / Figure.median(each).value for each in (taken.first, taken.second))
    return Figure(
        found.value, found.quartiles, found.repeats, f"{jobs:.1f} jobs/s, {forwards:.1f} bare passes/s"
    )


MEASURES: dict[str, Measure] = {"ready": ready, "remote": remote, "eight": eight}

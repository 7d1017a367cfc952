"""A session: many traces as one job. The mean state of one set of prompts replaces the state of another."""

from __future__ import annotations

from typing import Any

from gallery import run, word

CITIES = [
    "The Eiffel Tower is in the city of",
    "The Louvre is in the city of",
    "Notre-Dame is in the city of",
]
PROMPT = "My favourite animal is the"
LAYER = 27


def a_session(model: Any) -> tuple[str, str]:
    """What a prompt goes on with, before and after; no hidden state is downloaded."""
    with model.session() as session:
        mean: Any = 0
        for city in CITIES:
            with session.trace(city):
                mean = mean + model.model.layers[LAYER].output[:, -1] / len(CITIES)
        with session.trace(PROMPT):
            before = model.lm_head.output[0, -1].argmax().save()
        with session.trace(PROMPT):
            model.model.layers[LAYER].output[:, -1] = mean
            after = model.lm_head.output[0, -1].argmax().save()
    said = word(model, before), word(model, after)
    print(f"{PROMPT!r} goes on with {said[0]!r}")
    print(f"with the mean state of {len(CITIES)} prompts about a city at layer {LAYER}, with {said[1]!r}")
    return said


if __name__ == "__main__":
    run(a_session)

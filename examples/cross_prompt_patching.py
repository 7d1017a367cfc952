"""Cross-prompt patching: a hidden state of one prompt is put into another, in one pass."""

from __future__ import annotations

from typing import Any

from gallery import run, word

SOURCE = "The Eiffel Tower is in the city of"
TARGET = "The Colosseum is in the city of"


def cross_prompt_patching(model: Any) -> dict[int, str]:
    """What the target prompt goes on with, by the layer whose last state is the source's."""
    found = {}
    with model.trace() as tracer:
        with tracer.invoke(SOURCE):
            states = [layer.output[:, -1] for layer in model.model.layers]
        with tracer.invoke(TARGET):
            unchanged = model.lm_head.output[0, -1].argmax().save()
        for index, state in enumerate(states):
            with tracer.invoke(TARGET):
                model.model.layers[index].output[:, -1] = state
                found[index] = model.lm_head.output[0, -1].argmax().save()
    said = {index: word(model, token) for index, token in found.items()}
    print(f"{TARGET!r} goes on with {word(model, unchanged)!r}")
    first = next((i for i, text in said.items() if text == said[len(said) - 1]), None)
    print(
        f"with the last state of {SOURCE!r} put in at layer {first} or some later one, with {said[first]!r}"
    )
    for index, text in said.items():
        print(f"  layer {index:2d}: {text!r}")
    return said


if __name__ == "__main__":
    run(cross_prompt_patching)

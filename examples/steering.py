"""Steering: the difference of two contrasting prompts, added to every step of a generation.

After Turner et al., "Activation Addition: Steering Language Models Without Optimization" (2023).
"""

from __future__ import annotations

from typing import Any

from gallery import run

LOVE, HATE = "I love this. It is wonderful.", "I hate this. It is terrible."
PROMPT = "I think the film was"
LAYER, STRENGTH, NEW = 15, 4.0, 12


def steering(model: Any) -> dict[str, str]:
    """What the model writes, unchanged and pushed both ways."""
    written = {}
    with model.session() as session:
        with session.trace() as tracer:
            with tracer.invoke(LOVE):
                love = model.model.layers[LAYER].output[:, -1]
            with tracer.invoke(HATE):
                hate = model.model.layers[LAYER].output[:, -1]
        direction = love - hate
        for name, sign in (("unchanged", 0.0), ("towards love", STRENGTH), ("towards hate", -STRENGTH)):
            with session.generate(PROMPT, max_new_tokens=NEW) as tracer:
                with tracer.all():
                    model.model.layers[LAYER].output[:, -1] += sign * direction
                written[name] = tracer.result.save()
    texts = {name: model.tokenizer.decode(ids[0].tolist()) for name, ids in written.items()}
    for name, text in texts.items():
        print(f"{name:13} {text!r}")
    return texts


if __name__ == "__main__":
    run(steering)

"""Activation patching: where does a prompt keep what makes its answer?

A corrupted prompt is run once for each layer and token, with that one hidden state of the clean prompt put
in. Where the clean answer comes back, the information was there. After Meng et al., "Locating and Editing
Factual Associations in GPT" (2022), and Wang et al., "Interpretability in the Wild" (2022).
"""

from __future__ import annotations

from typing import Any

from gallery import heat_map, run, token_of, words

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"
EVERY = 3  # layers


def activation_patching(model: Any) -> list[list[float]]:
    """How much of the clean answer each patch restores, by layer and token: 1 is all of it, 0 none."""
    right, wrong = token_of(model, " Paris"), token_of(model, " Rome")
    count = len(words(model, CORRUPTED))
    layers = list(model.model.layers)[::EVERY]

    def margin() -> Any:
        logits = model.lm_head.output[0, -1]
        return (logits[right] - logits[wrong]).save()

    patched = []
    with model.trace() as tracer:
        with tracer.invoke(CLEAN):
            states = [layer.output for layer in layers]
            clean = margin()
        with tracer.invoke(CORRUPTED):
            corrupted = margin()
        for layer, state in zip(layers, states, strict=True):
            row = []
            for token in range(count):
                with tracer.invoke(CORRUPTED):
                    # Both prompts end alike, so tokens are matched from the end.
                    layer.output[:, token] = state[:, token - count]
                    row.append(margin())
            patched.append(row)
    span = float(clean - corrupted)
    restored = [[float(m - corrupted) / span for m in row] for row in patched]
    print(f"logit of ' Paris' over ' Rome': clean {float(clean):.2f}, corrupted {float(corrupted):.2f}")
    for index, row in enumerate(restored):
        print(f"layer {index * EVERY:2d} " + " ".join(f"{value:6.2f}" for value in row))
    heat_map("activation_patching", "part of the answer restored", restored, words(model, CORRUPTED))
    return restored


if __name__ == "__main__":
    run(activation_patching)

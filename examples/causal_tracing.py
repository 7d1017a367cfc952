"""Causal tracing: noise hides the subject, and single clean states bring the answer back.

After Meng et al., "Locating and Editing Factual Associations in GPT" (2022).
"""

from __future__ import annotations

from typing import Any

import torch
from gallery import heat_map, run, token_of, words

PROMPT = "The Eiffel Tower is in the city of"
EVERY, NOISE = 3, 3.0  # layers; standard deviations of the embeddings


def causal_tracing(model: Any) -> list[list[float]]:
    """Probability of the answer with one clean state restored, by layer and token."""
    tokens = words(model, PROMPT)
    city = tokens.index(" is")  # the subject is what comes before
    answer = token_of(model, " Paris")
    layers = list(model.model.layers)[::EVERY]

    def probability() -> Any:
        return model.lm_head.output[0, -1].softmax(dim=-1)[answer].save()

    traced = []
    with model.trace(seed=1) as tracer:
        with tracer.invoke(PROMPT):
            embeddings = model.model.embed_tokens.output
            noise = torch.randn(city, embeddings.shape[-1]) * embeddings.std() * NOISE
            states = [layer.output for layer in layers]
            clean = probability()
        with tracer.invoke(PROMPT):
            model.model.embed_tokens.output[0, :city] += noise
            hidden = probability()
        for layer, state in zip(layers, states, strict=True):
            row = []
            for token in range(len(tokens)):
                with tracer.invoke(PROMPT):
                    model.model.embed_tokens.output[0, :city] += noise
                    layer.output[:, token] = state[:, token]
                    row.append(probability())
            traced.append(row)
    table = [[float(p) for p in row] for row in traced]
    print(f"' Paris' has {float(clean):.3f}; with noise on the subject {float(hidden):.3f}")
    best = max((value, layer, token) for layer, row in enumerate(table) for token, value in enumerate(row))
    print(f"the state of layer {best[1] * EVERY} at {tokens[best[2]]!r} brings it to {best[0]:.3f}")
    heat_map("causal_tracing", "probability of ' Paris' with one clean state", table, tokens)
    return table


if __name__ == "__main__":
    run(causal_tracing)

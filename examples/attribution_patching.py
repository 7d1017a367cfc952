"""Attribution patching: activation patching for every layer and token at once, by one gradient.

The effect of a patch is taken to first order: gradient times difference of states. After Nanda, "Attribution
Patching: Activation Patching At Industrial Scale" (2023).
"""

from __future__ import annotations

from typing import Any

from gallery import heat_map, run, token_of, words

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"


def attribution_patching(model: Any) -> list[list[float]]:
    """The estimated change of the answer's margin, by layer and token."""
    right, wrong = token_of(model, " Paris"), token_of(model, " Rome")
    tokens = words(model, CORRUPTED)
    with model.session() as session:
        with session.trace(CLEAN):
            clean = [layer.output[:, -len(tokens) :] for layer in model.model.layers]
        with session.trace(CORRUPTED):
            states = [layer.output for layer in model.model.layers]
            logits = model.lm_head.output[0, -1]
            (logits[right] - logits[wrong]).backward()
            effects = [
                ((better - state) * state.grad).sum(dim=-1)[0].save()
                for better, state in zip(clean, states, strict=True)
            ]
    table = [effect.tolist() for effect in effects]
    best = max((value, layer, token) for layer, row in enumerate(table) for token, value in enumerate(row))
    print(f"layer {best[1]} at {tokens[best[2]]!r} is estimated to change the margin most: {best[0]:+.2f}")
    heat_map("attribution_patching", "estimated effect of a patch", table, tokens)
    return table


if __name__ == "__main__":
    run(attribution_patching)

"""The logit lens: each layer's output read as if it were the last one.

After nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from typing import Any

from gallery import heat_map, run, token_of, word, words

PROMPT = "The Eiffel Tower is in the city of"


def logit_lens(model: Any) -> list[str]:
    """What each layer would say next, best token by layer."""
    best, ours = [], []
    answer = token_of(model, " Paris")
    with model.trace(PROMPT):
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            probabilities = logits[0].softmax(dim=-1)
            best.append(probabilities[-1].argmax().save())
            ours.append(probabilities[:, answer].save())
    said = [word(model, token) for token in best]
    for layer, (text, probability) in enumerate(zip(said, ours, strict=True)):
        print(f"layer {layer:2d} would say {text!r:12} and gives ' Paris' {float(probability[-1]):.3f}")
    table = [[float(p) for p in row] for row in ours]
    heat_map("logit_lens", "probability of ' Paris' by layer and token", table, words(model, PROMPT))
    return said


if __name__ == "__main__":
    run(logit_lens)

"""Attention patterns: where heads look, and what a prompt goes on with if one of them may not.

``source.softmax_0`` is the call that makes the attention probabilities, [batch, heads, tokens, tokens].
"""

from __future__ import annotations

from typing import Any

from gallery import picture, run, words

PROMPT = "When Mary and John went to the store, John gave a drink to"
LAYER = 16


def attention_patterns(model: Any) -> list[float]:
    """How much each head of a layer attends to the first token, from the last one."""
    tokens = words(model, PROMPT)
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            pattern = model.model.layers[LAYER].self_attn.source.softmax_0.output.save()
            plain = model.lm_head.output[0, -1].save()
        with tracer.invoke(PROMPT):
            model.model.layers[LAYER].self_attn.source.softmax_0.output[:, :, -1, 1:] = 0
            changed = model.lm_head.output[0, -1].save()
    for head, row in enumerate(pattern[0, :, -1]):
        best = row.topk(3)
        looks = ", ".join(
            f"{tokens[i]!r} {float(p):.2f}" for i, p in zip(best.indices.tolist(), best.values, strict=True)
        )
        print(f"head {head}: the last token looks at {looks}")
    moved = float((changed - plain).abs().max())
    print(f"where the last token may look at the first alone, a logit moves by {moved:.2f} at most")

    def draw(axes: Any) -> None:
        axes.imshow(pattern[0].mean(dim=0), cmap="viridis")
        axes.set(title=f"attention of layer {LAYER}, mean of its heads")
        axes.set_xticks(range(len(tokens)), tokens, rotation=90)
        axes.set_yticks(range(len(tokens)), tokens)

    picture("attention_patterns", draw)
    return [float(p) for p in pattern[0, :, -1, 0]]


if __name__ == "__main__":
    run(attention_patterns)

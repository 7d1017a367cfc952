"""Ablating heads: which attention heads does an answer need?

Each invoke sets one head's part of what goes into the output projection to zero.
"""

from __future__ import annotations

from typing import Any

from gallery import picture, run, token_of

PROMPT = "When Mary and John went to the store, John gave a drink to"
LAYERS = (8, 12, 16, 20, 24)


def ablating_heads(model: Any) -> dict[int, list[float]]:
    """Change of the answer's logit without each head, by layer."""
    answer = token_of(model, " Mary")
    heads = model.config.num_attention_heads
    found: dict[int, list[Any]] = {}
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            whole = model.lm_head.output[0, -1, answer].save()
        for layer in LAYERS:
            found[layer] = []
            for head in range(heads):
                with tracer.invoke(PROMPT):
                    values = model.model.layers[layer].self_attn.o_proj.input
                    values.view(*values.shape[:2], heads, -1)[:, :, head] = 0
                    found[layer].append(model.lm_head.output[0, -1, answer].save())
    changes = {layer: [float(v - whole) for v in row] for layer, row in found.items()}
    print(f"the logit of ' Mary' is {float(whole):.2f}; without one head it changes by")
    for layer, row in changes.items():
        print(f"layer {layer:2d} " + " ".join(f"{change:6.2f}" for change in row))

    def draw(axes: Any) -> None:
        image = axes.imshow(list(changes.values()), aspect="auto", cmap="coolwarm")
        axes.set(title="change of the answer's logit", xlabel="head", ylabel="layer")
        axes.set_yticks(range(len(LAYERS)), LAYERS)
        axes.figure.colorbar(image)

    picture("ablating_heads", draw)
    return changes


if __name__ == "__main__":
    run(ablating_heads)

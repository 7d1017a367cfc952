"""Token indexing: ``.token[i]`` counts a prompt's own tokens, whatever the padding of its batch."""

from __future__ import annotations

from typing import Any

import torch
from gallery import run

PROMPTS = ["Paris is the capital of France", "Berlin is the capital of Germany, as you know", "Rome is old"]


def token_indexing(model: Any) -> torch.Tensor:
    """Similarity of the first tokens of prompts of different lengths, at one layer [prompts, prompts]."""
    with model.trace(PROMPTS):
        hidden = model.model.layers[10].output
        first = hidden.token[0].save()
        shape = tuple(hidden.shape)
    alone = []
    for prompt in PROMPTS:
        with model.trace(prompt):
            alone.append(model.model.layers[10].output[0, 0].save())
    largest = max(float((a - b).abs().max()) for a, b in zip(first, alone, strict=True))
    print(f"the batch is padded to {shape}; its first tokens differ from each prompt alone by {largest:.1e}")
    similarity = torch.nn.functional.cosine_similarity(first[:, None], first[None], dim=-1)
    print(similarity)
    return similarity


if __name__ == "__main__":
    run(token_indexing)

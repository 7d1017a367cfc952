"""Probing: does a hidden state say whether a sentence is about an animal? A linear classifier by layer."""

from __future__ import annotations

from typing import Any

import torch
from gallery import picture, run

ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "sheep",
    "lion",
    "tiger",
    "mouse",
    "rabbit",
    "wolf",
    "fox",
    "bear",
    "goat",
    "pig",
    "duck",
    "frog",
]
THINGS = [
    "car",
    "book",
    "house",
    "table",
    "river",
    "stone",
    "cloud",
    "lamp",
    "phone",
    "train",
    "bridge",
    "chair",
    "clock",
    "spoon",
    "door",
    "coin",
]
EVERY = 5  # layers


def probing(model: Any) -> dict[int, float]:
    """Accuracy on sentences the classifier has not seen, by layer."""
    nouns = [noun for pair in zip(ANIMALS, THINGS, strict=True) for noun in pair]
    labels = torch.tensor([1.0, -1.0] * len(ANIMALS))
    layers = list(range(0, len(model.model.layers), EVERY))
    with model.trace([f"Yesterday I saw the {noun}" for noun in nouns]):
        states = {layer: model.model.layers[layer].output[:, -1].save() for layer in layers}
    half = len(nouns) // 2
    accuracy = {}
    for layer, hidden in states.items():
        x = (hidden - hidden[:half].mean(0)) / hidden[:half].std()
        # Ridge regression, in its dual form: there are more features than sentences.
        gram = x[:half] @ x[:half].T + torch.eye(half)
        weights = x[:half].T @ torch.linalg.solve(gram, labels[:half])
        accuracy[layer] = float(((x[half:] @ weights).sign() == labels[half:]).float().mean())
        print(f"layer {layer:2d}: {accuracy[layer]:.0%} of {len(nouns) - half} new sentences right")

    def draw(axes: Any) -> None:
        axes.plot(list(accuracy), list(accuracy.values()), marker="o")
        axes.set(title="an animal, or not", xlabel="layer", ylabel="accuracy", ylim=(0, 1.05))

    picture("probing", draw)
    return accuracy


if __name__ == "__main__":
    run(probing)

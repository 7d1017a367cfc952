"""What the examples share: the model they run on, and a place for their pictures.

python examples/logit_lens.py                 # the model "smollm2" of the server PELLUCID_HOST names
python examples/logit_lens.py FOLDER_OR_HUB_ID   # a model in this process
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pellucid import LanguageModel

OUT = Path(__file__).parent / "out"


def run(example: Callable[[Any], Any]) -> None:
    """Run an example on the model that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    example(LanguageModel(name))


def words(model: Any, prompt: str) -> list[str]:
    """The prompt's tokens as text, special ones included."""
    return [model.tokenizer.decode([token]) for token in model.tokenizer(prompt)["input_ids"]]


def word(model: Any, token: Any) -> str:
    """One token as text."""
    text: str = model.tokenizer.decode([int(token)])
    return text


def token_of(model: Any, text: str) -> int:
    """The last token of a text, e.g. the one of ``" Paris"``."""
    return int(model.tokenizer(text)["input_ids"][-1])


def picture(name: str, draw: Callable[[Any], None]) -> None:
    """Save ``out/NAME.png``, drawn on matplotlib axes; without matplotlib there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        print("(no picture: matplotlib is not installed)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    draw(axes)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.png", dpi=120)
    pyplot.close(figure)
    print(f"picture: {OUT / name}.png")


def heat_map(name: str, title: str, values: Any, columns: list[str]) -> None:
    """Save a picture of rows by layer and columns by token."""

    def draw(axes: Any) -> None:
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis")
        axes.set(title=title, ylabel="layer")
        axes.set_xticks(range(len(columns)), [repr(c)[1:-1] for c in columns], rotation=45)
        axes.figure.colorbar(image)

    picture(name, draw)

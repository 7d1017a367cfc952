"""The first experiment: where a small language model finds out that the Eiffel Tower is in Paris.

`make demo` runs it. Against a server that is running, with SmolLM2's tokenizer.json:

    python examples/demo.py http://127.0.0.1:8470 smollm2 tokenizer.json
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (here, so that the first job's time is the job's)
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from tokenizers import Tokenizer

from pellucid import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


def next_token(model, zeroed=None):
    """The most probable next token and its probability, with one layer's MLP zeroed or none."""
    with model.trace(PROMPT) as tracer:
        if zeroed is not None:
            model.model.layers[zeroed].mlp.output[:] = 0
        probabilities = model.lm_head.output[0, -1].softmax(dim=-1)
        probability, token = probabilities.max(dim=-1)
        probability.save()
        token.save()
    return int(token), float(probability), tracer.job


def without_each_mlp(model, token):
    """The token's probability with one MLP zeroed, for each layer, in one job."""
    found = []
    with model.trace() as tracer:
        for layer in model.model.layers:
            with tracer.invoke(PROMPT):
                layer.mlp.output[:] = 0
                probabilities = model.lm_head.output[0, -1].softmax(dim=-1)
                found.append(probabilities[token].save())
    return [float(probability) for probability in found], tracer.job


def logit_lens(model, token):
    """Each layer's output read as if it were the last one: best token, its and our probability."""
    found = []
    with model.trace(PROMPT) as tracer:
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[:, -1]))
            probabilities = logits[0].softmax(dim=-1)
            best, index = probabilities.max(dim=-1)
            found.append((index.save(), best.save(), probabilities[token].save()))
    rows = [(int(index), float(best), float(ours)) for index, best, ours in found]
    return rows, tracer.job


def run(url: str, name: str, tokenizer: Path) -> None:
    """Print the experiment's source, run it on the server, and print what it found."""
    console = Console(highlight=False, soft_wrap=True)
    highlight = Syntax("", "python", theme="ansi_dark").highlight
    for part in (next_token, without_each_mlp, logit_lens):
        console.print(highlight(inspect.getsource(part)))
    console.print(f'The prompt: "{PROMPT}"\n')
    words = Tokenizer.from_file(str(tokenizer))
    model = LanguageModel(name, remote=url)

    token, probability, job = _timed(next_token, model)
    word = words.decode([token])
    console.print(f'next token: "{word}" with probability {probability:.3f}')
    console.print(job)

    without, job = _timed(without_each_mlp, model, token)
    worst, *others = sorted(range(len(without)), key=without.__getitem__)
    console.print(
        f'of all MLPs, zeroing layer {worst}\'s lowers it most: "{word}" is left with {without[worst]:.4f}'
    )
    console.print("then come " + ", ".join(f"layer {i} ({without[i]:.3f})" for i in others[:3]))
    console.print(job)

    token_then, probability, job = _timed(next_token, model, worst)
    console.print(f'next token without it: "{words.decode([token_then])}" with probability {probability:.3f}')
    console.print(job)

    lens, job = _timed(logit_lens, model, token)
    console.print(_table(lens, without, word, words))
    console.print(job)


def _timed(experiment: Callable[..., Any], *arguments: Any) -> Any:
    """What the experiment gives, its job told in a line: id, time in all and on the worker."""
    start = time.perf_counter()
    *found, job = experiment(*arguments)
    total = 1e3 * (time.perf_counter() - start)
    times = job.record().times
    inside = 1e3 * (times["completed"] - times["running"])
    line = (
        f"[dim]job {job.id}: {total:.0f} ms from call to values, {inside:.0f} ms of it on the worker[/dim]\n"
    )
    return (*found, line)


def _table(lens: Any, without: Any, word: str, words: Tokenizer) -> Table:
    table = Table(title="The logit lens", title_justify="left", box=None)
    table.add_column("layer", justify="right")
    table.add_column("would say")
    table.add_column("p", justify="right")
    table.add_column(f'p("{word}")', justify="right")
    table.add_column("")
    table.add_column("without this MLP", justify="right")
    for layer, ((index, best, ours), zeroed) in enumerate(zip(lens, without, strict=True)):
        said = repr(words.decode([index]))
        bar = "█" * round(20 * ours)
        table.add_row(str(layer), said, f"{best:.3f}", f"{ours:.3f}", f"{bar:<20}", f"{zeroed:.3f}")
    return table


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

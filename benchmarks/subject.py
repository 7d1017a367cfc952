"""What is measured: SmolLM2 in this process and behind `pellucid up`, and a tiny model, made on first use."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from measure import Figure

sys.path.append(str(Path(__file__).parent.parent / "deploy"))

from demo import ServiceError, service
from smollm2 import CannotGetModelError, folder

if TYPE_CHECKING:
    from pellucid import Graph, LanguageModel
    from pellucid_worker.engine import Engine

__all__ = ["NAME", "PROMPT", "ROOT", "CannotGetModelError", "Measure", "ServiceError", "Subject", "graph_of"]

ROOT = Path(__file__).parent.parent
NAME = "smollm2"
PROMPT = "The Eiffel Tower is in the city of"


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in this process: its engine, the same weights as users have them, and a prompt's token ids."""

    engine: Engine
    model: LanguageModel
    ids: list[int]


def _resident(engine: Engine, ids: list[int]) -> Resident:
    from pellucid import LanguageModel

    model = LanguageModel(NAME, remote=False, model=engine.model, tokenizer=engine.tokenizer)
    return Resident(engine, model, ids)


class Subject:
    """The model, its service, and how often to measure; a context that ends the service."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def repeats(self, count: int) -> int:
        """How often to repeat what is repeated ``count`` times at leisure."""
        return max(4, count // 4) if self.quick else count

    @functools.cached_property
    def folder(self) -> Path:
        return folder(lambda line: print(line, file=sys.stderr))

    @functools.cached_property
    def smollm2(self) -> Resident:
        """SmolLM2 and the prompt."""
        from pellucid_worker.loader import load

        engine = load(self.folder, id=NAME)
        return _resident(engine, engine.tokenizer(PROMPT)["input_ids"])

    @functools.cached_property
    def tiny(self) -> Resident:
        """As many layers as SmolLM2 has, so narrow that a pass is little more than Python's own time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from pellucid_worker.engine import Engine

        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=30,
            num_key_value_heads=4,
            vocab_size=2000,
        )
        model = LlamaForCausalLM(config)
        return _resident(Engine.from_model(model, id=NAME), list(range(1, 10)))

    @functools.cached_property
    def remote(self) -> LanguageModel:
        """SmolLM2 behind `pellucid up`."""
        from pellucid import LanguageModel

        return LanguageModel(NAME, remote=self._service[0])

    @property
    def ready_seconds(self) -> float:
        """From the start of `pellucid up` to the first 200 of /ready, asked ten times a second."""
        return self._service[1]

    @functools.cached_property
    def _service(self) -> tuple[str, float]:
        model = self.folder
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # how far loading is
            url = self._open.enter_context(service(model))
        return url, time.monotonic() - start


def graph_of(model: LanguageModel, given: Any, write: Callable[[LanguageModel], object]) -> Graph:
    """The graph that ``write`` records on ``model``; nothing is run."""
    with contextlib.suppress(_WrittenError), model.trace(given) as tracer:
        write(model)
        raise _WrittenError
    return tracer.graph


class _WrittenError(Exception):
    """Ends a trace without running it."""


Measure = Callable[[Subject], Figure]

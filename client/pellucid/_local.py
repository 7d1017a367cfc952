"""Running in this process: the worker's engine, loaded on first use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, MissingExtraError, NotFoundError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor
from pellucid_shared.wire import TokenizedInvoke

from ._inputs import Prompt
from ._progress import printed
from ._recorder import paused


@dataclass(frozen=True)
class LoadOptions:
    """What the user says about loading; see :class:`pellucid.LanguageModel`."""

    source: str
    device_map: Any = None
    dtype: str | None = None
    model: Any = None
    tokenizer: Any = None


class LocalModel:
    """A model in this process. See :class:`pellucid._target.Target`."""

    distant = False

    def __init__(self, name: str, options: LoadOptions) -> None:
        self._name = name
        self._options = options
        self._engine: Any = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Any:
        """The engine, loaded on first use.

        Raises:
            MissingExtraError: torch, transformers or accelerate is not installed.
        """
        with self._lock:
            if self._engine is None:
                self._engine = _load(self._name, self._options)
            return self._engine

    @property
    def card(self) -> ModelCard:
        card: ModelCard = self.engine.card
        return card

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if self.engine.tokenizer is None:
            raise InputError(f"{self._name} has no tokenizer; give it token ids instead of text")
        found: list[list[int]] = [list(ids) for ids in self.engine.tokenizer(list(texts))["input_ids"]]
        return found

    def run(
        self,
        graph: Graph,
        prompts: Sequence[Prompt],
        literals: Mapping[str, WireTensor],
        *,
        progress: bool,
        started: Callable[[Any], None],
    ) -> dict[str, Any]:
        inputs = [TokenizedInvoke(ids=prompt.ids or [], mask=prompt.invoke.mask) for prompt in prompts]
        results: dict[str, Any] = self.engine.run(graph, inputs, literals, notify=_printed)
        return results


def _printed(kind: str, data: Mapping[str, Any]) -> None:
    if kind == "log":
        printed(str(data["text"]))


def _load(name: str, options: LoadOptions) -> Any:
    with paused():  # a block may be what asks for the model first
        try:
            from pellucid_worker.engine import Engine
            from pellucid_worker.loader import load
        except ImportError as error:
            raise MissingExtraError(
                f"running {name} in this process needs {error.name or 'torch and transformers'}, which is "
                "not installed: pip install 'pellucid[local]', or name a server with PELLUCID_HOST or remote="
            ) from error
        if options.model is not None:
            return Engine.from_model(options.model, options.tokenizer, id=name)
        try:
            return load(options.source, id=name, dtype=options.dtype, device_map=options.device_map)
        except NotFoundError as error:
            raise NotFoundError(
                f"{error.message} This is a search in this process; for a model that a server has, set "
                "PELLUCID_HOST or give remote="
            ) from error

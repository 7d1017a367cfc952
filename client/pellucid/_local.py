"""Running in this process: the worker's engine, loaded when something is run.

Until then the card comes from the model's config alone, and the tokenizer is loaded by itself.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, MissingExtraError, NotFoundError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor
from pellucid_shared.wire import TokenizedInvoke

from ._inputs import Chat, Prompt, awaits_answer
from ._progress import printed
from ._recorder import paused

_NOT_ASKED: Any = object()
_ELSEWHERE = (
    "This is a search in this process; for a model that a server has, set PELLUCID_HOST or give remote="
)


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
        self._early_card: ModelCard | None = None
        self._early_tokenizer: Any = _NOT_ASKED
        self._lock = threading.RLock()

    @property
    def engine(self) -> Any:
        """The engine, loaded by the first run.

        Raises:
            MissingExtraError: torch, transformers or accelerate is not installed.
        """
        with self._lock:
            if self._engine is None:
                self._engine = _load(self._name, self._options)
            return self._engine

    @property
    def card(self) -> ModelCard:
        with self._lock:
            if self._engine is None and self._options.model is None:
                if self._early_card is None:
                    self._early_card = self._card_without_weights()
                if self._early_card is not None:
                    return self._early_card
        card: ModelCard = self.engine.card
        return card

    def _card_without_weights(self) -> ModelCard | None:
        """The card as the config alone shows it, or None where only the loaded model does."""
        with _local_parts(self._name):
            from pellucid_worker.meta import WeightsNeededError, meta_card

            try:
                return meta_card(
                    self._options.source,
                    id=self._name,
                    dtype=self._options.dtype,
                    has_tokenizer=self.tokenizer is not None,
                )
            except WeightsNeededError as error:
                warnings.warn(f"{error}; it is loaded now", stacklevel=2)
                return None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise InputError(f"{self._name} has no tokenizer; give it token ids instead of text")
        found: list[list[int]] = [list(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
        return found

    def render(self, chats: Sequence[Chat]) -> list[list[int]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self._name} has no chat template; give it text instead of messages")
        try:
            return [
                list(
                    self.tokenizer.apply_chat_template(
                        chat, add_generation_prompt=awaits_answer(chat), return_dict=False
                    )
                )
                for chat in chats
            ]
        except Exception as error:  # whatever a template raises
            raise InputError(
                f"the chat template of {self._name} refuses these messages: {str(error)[:300]}"
            ) from None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, or None."""
        with self._lock:
            if self._engine is not None or self._options.model is not None:
                return self.engine.tokenizer
            if self._early_tokenizer is _NOT_ASKED:
                with _local_parts(self._name):
                    from pellucid_worker.loader import load_tokenizer

                    self._early_tokenizer = load_tokenizer(self._options.source)
            return self._early_tokenizer

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
    with _local_parts(name):
        from pellucid_worker.engine import Engine
        from pellucid_worker.loader import load

        if options.model is not None:
            return Engine.from_model(options.model, options.tokenizer, id=name)
        return load(options.source, id=name, dtype=options.dtype, device_map=options.device_map)


@contextlib.contextmanager
def _local_parts(name: str) -> Iterator[None]:
    """Around what needs the worker's package: says what is to be done where there is none, or no model."""
    with paused():  # a block may be what asks for the model first
        try:
            yield
        except ImportError as error:
            raise MissingExtraError(
                f"running {name} in this process needs {error.name or 'torch and transformers'}, which is "
                "not installed: pip install 'pellucid[local]', or name a server with PELLUCID_HOST or remote="
            ) from error
        except NotFoundError as error:
            if _ELSEWHERE in error.message:
                raise
            raise NotFoundError(f"{error.message} {_ELSEWHERE}") from error

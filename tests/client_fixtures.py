"""A model that exists only as a card: traces over it are written and checked, and handed back as graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from hand_card import hand_card
from pellucid import LanguageModel
from pellucid_shared.card import ModelCard
from pellucid_shared.errors import PellucidError
from pellucid_shared.graph import Graph


class CardTarget:
    """A target that tokenizes one character to one token and answers what ``answer`` makes of the graph."""

    def __init__(
        self, card: ModelCard, *, distant: bool, answer: Callable[[Graph], dict[str, Any]] | None
    ) -> None:
        self.card = card
        self.distant = distant
        self.trips: list[list[str]] = []
        self.graphs: list[Graph] = []
        self._answer = answer

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        self.trips.append(list(texts))
        return [[ord(c) % self.card.vocab_size for c in text] for text in texts]

    def render(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        self.trips.append(["chats"])
        return self.tokenize(["".join(f"{m['role'][0]}{m['content']}" for m in chat) for chat in chats])

    @property
    def tokenizer(self) -> None:
        """None: what this target tokenizes by has no name."""

    def run(
        self, graph: Graph, prompts: Sequence[Any], literals: Mapping[str, Any], **_: Any
    ) -> dict[str, Any]:
        self.graphs.append(graph)
        assert self._answer is not None, "this trace was not meant to run"
        return self._answer(graph)


class CardModel(LanguageModel):
    """A LanguageModel over a :class:`CardTarget`."""

    def __init__(
        self,
        card: ModelCard | None = None,
        *,
        distant: bool = True,
        answer: Callable[[Graph], dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self._made = CardTarget(card or hand_card(), distant=distant, answer=answer)
        super().__init__("m", remote=False, **options)

    @property
    def made(self) -> CardTarget:
        return self._made

    def _target(self, remote: bool | str | None) -> CardTarget:
        return self._made


def refused(
    model: LanguageModel, error: type[Exception], match: str, body: Callable[[], Any], prompt: Any = "hello"
) -> PellucidError:
    """The error that a trace with this body ends in."""
    with pytest.raises(error, match=match) as caught, model.trace(prompt):
        body()
    assert isinstance(caught.value, PellucidError)
    return caught.value

"""What a trace needs of the place where it runs, be that a server or this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pellucid_shared.card import ModelCard
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor

from ._inputs import Chat, Prompt


class Target(Protocol):
    """A model that can run graphs: a ``RemoteModel`` on a server, a ``LocalModel`` in this process."""

    #: Asking the tokenizer costs a trip: sizes are asked for only where they matter.
    distant: bool

    @property
    def card(self) -> ModelCard: ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, as the model is run on them."""
        ...

    def render(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Ids of each conversation, as the model's chat template writes it."""
        ...

    @property
    def tokenizer(self) -> Any:
        """What users get as ``model.tokenizer``."""
        ...

    def run(
        self,
        graph: Graph,
        prompts: Sequence[Prompt],
        literals: Mapping[str, WireTensor],
        *,
        progress: bool,
        started: Callable[[Any], None],
    ) -> dict[str, Any]:
        """Run a checked graph; values by save name (tensors as WireTensor or torch tensors). ``started`` is
        told the job as soon as there is one."""
        ...

"""Running on a server: one connection, and one served model behind it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import ConnectionFailedError, ModelNotFoundError, PellucidError, did_you_mean
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor

from ._http import Connection
from ._inputs import Chat, Prompt, awaits_answer
from ._job import Job
from ._progress import StatusLine
from ._tokenizer import RemoteTokenizer


class RemoteModel:
    """A model a server has. See :class:`pellucid._target.Target`."""

    distant = True

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self._name = name
        self._path = f"/v1/models/{quote(name)}"
        self._card: ModelCard | None = None
        self.tokenizer = RemoteTokenizer(connection, self._path, name)
        self._lock = threading.Lock()

    @property
    def card(self) -> ModelCard:
        """The model card, asked for once.

        Raises:
            ModelNotFoundError: not served here; lists what is.
            ConnectionFailedError: no server answers.
        """
        with self._lock:
            if self._card is None:
                self._card = self._fetch_card()
            return self._card

    def _fetch_card(self) -> ModelCard:
        try:
            return ModelCard.model_validate(self.connection.get_json(self._path))
        except ModelNotFoundError:
            served = [str(model["id"]) for model in self.connection.get_json("/v1/models")]
            has = f"it serves {', '.join(served)}" if served else "it serves no model yet"
            near = did_you_mean(self._name, served)
            raise ModelNotFoundError(
                f"{self.connection.url} does not serve {self._name!r}; {has}.{near}"
            ) from None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.ids(texts)

    def render(self, chats: Sequence[Chat]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for prompted in (True, False):
            mine = [i for i, chat in enumerate(chats) if awaits_answer(chat) == prompted]
            answers = self.tokenizer.chats([chats[i] for i in mine], prompted, {})
            found.update(zip(mine, (ids for _, ids in answers), strict=True))
        return [found[i] for i in range(len(chats))]

    def submit(self, graph: Graph, literals: Mapping[str, WireTensor], *, progress: bool) -> Job:
        """Send a checked graph as a job."""
        return Job.on(self.connection, self.connection.submit(graph, literals), progress=progress)

    def run(
        self,
        graph: Graph,
        prompts: Sequence[Prompt],
        literals: Mapping[str, WireTensor],
        *,
        progress: bool,
        started: Callable[[Job], None],
    ) -> dict[str, Any]:
        """See :class:`pellucid._target.Target`. Ctrl-C, or whatever else ends the wait in this process,
        cancels the job. Where the server is lost, the job is left to it."""
        with StatusLine(progress) as status:
            job = self.submit(graph, literals, progress=progress)
            started(job)
            try:
                outcome = job.outcome(job.last_event(status), status)
            except ConnectionFailedError as error:
                raise ConnectionFailedError(
                    f"job {job.id} was taken, then its server was lost: {error.message}"
                ) from None
            except PellucidError:
                raise
            except BaseException:
                with contextlib.suppress(PellucidError):
                    job.cancel()
                raise
        if isinstance(outcome, PellucidError):
            raise outcome
        return outcome

"""Running on a server: one connection, and one served model behind it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import ConnectionFailedError, ModelNotFoundError, PellucidError, did_you_mean
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor, unpack
from pellucid_shared.wire import Event, JobRecord, JobState

from ._http import Connection
from ._inputs import Chat, Prompt, awaits_answer
from ._later import JOB, refuse
from ._progress import StatusLine
from ._tokenizer import RemoteTokenizer


@dataclass(frozen=True)
class Job:
    """A job a server has.

    Attributes:
        id: its id on the server.
    """

    id: str
    connection: Connection

    def record(self) -> JobRecord:
        """The job's record: state, times by state, graph hash."""
        return JobRecord.model_validate(self.connection.get_json(f"/v1/jobs/{self.id}"))

    def cancel(self) -> None:
        """Ask the server to stop it."""
        self.connection.post_json(f"/v1/jobs/{self.id}/cancel", {})

    def __getattr__(self, name: str) -> NoReturn:
        refuse(JOB, name, f"job.{name}")
        raise AttributeError(f"a job has no {name!r}; it has id, record() and cancel()")

    def _wait(self, status: StatusLine) -> None:
        """Follow its events to the end.

        Raises:
            JobError: it failed or was cancelled; the class says why.
        """
        last: Event | None = None
        for last in self.connection.events(f"/v1/jobs/{self.id}/events"):
            status.event(last)
            if _state(last).final:
                break
        assert last is not None
        if _state(last) is not JobState.COMPLETED:
            raise PellucidError.from_problem(last.data.get("error") or self.record().error or {})

    def _result(self, status: StatusLine) -> dict[str, Any]:
        """The saved values by name."""
        found: dict[str, Any] = unpack(self.connection.download(f"/v1/jobs/{self.id}/result", status))
        return found


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
            job = Job(self.connection.submit(graph, literals), self.connection)
            started(job)
            try:
                job._wait(status)
                return job._result(status)
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


def _state(event: Event) -> JobState:
    """The job's state after an event."""
    if event.type in ("state", "gap"):
        return JobState(event.data["state"])
    return JobState.RUNNING

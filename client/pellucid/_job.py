"""A job on a server, followed by hand: from the trace that sent it, or by its id from any process."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias

from pellucid_shared.errors import ConnectionFailedError, InputError, JobTimeout, PellucidError
from pellucid_shared.packing import unpack
from pellucid_shared.wire import Event, JobRecord, JobState

from ._config import config
from ._http import Connection
from ._lines import at_users_line, users_line
from ._progress import StatusLine
from ._save import received

Results: TypeAlias = "dict[str, Any]"

_ID = re.compile(r"[A-Za-z0-9_-]+")


class Job:
    """A job a server has.

        with model.trace("The Eiffel Tower is in", blocking=False) as tracer:
            logits = model.lm_head.output.save("logits")
        job = tracer.job
        job.status                      # "queued", "running", "completed", "failed" or "cancelled"
        job.result()["logits"]          # waits; `logits` is filled too

        pellucid.Job(job.id).result()   # in any process, for a day

    In asyncio ``await job`` gives what ``job.result()`` does. Whatever ends a wait (a timeout, Ctrl-C, a task
    that is cancelled) leaves the job running. Any thread may use it.

    Args:
        id: its id on the server. Nothing is asked before the first use.
        host: URL of the server; left out, the configured one (``PELLUCID_HOST``).

    Raises:
        ConnectionFailedError: no server is configured.
        InputError: an id that no job can have, or half a URL.

    Every use of it raises JobNotFoundError where the server has no such job, and ConnectionFailedError where
    no server answers.
    """

    def __init__(self, id: str, host: str | None = None) -> None:
        url = host or config.host
        if url is None:
            raise ConnectionFailedError(
                "no server is configured: set PELLUCID_HOST to its URL, or give host='http://host:8470'",
                where=users_line(),
            )
        with at_users_line():
            self._be(id, Connection(url))

    @classmethod
    def on(cls, connection: Connection, id: str, *, progress: bool = True) -> Job:
        """A job on a server that is connected already."""
        job = cls.__new__(cls)
        job._be(id, connection, progress=progress)
        return job

    def _be(self, id: str, connection: Connection, *, progress: bool = True) -> None:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise InputError(f"{id!r:.60} is not the id of a job, which is letters and digits")
        self._id, self._connection, self._progress = id, connection, progress
        self._path = f"/v1/jobs/{id}"
        self._lock = threading.Lock()
        self._completed: Callable[[Results], None] | None = None
        self._failed: Callable[[PellucidError], None] | None = None
        self._outcome: Results | PellucidError | None = None

    # --- what users ask ------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Its id on the server."""
        return self._id

    @property
    def status(self) -> str:
        """The name of its state now, asked of the server: received, queued, running, completed, failed or
        cancelled."""
        return self.record().state.value

    def record(self) -> JobRecord:
        """The job's record: state, place in the queue, times by state (Unix seconds), error, graph hash."""
        return JobRecord.model_validate(self._connection.get_json(self._path))

    def events(self) -> Iterator[Event]:
        """Its events from the first on, live, to its end. Each has ``type`` (state, progress, log, token, or
        gap where earlier ones are no longer kept), ``data``, ``time`` (Unix seconds), ``attempt`` and ``id``.
        A line that drops is taken up where it broke."""
        for event in self._connection.events(f"{self._path}/events"):
            yield event
            if _is_last(event):
                return

    def wait(self, timeout: float | None = None) -> str:
        """Wait for its end, whatever it is: "completed", "failed" or "cancelled".

        Args:
            timeout: seconds; None waits for as long as it takes, 0 only looks.

        Raises:
            JobTimeout: it is not over by then. It goes on.
        """
        with StatusLine(self._progress) as status:
            return str(self.last_event(status, timeout).data["state"])

    def result(self, timeout: float | None = None) -> Results:
        """Wait for the saved values: a dict by name of torch tensors (numpy arrays where torch is absent),
        and of lists, tuples and dicts of them.

        The first time, the names saved in the trace that sent the job are filled with the same tensors.

        Args:
            timeout: seconds to wait for its end; None waits for as long as it takes.

        Raises:
            JobTimeout: it is not over by then. It goes on.
            JobCancelledError: it was cancelled.
            PellucidError: it failed; the class says why, and ``where`` names the line of the trace.
        """
        if self._outcome is None:
            with StatusLine(self._progress) as status:
                last = self.last_event(status, timeout)
                self._settle(self.outcome(last, status))
        return self._values()

    def __await__(self) -> Generator[Any, None, Results]:
        return self._awaited().__await__()

    def cancel(self) -> None:
        """Ask the server to stop it. One that waits is cancelled at once, one that runs at the next module
        its graph touches; one that is over stays as it is."""
        self._connection.post_json(f"{self._path}/cancel", {})

    def __repr__(self) -> str:
        return f"Job({self._id!r}, host={self._connection.url!r})"

    # --- what a trace asks ---------------------------------------------------------------------------------

    def then(self, completed: Callable[[Results], None], failed: Callable[[PellucidError], None]) -> None:
        """What is done with the first result that is asked for, or with the error it is."""
        self._completed, self._failed = completed, failed

    def last_event(self, status: StatusLine, timeout: float | None = None) -> Event:
        """Follow it to its end; the event that says how it ended.

        Raises:
            JobTimeout: it has not ended after ``timeout`` seconds.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        for event in self._connection.events(f"{self._path}/events", until):
            status.event(event)
            if _is_last(event):
                return event
        record = self.record()
        if record.state.final:
            data = {"state": record.state.value, "error": record.error}
            return Event(type="state", attempt=record.attempt, time=0.0, data=data)
        place = "" if record.position is None else f", number {record.position} in the queue,"
        raise JobTimeout(
            f"job {self._id} is {record.state.value}{place} after {timeout:g} s of waiting; it goes on: wait "
            "again, or call .cancel()",
            where=users_line(),
        )

    def outcome(self, last: Event, status: StatusLine) -> Results | PellucidError:
        """What a job that ended with this event came to: its saved values as received, or its error."""
        if JobState(last.data["state"]) is not JobState.COMPLETED:
            return PellucidError.from_problem(last.data.get("error") or self.record().error or {})
        values: Results = unpack(self._connection.download(f"{self._path}/result", status))
        return values

    # --- its end -------------------------------------------------------------------------------------------

    def _settle(self, outcome: Results | PellucidError) -> None:
        """Keep what it came to, and fill the saved names or say to them why there is nothing."""
        with self._lock:
            if self._outcome is not None:
                return
            if isinstance(outcome, PellucidError):
                if self._failed is not None:
                    self._failed(outcome)
                self._outcome = outcome
            else:
                values = received(outcome)
                if self._completed is not None:
                    self._completed(values)
                self._outcome = values
            self._completed = self._failed = None  # the trace is not kept alive by its job

    def _values(self) -> Results:
        if isinstance(self._outcome, PellucidError):
            raise self._outcome.with_traceback(None)
        assert self._outcome is not None
        return dict(self._outcome)

    async def _awaited(self) -> Results:
        if self._outcome is None:
            last = await self._connection.first(f"{self._path}/events", _is_last)
            self._settle(await asyncio.to_thread(self.outcome, last, StatusLine(False)))
        return self._values()


def _is_last(event: Event) -> bool:
    return event.type in ("state", "gap") and JobState(event.data["state"]).final

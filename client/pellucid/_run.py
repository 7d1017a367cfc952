"""One job from the first line written to the last value filled: what a trace and a session have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token
from typing import TYPE_CHECKING, Any

from pellucid_shared.errors import PellucidError, RecordingError
from pellucid_shared.graph import Graph

from ._backend import backend
from ._lines import at_users_line
from ._recorder import Recorder, enter, leave
from ._remote import RemoteModel
from ._save import fill
from ._warnings import warn_of_edits_that_show

if TYPE_CHECKING:
    from ._job import Job


class Run:
    """A recorder, and what happens around it.

    Attributes:
        job: the job a server has for it; None for local runs and before it is sent.
    """

    def __init__(self, recorder: Recorder, *, progress: bool, blocking: bool) -> None:
        self.recorder = recorder
        self.job: Job | None = None
        self._progress, self._blocking = progress, blocking
        self._token: Token[Recorder | None] | None = None
        self._mode: Any = None

    def enter(self) -> None:
        """Record what this thread writes from here on.

        Raises:
            RecordingError: another job is being written.
        """
        self._token = enter(self.recorder)
        try:
            self.recorder.tracks = backend().tracks()
            self._mode = backend().recording(self.recorder)
            self._mode.__enter__()
        except BaseException:
            leave(self._token)
            raise

    def leave(self, error: BaseException | None) -> None:
        """Stop recording; unless ``error`` ended the block, run what was written and fill its values."""
        assert self._token is not None
        self._mode.__exit__(None, None, None)
        leave(self._token)
        if error is not None:
            self._fail(f"has no value: the block ended with {type(error).__name__}, so nothing was run")
            return
        with at_users_line():
            self._carry_out()

    def _carry_out(self) -> None:
        recorder = self.recorder
        try:
            if not recorder.regions:
                raise RecordingError(
                    "this session holds no trace: open `with model.trace(prompt):` inside it"
                )
            graph, flat, timeline = recorder.finish()
            if recorder.tells:
                warn_of_edits_that_show(recorder, flat, timeline)
            if not self._blocking:
                self._send(graph)
                return
            if recorder.tells:
                results = recorder.target.run(
                    graph,
                    recorder.prompts,
                    recorder.literals,
                    progress=self._progress,
                    started=self._started,
                )
                fill(recorder, results)
        except PellucidError as error:
            self._failed(error)
            raise error from None  # torch's own traceback of a local run says nothing more
        except BaseException as error:
            self._fail(f"has no value: its run was ended by {type(error).__name__}")
            raise
        self._end()

    def _send(self, graph: Graph) -> None:
        """Leave the run to its job, which fills the saved names when its result is asked for."""
        recorder = self.recorder
        assert isinstance(recorder.target, RemoteModel)
        self.job = recorder.target.submit(graph, recorder.literals, progress=self._progress)
        self.job.then(self._completed, self._failed)
        recorder.suspend(f"has no value yet: job {self.job.id} was not waited for; call tracer.job.result()")

    def _completed(self, results: Mapping[str, Any]) -> None:
        fill(self.recorder, results)
        self._end()

    def _failed(self, error: PellucidError) -> None:
        self.recorder.at_users_line(error)
        self._fail(f"has no value: its job failed ({error})")

    def _end(self) -> None:
        self.recorder.close("was not saved, so it is gone: .save() it inside the block")

    def _started(self, job: Job) -> None:
        self.job = job

    def _fail(self, reason: str) -> None:
        backend().release(self.recorder)
        self.recorder.close(reason)

"""One job from the first line written to the last value filled: what a trace and a session have in common."""

from __future__ import annotations

from contextvars import Token
from typing import TYPE_CHECKING, Any

from pellucid_shared.errors import PellucidError

from ._backend import backend
from ._lines import at_users_line
from ._recorder import Recorder, enter, leave
from ._save import fill
from ._warnings import warn_of_edits_that_show

if TYPE_CHECKING:
    from ._remote import Job


class Run:
    """A recorder, and what happens around it.

    Attributes:
        job: the job a server has for it; None for local runs and before it is sent.
    """

    def __init__(self, recorder: Recorder, progress: bool) -> None:
        self.recorder = recorder
        self.job: Job | None = None
        self._progress = progress
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
            self._run()

    def _run(self) -> None:
        recorder = self.recorder
        try:
            graph, flat, timeline = recorder.finish()
            if recorder.saved:
                warn_of_edits_that_show(recorder, flat, timeline)
                results = recorder.target.run(
                    graph,
                    recorder.prompts,
                    recorder.literals,
                    progress=self._progress,
                    started=self._started,
                )
                fill(recorder, results)
        except PellucidError as error:
            recorder.at_users_line(error)
            self._fail(f"has no value: its job failed ({error})")
            raise error from None  # torch's own traceback of a local run says nothing more
        except BaseException as error:
            self._fail(f"has no value: its run was ended by {type(error).__name__}")
            raise
        recorder.close("was not saved, so it is gone: .save() it inside the block")

    def _started(self, job: Job) -> None:
        self.job = job

    def _fail(self, reason: str) -> None:
        backend().release(self.recorder)
        self.recorder.close(reason)

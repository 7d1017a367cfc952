"""``with model.scan(...)``: a trace that is written and checked, and not run."""

from __future__ import annotations

from pellucid_shared.errors import PellucidError

from ._backend import backend
from ._run import Run


class ScanRun(Run):
    """A job of which only shapes, order and errors are wanted. Saved values say that there is nothing."""

    def _carry_out(self) -> None:
        recorder = self.recorder
        try:
            if recorder.unsized:
                recorder.resolve()  # no server looks at it later: its true sizes are asked for now
            recorder.finish()
        except PellucidError as error:
            recorder.at_users_line(error)
            self._fail(f"has no value: its scan failed ({error})")
            raise
        backend().release(recorder)
        recorder.close("has no value: model.scan() runs nothing; use model.trace() for values")

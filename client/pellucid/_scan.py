"""``with model.scan(...)``: a trace that is written and checked, and not run."""

from __future__ import annotations

from pellucid_shared.errors import InputError, PellucidError

from ._backend import backend
from ._tracer import Tracer


class Scan(Tracer):
    """A trace of which only shapes, order and errors are wanted. Saved values say that there is nothing."""

    def _run(self) -> None:
        recorder = self._recorder
        try:
            recorder.end_invoke()
            if not recorder.prompts:
                raise InputError("this scan has no input: give one to model.scan(prompt), or open invokes")
            if recorder.unsized:
                recorder.resolve()  # no server looks at it later: its true sizes are asked for now
            recorder.finish()
        except PellucidError as error:
            recorder.at_users_line(error)
            self._fail(f"has no value: its scan failed ({error})")
            raise
        backend().release(recorder)
        recorder.close("has no value: model.scan() runs nothing; use model.trace() for values")

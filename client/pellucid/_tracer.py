"""``with model.trace(...)``: one forward pass over one or several inputs, run when the block ends."""

from __future__ import annotations

from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from pellucid_shared.errors import InputError, PellucidError, RecordingError
from pellucid_shared.graph import Graph

from ._backend import backend
from ._body import Body
from ._inputs import Prompt, prompt
from ._later import TRACER, refuse
from ._lines import at_users_line, users_line
from ._recorder import Recorder, enter, leave
from ._save import fill
from ._target import Target
from ._warnings import warn_of_edits_that_show

if TYPE_CHECKING:
    from ._model import LanguageModel
    from ._remote import Job


class Tracer(Body):
    """One trace.

    Inside the block modules' sites are read and written, and values saved; at its end the graph is built
    and run, and every saved name is filled. An exception inside the block passes, and nothing is sent.

    Attributes:
        job: the job a server has for it, also where it failed; None for local runs and before the block ends.

    Ctrl-C while the run is waited for cancels the job on the server, or ends the pass in this process, and
    passes; the saved names then say that they have no value.
    """

    def __init__(self, model: LanguageModel, target: Target, given: Prompt | None, *, progress: bool) -> None:
        self._recorder = Recorder(model.name, target, model)
        self._given = given
        self._progress = progress
        self._token: Token[Recorder | None] | None = None
        self._mode: Any = None
        self.job: Job | None = None

    @property
    def graph(self) -> Graph:
        """The graph as written so far; after the block, what was run."""
        return self._recorder.graph()

    def invoke(self, *inputs: Any) -> Invocation:
        """``with tracer.invoke(prompt):`` one input of the pass; the body sees only its rows and tokens.

        Args:
            inputs: one input: a str, a list of str, token ids, a tensor of ids, or a dict with input_ids.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken.
            RecordingError: the trace was given its input already, or another body is open.
        """
        if not inputs:
            refuse(TRACER, "invoke()", "tracer.invoke() without an input")
        if self._given is not None:
            raise RecordingError(
                "this trace was given its input; leave it out of model.trace() to invoke several",
                where=users_line(),
            )
        return Invocation(self._recorder, one_input(inputs, "tracer.invoke"))

    def __getattr__(self, name: str) -> NoReturn:
        refuse(TRACER, name, f"tracer.{name}")
        raise AttributeError(f"a tracer has no {name!r}; it has invoke(), cache(), save_all(), graph, job")

    def __enter__(self) -> Tracer:
        self._token = enter(self._recorder)
        try:
            if self._given is not None:
                with at_users_line():
                    self._recorder.invoke = self._recorder.add_prompt(self._given)
            self._mode = backend().recording(self._recorder)
            self._mode.__enter__()
        except BaseException:
            leave(self._token)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        self._mode.__exit__(kind, error, traceback)
        leave(self._token)
        if error is None:
            with at_users_line():
                self._run()
        else:
            self._fail(f"has no value: the block ended with {type(error).__name__}, so nothing was run")

    def _run(self) -> None:
        recorder = self._recorder
        try:
            recorder.end_invoke()
            if not recorder.prompts:
                raise InputError(
                    "this trace has no input: give one to model.trace(prompt), or open "
                    "`with tracer.invoke(prompt):`"
                )
            graph, timeline = recorder.finish()
            warn_of_edits_that_show(recorder, timeline)
            if recorder.saved:
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
        backend().release(self._recorder)
        self._recorder.close(reason)


class Invocation(Body):
    """One input of a trace, and the block that is written about it."""

    def __init__(self, recorder: Recorder, given: Prompt) -> None:
        self._recorder = recorder
        self._given = given

    def __enter__(self) -> Invocation:
        self._recorder.require_open("this trace")
        if self._recorder.invoke is not None:
            raise RecordingError(
                "an invoke cannot be opened inside another; values cross from one to the next by their names",
                where=users_line(),
            )
        with at_users_line():
            self._recorder.invoke = self._recorder.add_prompt(self._given)
        return self

    def __getattr__(self, name: str) -> NoReturn:
        refuse(TRACER, name, f"invoker.{name}")
        raise AttributeError(f"an invoke has no {name!r}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with at_users_line():
                self._recorder.end_invoke()
        self._recorder.endings.clear()
        self._recorder.invoke = None


def one_input(inputs: tuple[Any, ...], what: str) -> Prompt:
    """The one input given to ``what``; raises InputError for none or several."""
    if len(inputs) != 1:
        raise InputError(
            f"{what} takes one input, found {len(inputs)}; a batch is a list: {what}([a, b])",
            where=users_line(),
        )
    try:
        return prompt(inputs[0])
    except PellucidError as error:
        error.where = users_line()
        raise

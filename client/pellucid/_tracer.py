"""``with model.trace(...)``: one forward pass over one or several inputs, run when the block ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from pellucid_shared.errors import InputError, PellucidError, RecordingError
from pellucid_shared.graph import Generation, Graph

from ._flow import Branches, Turns, loop, select, while_
from ._inputs import Prompt, prompt
from ._later import SESSION, TRACER, refuse
from ._lines import at_users_line, users_line
from ._recorder import Recorder
from ._run import Run
from ._sites import read_result
from ._steps import GrowingList, Steps, StepsBody, advance
from ._target import Target

if TYPE_CHECKING:
    from ._model import LanguageModel
    from ._remote import Job


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a trace is asked to be: a generation, or one pass; ``seed`` is that of its random numbers."""

    generation: Generation | None = None
    seed: int = 0
    progress: bool = True


class Session:
    """``with model.session() as s:`` several traces and generations that run as one job.

    Values of one are used in the next without a download; saved names are filled where the session ends.

    Attributes:
        job: the job a server has for it; None for local runs and before the block ends.
    """

    def __init__(self, model: LanguageModel, target: Target, *, progress: bool) -> None:
        self.run = Run(Recorder(model.name, target, model), progress)
        self.run.recorder.session = self
        self._model = model

    @property
    def job(self) -> Job | None:
        return self.run.job

    @property
    def graph(self) -> Graph:
        """The graph as written so far; after the block, what was run."""
        return self.run.recorder.graph()

    def trace(self, *inputs: Any, **options: Any) -> Tracer:
        """The same as ``model.trace``, in this session."""
        return self._model.trace(*inputs, **options)

    def generate(self, *inputs: Any, **options: Any) -> Tracer:
        """The same as ``model.generate``, in this session."""
        return self._model.generate(*inputs, **options)

    def loop(self, over: Any) -> Turns:
        """``with session.loop(n) as i:`` the traces inside are run in each turn, one turn after another."""
        return loop(self.run.recorder, over)

    def iter(self, values: Any) -> Turns:
        """``with session.iter(values) as item:`` the same, over values."""
        return loop(self.run.recorder, values)

    def __getattr__(self, name: str) -> NoReturn:
        refuse(SESSION, name, f"session.{name}")
        raise AttributeError(
            f"a session has no {name!r}; it has trace(), generate(), loop(), iter(), graph and job"
        )

    def __enter__(self) -> Session:
        self.run.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run.leave(error)


class Tracer:
    """One trace: a forward pass, or a generation.

    Inside the block modules' sites are read and written, and values saved; at its end the graph is built
    and run, and every saved name is filled. An exception inside the block passes, and nothing is sent. In a
    session the trace is one of several, and all of them run where the session ends.

    Attributes:
        job: the job a server has for it, also where it failed; None for local runs and before the block ends.

    Ctrl-C while the run is waited for cancels the job on the server, or ends the pass in this process, and
    passes; the saved names then say that they have no value.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Target,
        given: Prompt | None,
        options: TraceOptions,
        *,
        session: Session | None = None,
    ) -> None:
        self._run = (
            session.run if session is not None else Run(Recorder(model.name, target, model), options.progress)
        )
        self._recorder = self._run.recorder
        self._own = session is None
        self._given, self._options = given, options

    @property
    def job(self) -> Job | None:
        return self._run.job

    @property
    def graph(self) -> Graph:
        """The graph as written so far; after the block, what was run."""
        return self._recorder.graph()

    @property
    def iter(self) -> Steps:
        """Steps of the generation: ``with tracer.iter[1:3]:``, ``for step in tracer.iter[:]:``."""
        return Steps(self._recorder)

    def all(self) -> StepsBody:
        """``with tracer.all():`` a body for every step of the generation; the same as ``iter[:]``."""
        return self.iter[:]

    def next(self, steps: int = 1) -> None:
        """What follows in this invoke names the next step of the generation."""
        advance(self._recorder, steps)

    @property
    def result(self) -> Any:
        """The ids a generation ends with, prompt included, [batch, prompt + new] int64."""
        return read_result(self._recorder)

    @property
    def cond(self) -> Branches:
        """``with tracer.cond(flag):``, ``with tracer.cond.elif_(flag):``, ``with tracer.cond.else_():``."""
        return Branches(self._recorder)

    def select(self, flag: Any, a: Any, b: Any) -> Any:
        """``a`` where the flag, one element, holds, else ``b``; both are computed, and broadcast."""
        return select(self._recorder, flag, a, b)

    def loop(self, over: Any) -> Turns:
        """``with tracer.loop(n) as i:``, ``with tracer.loop(values) as item:`` a body run turn by turn.

        Args:
            over: a number of turns; or a list, a range, a tensor, or a value of known length.
        """
        return loop(self._recorder, over)

    def while_(self, condition: Callable[[], Any] | None = None, *, max_turns: int) -> Turns:
        """``with tracer.while_(lambda: flag, max_turns=n) as i:`` turns for as long as the condition holds.

        Args:
            condition: called once, where the block is opened; what it computes is computed before each turn.
                Left out, the block ends the loop by ``loop.until(flag)``.
            max_turns: the bound; a loop that would go on past it fails the run with a LimitError.
        """
        return while_(self._recorder, condition, max_turns)

    def list(self) -> GrowingList:
        """A list that bodies for several steps append to; save it to have it back."""
        return GrowingList(self._recorder)

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
        raise AttributeError(
            f"a tracer has no {name!r}; it has invoke(), iter, next(), cond, loop(), while_(), select(), "
            "result, graph and job"
        )

    def __enter__(self) -> Tracer:
        if self._own:
            self._run.enter()
        try:
            with at_users_line():
                self._recorder.open_trace(self._options.generation, self._options.seed)
                if self._given is not None:
                    self._recorder.invoke = self._recorder.add_prompt(self._given)
        except BaseException as error:
            if self._own:
                self._run.leave(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        missing = None
        if error is None and not self._recorder.has_input():
            missing = InputError(
                "this trace has no input: give one to model.trace(prompt), or open "
                "`with tracer.invoke(prompt):`",
                where=users_line(),
            )
        self._recorder.close_trace()
        if self._own:
            self._run.leave(error or missing)
        if missing is not None:
            raise missing


class Invocation:
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
        if self._recorder.region is not None and self._recorder.region != self._recorder.ground():
            raise RecordingError(
                "an invoke cannot be opened inside a branch or a loop; write those inside the invoke",
                where=users_line(),
            )
        with at_users_line():
            self._recorder.invoke = self._recorder.add_prompt(self._given)
        return self

    def next(self, steps: int = 1) -> None:
        """What follows in this body names the next step of the generation."""
        advance(self._recorder, steps)

    def __getattr__(self, name: str) -> NoReturn:
        refuse(TRACER, name, f"invoker.{name}")
        raise AttributeError(f"an invoke has no {name!r}")

    def __exit__(self, *_: object) -> None:
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

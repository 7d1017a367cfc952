"""``with model.trace(...)``: one forward pass over one or several inputs, run when the block ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from pellucid_shared.errors import InputError, PellucidError, RecordingError
from pellucid_shared.graph import Generation, Graph

from ._body import Body
from ._edit import Edit, replay_edits
from ._files import Experiment
from ._flow import Branches, Turns, loop, select, while_
from ._inputs import Prompt, prompt
from ._later import SESSION, TRACER, refuse
from ._lines import at_users_line, users_line
from ._passing import log, stop
from ._recorder import Recorder
from ._run import Run
from ._sites import read_result
from ._steps import GrowingList, Steps, StepsBody, advance
from ._whole import open_whole

if TYPE_CHECKING:
    from ._job import Job
    from ._model import LanguageModel


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a trace is asked to be.

    Attributes:
        generation: how it generates; None: it is one pass.
        seed: of its random numbers.
        tuple_outputs: blocks that return a tensor are seen as returning a tuple of one (``compat.py``).
        edits: those of the model, in order.
    """

    generation: Generation | None = None
    seed: int = 0
    tuple_outputs: bool = False
    edits: tuple[Edit, ...] = ()


class Session:
    """``with model.session() as s:`` several traces and generations that run as one job.

    Values of one are used in the next without a download; saved names are filled where the session ends.

    Attributes:
        job: the job a server has for it; None for local runs and before the block ends.
    """

    def __init__(self, model: LanguageModel, run: Run) -> None:
        self.run, self._model = run, model
        run.recorder.session = self

    @property
    def job(self) -> Job | None:
        return self.run.job

    @property
    def graph(self) -> Graph:
        """The graph as written so far; after the block, what was run."""
        return self.run.recorder.graph()

    @property
    def experiment(self) -> Experiment:
        """The graph with the tensors of the user's that it names; ``pellucid.save_experiment`` stores it."""
        return self.run.recorder.experiment()

    def trace(self, *inputs: Any, **options: Any) -> Tracer:
        """The same as ``model.trace``, in this session."""
        found: Tracer = self._model.trace(*inputs, **options)
        return found

    def generate(self, *inputs: Any, **options: Any) -> Tracer:
        """The same as ``model.generate``, in this session."""
        return self._model.generate(*inputs, **options)

    def log(self, *parts: Any, sep: str = " ") -> None:
        """The same as ``tracer.log``; between two traces, told when the first of them is over."""
        log(self.run.recorder, parts, sep)

    print = log

    def loop(self, over: Any) -> Turns:
        """``with session.loop(n) as i:`` the traces inside are run in each turn, one turn after another."""
        return loop(self.run.recorder, over)

    def iter(self, values: Any) -> Turns:
        """``with session.iter(values) as item:`` the same, over values."""
        return loop(self.run.recorder, values)

    def __getattr__(self, name: str) -> NoReturn:
        refuse(SESSION, name, f"session.{name}")
        raise AttributeError(
            f"a session has no {name!r}; it has trace(), generate(), loop(), iter(), log(), graph and job"
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


class Tracer(Body):
    """One trace: a forward pass, or a generation.

    Inside the block modules' sites are read and written, and values saved; at its end the graph is built
    and run, and every saved name is filled. An exception inside the block passes, and nothing is sent. In a
    session the trace is one of several, and all of them run where the session ends.

    Attributes:
        job: the job a server has for it, also where it failed; None for local runs and before the block ends.
            With ``blocking=False`` the block ends once it is sent, and ``tracer.job.result()`` waits for it.

    Ctrl-C while the run is waited for cancels the job on the server, or ends the pass in this process, and
    passes; the saved names then say that they have no value.
    """

    def __init__(self, run: Run, given: Prompt | None, options: TraceOptions, *, alone: bool = True) -> None:
        self._run, self._recorder = run, run.recorder
        self._given, self._options, self._own = given, options, alone

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

    @property
    def experiment(self) -> Experiment:
        """The graph with the tensors of the user's that it names; ``pellucid.save_experiment`` stores it."""
        return self._recorder.experiment()

    def log(self, *parts: Any, sep: str = " ") -> None:
        """Print values when the run comes by: shape, dtype, statistics and the first elements of tensors;
        strings and numbers as they are. In a body for steps it is one line a step. A server sends them as
        ``log`` events, at most 10,000 a job.

        Args:
            parts: values, numbers, strings, and lists, tuples and dicts of them; anything else as ``str()``
                shows it. A string has at most 1000 characters.

        Raises:
            GraphError: nothing, or more than 64 parts.
        """
        log(self._recorder, parts, sep)

    print = log

    def stop(self) -> None:
        """End the pass here, for the input whose body this is: what follows may use what was read so far, and
        touch nothing that the model reaches later. A generation takes no further step.

        Raises:
            RecordingError: outside the body of an input.
        """
        stop(self._recorder)

    def invoke(self, *inputs: Any) -> Invocation:
        """``with tracer.invoke(prompt):`` one input of the pass; the body sees only its rows and tokens.

        ``with tracer.invoke():`` is a body over the whole batch, the inputs before it: their rows one after
        another, each padded on the left to the longest (zeros in hidden states, the pad token among ids).

        Args:
            inputs: one input: a str, a list of str, token ids, a tensor of ids, or a dict with input_ids.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken.
            RecordingError: the trace was given its input already, another body is open, or there is no input
                before a body over the whole batch.
        """
        if self._given is not None:
            raise RecordingError(
                "this trace was given its input; leave it out of model.trace() to invoke several",
                where=users_line(),
            )
        return Invocation(self._recorder, one_input(inputs, "tracer.invoke") if inputs else None)

    def __getattr__(self, name: str) -> NoReturn:
        refuse(TRACER, name, f"tracer.{name}")
        has = (
            "invoke(), iter, all(), next(), cond, loop(), while_(), select(), list(), cache(), save_all(), "
            "log(), stop(), result, graph and job"
        )
        raise AttributeError(f"a tracer has no {name!r}; it has {has}")

    def __enter__(self) -> Tracer:
        if self._own:
            self._run.enter()
        try:
            with at_users_line():
                self._recorder.open_trace(self._options.generation, self._options.seed)
                self._recorder.tuple_outputs = self._options.tuple_outputs
                self._recorder.edits = self._options.edits
                if self._given is not None:
                    _open_body(self._recorder, self._given)
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
        failure = error
        if error is None:
            try:
                self._end_body()
            except PellucidError as mistake:
                mistake.where = mistake.where or users_line()
                failure = mistake
        self._recorder.close_trace()
        if self._own:
            self._run.leave(failure)
        if failure is not error and failure is not None:
            raise failure

    def _end_body(self) -> None:
        self._recorder.end_invoke()
        if not self._recorder.has_input():
            raise InputError(
                "this trace has no input: give one to model.trace(prompt), or open "
                "`with tracer.invoke(prompt):`"
            )


class Invocation(Body):
    """One input of a trace, or all before it, and the block that is written about it."""

    def __init__(self, recorder: Recorder, given: Prompt | None) -> None:
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
            _open_body(self._recorder, self._given)
        return self

    def next(self, steps: int = 1) -> None:
        """What follows in this body names the next step of the generation."""
        advance(self._recorder, steps)

    def __getattr__(self, name: str) -> NoReturn:
        refuse(TRACER, name, f"invoker.{name}")
        raise AttributeError(f"an invoke has no {name!r}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with at_users_line():
                self._recorder.end_invoke()
        self._recorder.endings.clear()
        self._recorder.invoke = None


def _open_body(recorder: Recorder, given: Prompt | None) -> None:
    """Begin the body of an input, with the model's edits at its head, or that of the whole batch."""
    if given is None:
        recorder.invoke = open_whole(recorder)
        return
    recorder.invoke = recorder.add_prompt(given)
    try:
        replay_edits(recorder)
    except BaseException:
        recorder.invoke = None
        raise


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

"""Steps of generation: bodies written once for several of them, and what they save."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from pellucid_shared.errors import RecordingError
from pellucid_shared.graph import APPEND, LIST, Each
from pellucid_shared.values import Ref

from ._call import graph_value
from ._lines import users_line
from ._recorder import Recorder


class Steps:
    """``tracer.iter``: index it with a step, a slice or a list of steps."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getitem__(self, steps: Any) -> StepsBody:
        return StepsBody(self._recorder, self._known(steps))

    def _known(self, steps: Any) -> int | list[int] | slice:
        """The steps as the graph has them: negative ones are counted from the last."""
        generation = self._recorder.current_trace().generation
        count = generation.max_new_tokens if generation else 1
        if isinstance(steps, slice):
            parts = (steps.start, steps.stop, steps.step)
            if all(part is None or type(part) is int for part in parts) and steps.step != 0:
                return steps
        elif type(steps) is int:
            return self._in_range(steps, count)
        elif isinstance(steps, list | tuple | range) and steps and all(type(s) is int for s in steps):
            known = [self._in_range(step, count) for step in steps]
            if len(set(known)) == len(known):
                return known
        raise RecordingError(
            f"tracer.iter is indexed by a step, a slice, or a list of different steps; found {steps!r:.60}",
            where=users_line(),
        )

    def _in_range(self, step: int, count: int) -> int:
        if not -count <= step < count:
            raise RecordingError(
                f"step {step} is asked of a generation of {count} steps (from 0); raise max_new_tokens",
                where=users_line(),
            )
        return step % count


class StepsBody:
    """Some steps: a ``with`` block is written once for all of them, a ``for`` loop is written step by step.

    In a block, what is saved comes back as a list with one entry for each step that ran (a plain value
    where there is one step). In a loop the step is an int, and a generation that ends early leaves what
    later steps saved without a value.
    """

    def __init__(self, recorder: Recorder, steps: int | list[int] | slice) -> None:
        self._recorder, self._steps = recorder, steps

    def __enter__(self) -> None:
        self._recorder.open_steps(self._steps)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.close_steps()

    def __iter__(self) -> Iterator[int]:
        recorder = self._recorder
        generation = recorder.current_trace().generation
        count = generation.max_new_tokens if generation else 1
        before = len(recorder.nodes)
        for step in Each(0, self._steps).of(count):
            recorder.open_steps(step, optional=True)
            try:
                yield step
            finally:
                recorder.close_steps()
        if len(recorder.nodes) == before:
            recorder.skimmed = users_line()


def advance(recorder: Recorder, steps: int, module: str | None = None) -> None:
    """Let what follows in this invoke name later steps: of one module, or of all.

    Raises:
        RecordingError: past the last step, or the trace does not generate.
    """
    trace = recorder.current_trace()
    recorder.require_steps()
    if trace.generation is None:
        raise RecordingError(
            "a trace is one forward pass and has no next step; generate with "
            "`with model.generate(prompt, max_new_tokens=n):`",
            where=users_line(),
        )
    if type(steps) is not int or steps < 1:
        raise RecordingError(
            f"next() goes on by a number of steps from 1, found {steps!r:.60}", where=users_line()
        )
    if module is None:
        recorder.step += steps
    else:
        recorder.steps_ahead[module] = recorder.steps_ahead.get(module, 0) + steps
    reached = recorder.step if module is None else recorder.phase_of(module)
    if reached >= trace.generation.max_new_tokens:
        raise RecordingError(
            f"step {reached} is asked of a generation of {trace.generation.max_new_tokens} steps (from 0); "
            "raise max_new_tokens",
            where=users_line(),
        )


class StepList(list[Any]):
    """What a body for several steps saved: an entry for each step that ran, once the run completed.

    ``value`` is the plain list.
    """

    def __init__(self, recorder: Recorder, made: str) -> None:
        super().__init__()
        self._recorder: Recorder | None = recorder
        self._made = made

    @property
    def value(self) -> list[Any]:
        """The plain list.

        Raises:
            ValueNotReadyError: before the block ends, or where the job failed.
        """
        self._require()
        return list(self)

    def fill(self, values: list[Any]) -> None:
        """Take the entries."""
        self._recorder = None
        self[:] = values

    def _require(self) -> None:
        if self._recorder is not None:
            raise self._recorder.not_ready(self)

    def __getitem__(self, index: Any) -> Any:
        self._require()
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self._require()
        return super().__iter__()

    def __len__(self) -> int:
        self._require()
        return super().__len__()

    def __repr__(self) -> str:
        return f"<{self._made}, a list by step>" if self._recorder is not None else super().__repr__()


class GrowingList:
    """``tracer.list()``: a list that is appended to as the run goes, also in bodies for several steps.

    Appending and saving are all it does before the run; afterwards the saved one behaves as a list.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._node = recorder.add(LIST)
        self._values: list[Any] | None = None

    def append(self, value: Any) -> None:
        """Lengthen it by a value, each time the run comes by here."""
        self._recorder.add(APPEND, (Ref(self._node), graph_value(value, self._recorder)))

    def save(self, name: str | None = None) -> GrowingList:
        """Send it back when the run completes, as long as it is then."""
        from ._save import save_node

        save_node(self._recorder, self, Ref(self._node), name)
        return self

    def fill(self, values: list[Any]) -> None:
        """Take the members."""
        self._values = values

    @property
    def value(self) -> list[Any]:
        """The plain list.

        Raises:
            ValueNotReadyError: before the block ends, where it was not saved, or the job failed.
        """
        if self._values is None:
            raise self._recorder.not_ready(self)
        return self._values

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return "<a list of the trace>" if self._values is None else repr(self._values)

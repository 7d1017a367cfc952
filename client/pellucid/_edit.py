"""``with model.edit():`` interventions that stay: recorded once, and written again at the head of every later
body of the model.

An edit is recorded under one invoke of unknown rows and tokens. Each trace writes its nodes anew, with the
sites of its own invokes and the sizes of its own prompts, before what the body says; a generation writes them
twice, for the prefill and for the steps after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from pellucid_shared.check import Scene
from pellucid_shared.errors import PellucidError, RecordingError
from pellucid_shared.graph import SAVE, Invoke, Node
from pellucid_shared.packing import WireTensor
from pellucid_shared.specs import Spec, TensorSpec
from pellucid_shared.values import Ref, Site, TensorRef, substitute

from . import _recorder
from ._backend import backend
from ._inputs import Prompt
from ._lines import at_users_line, users_line
from ._recorder import Checked, Recorder
from ._sizes import Size

if TYPE_CHECKING:
    from ._model import LanguageModel
    from ._target import Target

#: (rows, tokens) that stand for those of every prompt, by the placeholder they go with.
_SIZES = {_recorder._FIRST_PRIME: (1_009, 10_007), _recorder._OTHER_PRIME: (2_003, 20_011)}


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit as it was recorded: nodes, the user's line of each, and the tensors they name."""

    nodes: Sequence[Node]
    lines: Sequence[str]
    literals: Mapping[str, WireTensor]


class EditRecorder(Recorder):
    """An edit being written: a trace of one invoke whose rows and tokens nobody knows."""

    def __init__(self, model: str, target: Target, owner: object) -> None:
        super().__init__(model, target, owner)
        self.open_trace()
        rows, _ = _SIZES[_recorder._FIRST_PRIME]
        self.current_trace().prompts.append(Prompt(Invoke("every prompt to come"), rows))
        self.invoke = 0

    def add(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
        if op == SAVE:
            raise RecordingError(
                "nothing is saved in an edit, which belongs to no run: save in a trace of the edited model",
                where=users_line(),
            )
        return super().add(op, args, kwargs)

    def open_steps(self, steps: Any, *, optional: bool = False) -> NoReturn:
        raise self._has_no_steps()

    def require_steps(self) -> None:
        raise self._has_no_steps()

    def exact_spec(self, node: int) -> Spec:
        spec, unknown = self.spec(node), self.unknown_axes(node)
        if unknown is None or not isinstance(spec, TensorSpec):
            raise self._unknown(f"the shape of {self.describe(node)}")
        sizes = [self.exact_size(node, axis) for axis in range(spec.ndim)]
        return TensorSpec(tuple(sizes), spec.dtype)

    def exact_size(self, node: int, axis: int) -> int:
        spec, unknown = self.spec(node), self.unknown_axes(node)
        if unknown is None or not isinstance(spec, TensorSpec):
            raise self._unknown(f"the size of axis {axis} of {self.describe(node)}")
        if axis not in unknown:
            return spec.shape[axis]
        return Size(spec.shape[axis], self, f"{self.describe(node)}.shape[{axis}]", (node, axis))

    def resolve(self) -> NoReturn:
        raise self._unknown("where each prompt's tokens begin")

    def show_spec(self, node: int) -> str:
        return _in_words(str(self.spec(node)))

    def _sizes(self, start: int) -> list[tuple[int, int]]:
        return [_SIZES[start]]

    def _check_exactly(self, node: Node) -> Checked:
        try:
            return self._check(node, self._specs, _recorder._FIRST_PRIME)
        except PellucidError as error:
            if (told := _in_words(error.message)) != error.message:
                error.message = f"{told} (an edit holds for every prompt, whatever its rows and tokens)"
            raise

    def _check_in(self, node: Node, specs: Sequence[Spec], scene: Scene) -> Checked:
        def known(made: int, axis: int) -> int:
            spec = specs[made]
            assert isinstance(spec, TensorSpec)
            return spec.shape[axis]

        return super()._check_in(_with_sizes(node, known), specs, scene)

    def _unknown(self, what: str) -> RecordingError:
        return RecordingError(
            f"{what} depends on the prompts to come, and an edit is recorded before any of them; index with "
            "positions that hold for all, such as [:, -1]",
            where=users_line(),
        )

    def _has_no_steps(self) -> RecordingError:
        return RecordingError(
            "an edit has no steps of its own: in a generation it holds in each; name steps in the generation",
            where=users_line(),
        )


class Editing:
    """``with model.edit() as edited:`` a block that is recorded and kept, and runs nothing."""

    def __init__(self, model: LanguageModel, edited: LanguageModel) -> None:
        self._model, self._edited = model, edited
        self._recorder: EditRecorder | None = None
        self._token: Token[Recorder | None] | None = None
        self._mode: Any = None

    def __enter__(self) -> LanguageModel:
        with at_users_line():
            target = self._model._target(None)
            recorder = self._recorder = EditRecorder(self._model.name, target, self._model)
            recorder.tuple_outputs = self._model._tuple_outputs
            self._token = _recorder.enter_edit(recorder)
        self._mode = backend().recording(recorder)
        self._mode.__enter__()
        return self._edited

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recorder = self._recorder
        assert recorder is not None
        assert self._token is not None
        self._mode.__exit__(None, None, None)
        _recorder.leave(self._token)
        try:
            if error is None:
                recorder.close_trace()
                recorder.finish()
                self._edited._edits = (*self._edited._edits, self._recorded(recorder))
        finally:
            backend().release(recorder)
            recorder.close(
                "was made in an edit, which has no run of its own: read the site again in a trace of the "
                "edited model"
            )

    def _recorded(self, recorder: EditRecorder) -> Edit:
        if len(recorder.regions) > 1:
            raise RecordingError(
                "an edit holds reads, writes and operations of one pass; write regions in each trace",
                where=users_line(),
            )
        return Edit(tuple(recorder.nodes), tuple(recorder.lines), dict(recorder.literals))


def replay_edits(recorder: Recorder) -> None:
    """Write the edits of the trace's model at the head of the body that has just been opened.

    Raises:
        GraphError: an edit does not fit the prompt; ``where`` is the edit's line.
    """
    if not any(edit.nodes for edit in recorder.edits):
        return
    for edit in recorder.edits:
        _replay(edit, recorder)
    generation = recorder.current_trace().generation
    if generation is not None and generation.max_new_tokens > 1:
        recorder.open_steps(slice(1, None))
        try:
            for edit in recorder.edits:
                _replay(edit, recorder)
        finally:
            recorder.close_steps()


def _replay(edit: Edit, recorder: Recorder) -> None:
    at: dict[int, int] = {}

    def known(node: int, axis: int) -> int:
        return recorder.exact_size(at[node], axis)

    def leaf(value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(at[value.node])
        if isinstance(value, Site):
            return replace(value, invoke=recorder.current_invoke())
        if isinstance(value, TensorRef) and value.digest not in recorder.literals:
            return recorder.add_literal(edit.literals[value.digest])
        return value

    for position, (recorded, line) in enumerate(zip(edit.nodes, edit.lines, strict=True)):
        try:
            node = _with_sizes(recorded, known)
            args = [substitute(v, leaf) for v in node.args]
            made = recorder.add(node.op, args, {k: substitute(v, leaf) for k, v in node.kwargs.items()})
        except PellucidError as error:
            error.message = f"{error.message} (in an edit of the model, for the trace at {users_line()})"
            error.where = line
            recorder.refute(error)
            raise
        recorder.lines[made] = line
        at[position] = made


def _with_sizes(node: Node, known: Any) -> Node:
    """A node with numbers in place of the sizes it was written with."""

    def leaf(value: Any) -> Any:
        return value.number(known) if isinstance(value, Size) else value

    args = tuple(substitute(v, leaf) for v in node.args)
    return replace(node, args=args, kwargs={k: substitute(v, leaf) for k, v in node.kwargs.items()})


def _in_words(message: str) -> str:
    """A message with names in place of the numbers that stand for sizes."""
    rows, tokens = _SIZES[_recorder._FIRST_PRIME]
    for number, name in ((rows * tokens, "rows"), (tokens, "tokens"), (rows, "batch")):
        message = message.replace(str(number), name)
    return message

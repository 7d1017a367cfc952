"""``x.token[i]``: a value indexed along its tokens, counted from the first of the prompt, padding left out.

It is written in the ordinary indexing of a graph: ``x[:, i]`` where all rows are of one length, else an index
of its own for each row.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pellucid_shared.check import Size
from pellucid_shared.errors import IndexOutOfRangeError, OpArgumentError, PellucidError, ShapeError
from pellucid_shared.graph import GET, SET
from pellucid_shared.specs import Dim, Spec, TensorSpec

from ._call import call, spelled
from ._inputs import Prompt
from ._lines import users_line
from ._recorder import Recorder

if TYPE_CHECKING:
    from ._operators import Operators

#: Stand for the numbers of rows and of tokens: an axis of such a size is that axis.
_ROWS, _TOKENS = 1_009, 10_007

#: Ops that take a shape as their second argument.
_SHAPED = ("tensor.view", "torch.reshape", "tensor.expand")

#: Positions along the tokens of one row: one of them, or several.
Positions = int | list[int]


@dataclass(frozen=True, slots=True)
class Axes:
    """Which axes of a value are the batch and the tokens of its invoke; no batch axis: None."""

    batch: int | None
    tokens: int
    recorder: Recorder
    prompt: Prompt

    def windows(self) -> list[tuple[int, int]]:
        """Where each row's own tokens begin and end; asks the tokenizer where that is not known."""
        if self.prompt.ids is None:
            self.recorder.resolve()
        return self.prompt.windows()


class TokenAxis:
    """``x.token``, and ``x.t`` where it is not called.

    ``x.token[i]`` takes a whole number, a slice, or a list of whole numbers; negative ones count from the
    last token. Assigning writes in place where ``x`` does. What is read is a view where all rows are of one
    length; where they are not it is a copy, as every index by lists gives in torch: write with
    ``x.token[i] = v`` or ``x.token[i] *= 2``, which reach ``x`` always.

    Raises:
        ShapeError: the value has no token axis, or rows of different lengths would give different counts.
        IndexOutOfRangeError: a row has fewer tokens.
    """

    def __init__(self, value: Operators) -> None:
        self._value = value

    def __call__(self) -> Any:
        """torch's ``x.t()``: the two axes of a matrix exchanged."""
        return call(spelled("torch.t"), (self._value,), {})

    def __getitem__(self, index: Any) -> Any:
        axes = token_axes(self._value)
        if (same := _same_in_all(axes, index)) is not None:
            return self._value[same]
        positions = _positions(axes, index)
        if axes.batch is None:
            raise self._no_batch()
        if axes.tokens == axes.batch + 1:
            return self._value[_by_row(axes, positions)]
        rows = [self._row(axes, row, where) for row, where in enumerate(positions)]
        gone = isinstance(positions[0], int) and axes.tokens < axes.batch
        return call(spelled("torch.stack"), (rows,), {"dim": axes.batch - gone})

    def __setitem__(self, index: Any, value: Any) -> None:
        axes = token_axes(self._value)
        if (same := _same_in_all(axes, index)) is not None:
            self._value[same] = value
            return
        positions = _positions(axes, index)
        if axes.batch is None or axes.tokens != axes.batch + 1:
            raise self._no_batch()
        self._value[_by_row(axes, positions)] = value

    def _row(self, axes: Axes, row: int, where: Positions) -> Any:
        assert axes.batch is not None
        whole = self._value[(*_slices(axes.batch), row)]
        return whole[(*_slices(axes.tokens - (axes.tokens > axes.batch)), where)]

    def _no_batch(self) -> ShapeError:
        return ShapeError(
            f"the rows of this prompt begin at different tokens, and in {self._value} the rows do not stand "
            "beside the tokens; take .token[...] before the rows are picked out or moved",
            where=users_line(),
        )


def token_axes(value: Operators) -> Axes:
    """The token axis of a value, and the prompt it counts by.

    Raises:
        ShapeError: it has none, several, or belongs to several invokes.
    """
    recorder, node = value.recorder, value.ref(value.recorder).node
    before = _ancestors(recorder, node)
    if recorder.whole is not None and (joined := recorder.whole.prompt_of(before)) is not None:
        if tuple(value.shape)[:2] == (joined.rows, joined.tokens):
            return Axes(0, 1, recorder, joined)
        raise ShapeError(
            f"{value} is not rows by tokens of the whole batch; take .token[...] of what was read "
            "from the site",
            where=users_line(),
        )
    prompts = {id(p): p for i in before if recorder.nodes[i].op == GET for p in [recorder.prompt_of(i)]}
    if len(prompts) != 1:
        what = f"is made from {len(prompts)} prompts" if prompts else "comes from no site of the model"
        raise ShapeError(
            f"{value} {what}, so it has no token axis of one prompt; index the axis itself, x[:, i]",
            where=users_line(),
        )
    (prompt,) = prompts.values()
    several: list[int] = []
    for rows in (_ROWS, prompt.rows):
        spec = _spec_at(recorder, node, before, prompt, (rows, _TOKENS))
        if isinstance(spec, TensorSpec) and (tokens := _axes_of(spec, _TOKENS)):
            batches = _axes_of(spec, rows)
            batch = batches[0] if batches and (rows == _ROWS or batches[0] == 0) else None
            if len(tokens) == 1:
                return Axes(batch, tokens[0], recorder, prompt)
            several = tokens
            break
    own = (prompt.rows, prompt.tokens)
    if not several and _is_counted_out(recorder, before, prompt) and tuple(value.shape)[:2] == own:
        return Axes(0, 1, recorder, prompt)
    has = f"several axes that count tokens, {several}" if several else "no token axis"
    raise ShapeError(f"{value} has {has}; index the axis you mean itself, x[:, i]", where=users_line())


def _is_counted_out(recorder: Recorder, before: Sequence[int], prompt: Prompt) -> bool:
    """Whether a shape on the way was written with this prompt's numbers, ``h.view(2, 6, 8, -1)``: it says
    nothing of other numbers."""
    return any(
        prompt.tokens in recorder.nodes[i].args[1]
        for i in before
        if recorder.nodes[i].op in _SHAPED
        and len(recorder.nodes[i].args) > 1
        and isinstance(recorder.nodes[i].args[1], tuple)
    )


def _ancestors(recorder: Recorder, node: int) -> list[int]:
    """The nodes a value is made from, itself included, in program order."""
    found, stack = {node}, [node]
    while stack:
        for ref in recorder.nodes[stack.pop()].refs():
            if ref not in found:
                found.add(ref)
                stack.append(ref)
    return sorted(found)


def _spec_at(recorder: Recorder, node: int, before: Sequence[int], prompt: Prompt, size: Size) -> Spec:
    """The spec a value would have if its prompt had that many rows and tokens; None where it could not be."""
    specs: list[Spec] = [None] * (node + 1)
    try:
        for position in before:
            if recorder.nodes[position].op != SET:
                specs[position] = recorder.spec_of(recorder.nodes[position], specs, prompt, size)
    except PellucidError:
        return None
    return specs[node]


def _axes_of(spec: TensorSpec, size: int) -> list[int]:
    return [axis for axis, have in enumerate(spec.shape) if have == size and not isinstance(have, Dim)]


def _same_in_all(axes: Axes, index: Any) -> tuple[Any, ...] | None:
    """The plain index that means ``index`` in every row; None where rows differ."""
    index = _checked(index)
    prompt = axes.prompt
    if prompt.rows > 1 or prompt.invoke.mask is not None:
        if prompt.ids is None and _is_from_the_end(index):
            return (*_slices(axes.tokens), index)  # texts are padded on the left: the ends are one
        windows = axes.windows()
        if len(set(windows)) > 1:
            return None
        if windows[0] != (0, prompt.tokens):
            start, stop = windows[0]
            if isinstance(index, slice):  # stays a view
                own = range(start, stop)[index]
                return (*_slices(axes.tokens), slice(own.start, own.stop, own.step))
            return (*_slices(axes.tokens), _in_window(windows[0], index, 0))
    return (*_slices(axes.tokens), index)


def _is_from_the_end(index: Any) -> bool:
    return index == -1 or (isinstance(index, list) and set(index) == {-1})


def _positions(axes: Axes, index: Any) -> list[Positions]:
    """The positions on the token axis that ``index`` means in each row.

    Raises:
        ShapeError: they are not equally many.
    """
    index = _checked(index)
    found = [_in_window(window, index, row) for row, window in enumerate(axes.windows())]
    counts = {len(where) if isinstance(where, list) else None for where in found}
    if len(counts) > 1:
        lengths = [stop - start for start, stop in axes.windows()]
        raise ShapeError(
            f"rows of {lengths} tokens have different numbers of them in .token[{_shown(index)}]; "
            "take as many from each",
            where=users_line(),
        )
    return found


def _in_window(window: tuple[int, int], index: Any, row: int) -> Positions:
    start, stop = window
    if isinstance(index, slice):
        return [start + i for i in range(stop - start)[index]]
    if isinstance(index, list):
        return [_one(window, i, row) for i in index]
    return _one(window, index, row)


def _one(window: tuple[int, int], index: int, row: int) -> int:
    start, stop = window
    count = stop - start
    if not -count <= index < count:
        raise IndexOutOfRangeError(
            f".token[{index}] is out of range: row {row} of the prompt has {count} tokens", where=users_line()
        )
    return start + index % count


def _checked(index: Any) -> int | slice | list[int]:
    """Raises OpArgumentError unless it is a whole number, a slice, or a list of whole numbers."""
    if isinstance(index, slice):
        if index.step is not None and operator.index(index.step) < 1:
            raise OpArgumentError(
                f"a slice's step is at least 1, found {index.step}; use torch.flip to reverse",
                where=users_line(),
            )
        return index
    given = index.tolist() if hasattr(index, "tolist") and not hasattr(index, "recorder") else index
    many = list(given) if isinstance(given, list | range) else [given]
    if not many or any(isinstance(i, bool) or not hasattr(type(i), "__index__") for i in many):
        raise OpArgumentError(
            f".token[...] takes a whole number, a slice, or a list of whole numbers, found {index!r:.60}; "
            "index what it gives further",
            where=users_line(),
        )
    numbers = [operator.index(i) for i in many]
    return numbers if isinstance(given, list | range) else numbers[0]


def _by_row(axes: Axes, positions: Sequence[Positions]) -> tuple[Any, ...]:
    """The index that picks each row's own positions, where tokens follow the batch axis."""
    assert axes.batch is not None
    rows: list[Any] = list(range(len(positions)))
    if isinstance(positions[0], list):
        rows = [[row] for row in rows]
    return (*_slices(axes.batch), rows, list(positions))


def _slices(count: int) -> tuple[slice, ...]:
    return (slice(None),) * count


def _shown(index: Any) -> str:
    if not isinstance(index, slice):
        return repr(index)
    ends = ["" if e is None else str(e) for e in (index.start, index.stop)]
    return ":".join(ends if index.step is None else [*ends, str(index.step)])

"""Spellings of earlier years: ``tuple_outputs=True``, and ``model.forward()`` with its runner.

Decoder blocks once returned a tuple; those of current transformers return a bare tensor. With
``tuple_outputs=True`` such a block's ``.output`` is seen as a tuple of one, and ``.input`` of every module is
the tuple of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from pellucid_shared.card import Fields, Structure, TensorLeaf
from pellucid_shared.card import Sequence as Items
from pellucid_shared.errors import IndexOutOfRangeError, ShapeError, ValueNotReadyError

from . import _sites
from ._call import values_in
from ._lines import users_line
from ._recorder import Recorder
from ._save import save
from ._structure import DictValue, Unread, named_tuple
from ._tracer import Invocation, TraceOptions, Tracer

if TYPE_CHECKING:
    from ._inputs import Prompt
    from ._run import Run


class BlockOutput(Unread):
    """What a block returns, as the tuple of one that blocks once returned."""

    def __init__(self, recorder: Recorder, path: str) -> None:
        self._recorder, self._path = recorder, path
        self._tensor = _sites.read(
            recorder, path, "output"
        )  # now: a later replacement is not what this names

    def __getitem__(self, index: Any) -> Any:
        self._require(index)
        return self.read_all()[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self._require(index)
        _sites.replace(self._recorder, self._path, "output", value)
        self._tensor = _sites.read(self._recorder, self._path, "output")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read_all())

    def __len__(self) -> int:
        return 1

    def __add__(self, other: Any) -> tuple[Any, ...]:
        return (*self.read_all(), *other)

    def __radd__(self, other: Any) -> tuple[Any, ...]:
        return (*other, *self.read_all())

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _sites.NoFieldError(
            f"{self._path}.output is a tuple of one tensor (tuple_outputs=True), which has no {name!r}; "
            f"write {self._path}.output[0].{name}",
            where=users_line(),
        )

    def __repr__(self) -> str:
        return f"<{self._path}.output: a tuple of one tensor>"

    def read_all(self) -> tuple[Any, ...]:
        return (self._tensor,)

    def _require(self, index: Any) -> None:
        if not isinstance(index, slice) and index not in (0, -1):
            raise IndexOutOfRangeError(f"{self!r}; it has no {index!r}", where=users_line())

    def save(self, name: str | None = None) -> Any:
        """Send it back, as ``pellucid.save`` does; it comes back as a tuple of one."""
        return save(self, name)


def is_block(recorder: Recorder, path: str) -> bool:
    """Whether a module is a member of a list, and returns one tensor ``[batch, tokens, ...]``."""
    parent = recorder.card.module_index.get(path.rpartition(".")[0])
    call = recorder.card.call_index.get((path, 0))
    if parent is None or parent.class_name != "ModuleList" or call is None:
        return False
    output = call.output
    return isinstance(output, TensorLeaf) and (output.shape or ())[:2] == ("batch", "tokens")


def read_output(recorder: Recorder, path: str) -> Any:
    """``.output`` under ``tuple_outputs=True``."""
    if is_block(recorder, path):
        return BlockOutput(recorder, path)
    return _sites.read(recorder, path, "output")


def replace_output(recorder: Recorder, path: str, value: Any) -> None:
    """Assign to ``.output`` under ``tuple_outputs=True``: a tuple of one, or the tensor itself."""
    if is_block(recorder, path) and isinstance(value, BlockOutput | tuple | list):
        if len(value) != 1:
            raise ShapeError(
                f"{path}.output is a tuple of one tensor and was given {len(value)} values",
                where=users_line(),
            )
        value = value[0]
    _sites.replace(recorder, path, "output", value)


def read_arguments(recorder: Recorder, path: str) -> Any:
    """``.input`` under ``tuple_outputs=True``: the positional arguments; those by keyword where none is
    positional, by name and by place."""
    return _sites.read(recorder, path, "input")[_given(recorder, path)]


def replace_arguments(recorder: Recorder, path: str, value: Any) -> None:
    """Assign to what :func:`read_arguments` reads."""
    _sites.read(recorder, path, "input")[_given(recorder, path)] = value


def _given(recorder: Recorder, path: str) -> int:
    return 0 if len(_sites.read(recorder, path, "input")[0]) else 1


class Runner(Tracer):
    """``with model.forward() as runner:``, the founding spelling of a trace of several invokes.

    ``runner.output`` is what the model returned, all invokes together, kept without ``save``.
    """

    def __init__(self, run: Run, given: Prompt | None, options: TraceOptions, *, alone: bool = True) -> None:
        super().__init__(run, given, options, alone=alone)
        self._outputs: list[Any] = []
        self._joined: Any = None

    @contextmanager
    def invoke(self, *inputs: Any) -> Iterator[Invocation]:  # type: ignore[override]
        """See :meth:`Tracer.invoke`."""
        with super().invoke(*inputs) as invocation:
            if inputs:
                self._recorder.endings.append(self._keep)
            yield invocation

    @property
    def output(self) -> Any:
        """What the model returned, rows of all invokes one after another; the shorter ones have zeros on the
        left of their tokens.

        Raises:
            ValueNotReadyError: before the block ends, or after it failed.
        """
        if not self._outputs:
            raise ValueNotReadyError(
                "runner.output is there after the block, of the prompts given to runner.invoke()",
                where=users_line(),
            )
        missing = next(values_in(self._outputs), None)
        if missing is not None:
            raise self._recorder.not_ready("runner.output")
        if self._joined is None:
            self._joined = _joined(self._recorder.card.call_index["", 0].output, self._outputs)
        return self._joined

    def _keep(self) -> None:
        """Read and save what the model returns to the body that ends."""
        output = _sites.read(self._recorder, "", "output")
        self._outputs.append(save(output, f"output_{len(self._outputs)}"))


def _joined(structure: Structure, parts: list[Any]) -> Any:
    """The outputs of several invokes as one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(structure, Fields):
        return DictValue((k, _joined(s, [p[k] for p in parts])) for k, s in structure.items.items())
    if isinstance(structure, Items):
        return named_tuple([_joined(s, [p[i] for p in parts]) for i, s in enumerate(structure.items)], ())
    if not isinstance(structure, TensorLeaf) or structure.shape is None or "batch" not in structure.shape:
        return None
    axes: tuple[Any, ...] = structure.shape
    return _stacked(parts, axes.index("batch"), axes.index("tokens") if "tokens" in axes else None)


def _stacked(parts: list[Any], batch: int, tokens: int | None) -> Any:
    """Tensors or arrays one after another on the batch axis, their token axis filled up on the left."""
    plain = [part.value for part in parts]
    longest = max(part.shape[tokens] for part in plain) if tokens is not None else 0
    filled = [part if tokens is None else _filled(part, tokens, longest) for part in plain]
    if hasattr(plain[0], "new_zeros"):
        import torch

        return torch.cat(filled, dim=batch)
    import numpy

    return numpy.concatenate(filled, axis=batch)


def _filled(part: Any, axis: int, size: int) -> Any:
    missing = size - part.shape[axis]
    before = [0] * part.ndim
    before[axis] = missing
    if hasattr(part, "new_zeros"):
        import torch

        pairs = [n for count in reversed(before) for n in (count, 0)]
        return torch.nn.functional.pad(part, pairs)
    import numpy

    return numpy.pad(part, [(count, 0) for count in before])

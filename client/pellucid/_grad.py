"""Gradients of values: ``h.grad`` and ``loss.backward()``, recorded as nodes.

A backward pass has a number, counted over the whole job. ``.grad`` names that of the pass whose block it is
written in; outside such a block the last one written in the trace before it, else the next to be written
(in the body of an invoke, a value of that body does not belong to a pass written in an earlier body).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pellucid_shared.errors import NotYetError
from pellucid_shared.graph import BACKWARD, GRAD, SET_GRAD

from ._call import graph_value, value_of
from ._lines import users_line
from ._recorder import Recorder
from ._value import Value


class Backward:
    """A backward pass; as a context manager, the pass whose gradients ``.grad`` names inside."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number
        self._before: int | None = None

    def __enter__(self) -> Backward:
        self._before, self._recorder.backward = self._recorder.backward, self._number
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.backward = self._before


class Differentiable(Value):
    """A value with its gradient."""

    __slots__ = ()

    @property
    def grad(self) -> Any:
        """The gradient of the loss with respect to this value, as it was when it was read or made.

        Assigned to, or edited in place, it is what goes on to the values this one was made of. Each backward
        pass has gradients of its own: they do not add up.

        Raises:
            GradientError: the value is not of a floating type, or the trace generates.
        """
        self._recorder.require_open(self)
        recorder, ref = self._recorder, self.ref(self._recorder)
        return value_of(recorder, recorder.add(GRAD, (ref, recorder.backward_of(ref.node))))

    def backward(
        self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> Backward:
        """One backward pass from this value, once the forward pass of the trace has ended.

        Args:
            gradient: of the value itself, a tensor of its shape; left out, the value is one number.
            retain_graph: accepted; what a later pass needs is kept in any case.

        Raises:
            ShapeError: the value is not one number and no gradient is given, or that has another shape.
            GradientError: the value is not of a floating type, or the trace generates.
        """
        if create_graph:
            raise NotYetError(
                "gradients of gradients are not in this version: backward() takes no create_graph=True",
                where=users_line(),
            )
        if inputs is not None:
            raise NotYetError(
                "backward() takes no inputs here: read .grad of the values whose gradients are wanted",
                where=users_line(),
            )
        recorder = self._recorder
        ref = self.ref(recorder)
        recorder.add(BACKWARD, (ref,) if gradient is None else (ref, graph_value(gradient, recorder)))
        return Backward(recorder, recorder.count_backward())

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """The value itself: every floating value has a gradient."""
        self._recorder.require_open(self)
        return self

    def retain_grad(self) -> None:
        """Nothing: every gradient that is named is kept."""
        self._recorder.require_open(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "grad":
            self._set_grad(value)
        elif name == "requires_grad":
            self.requires_grad_(value)
        else:
            super().__setattr__(name, value)

    def _set_grad(self, new: Any) -> None:
        recorder = self._recorder
        recorder.require_open(self)
        ref = self.ref(recorder)
        number = recorder.backward_of(ref.node)
        key = (ref.node, number)
        if isinstance(new, Value) and new.recorder is recorder:
            given = new.ref(recorder).node
            made = recorder.nodes[given]
            # Python stores it back after `h.grad *= 2`.
            if made.op == GRAD and made.args == (ref, number) and given > recorder.last_grad_set.get(key, -1):
                return
        recorder.last_grad_set[key] = recorder.add(SET_GRAD, (ref, number, graph_value(new, recorder)))

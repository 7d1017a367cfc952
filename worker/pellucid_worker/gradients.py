"""Gradients of one run: where tracking begins, and backward passes with what happens inside them.

Weights take no gradients. Tracking begins at a tensor by an in-place op of no effect, so that it is still the
model's own, in every place the model has it. A gradient belongs to the tensor as it was when it was read:
its hook is registered then, and stays with that version.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, allow_mutation_on_saved_tensors, get_gradient_edge

from pellucid_shared.errors import GradientError
from pellucid_shared.graph import BACKWARD, GRAD, SET_GRAD

from .backward import no_dependence
from .plan import Backward, Gradient, Instruction, Plan, Slots, Track
from .sites import View, fitted

#: Which version of which tensor: the node of torch's graph that made it, and its place among the outputs.
_Edge = tuple[Any, int]

#: torch allows one such context in a process at a time.
_MUTATING = threading.Lock()


class Gradients:
    """What a run knows of gradients. It is the view that instructions have of a backward pass."""

    #: A backward pass has no structure that is passed on.
    value: Any = None

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._edges: dict[int, _Edge] = {}  # node of the flat graph -> the version that was current then
        self._hooks: dict[_Edge, Any] = {}
        self._running: Backward | None = None
        self._arrived: dict[_Edge, _Arrived] = {}
        self._happened: set[int] = set()
        self._carry_out: Callable[[Sequence[Instruction], View], None] | None = None

    @contextlib.contextmanager
    def recorded(self, model: torch.nn.Module) -> Iterator[None]:
        """Around a whole run: lets gradients be taken inside, and leaves none of it behind."""
        if self._plan.tracked < 0:
            yield
            return
        weights = [p for p in model.parameters() if p.requires_grad]
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget_all)
            stack.callback(_require_grad, weights, True)
            _require_grad(weights, False)
            stack.enter_context(torch.enable_grad())
            if self._plan.mutates:
                stack.enter_context(_MUTATING)
                stack.enter_context(allow_mutation_on_saved_tensors())
            yield

    def of_trace(self, trace: int) -> contextlib.AbstractContextManager[Any]:
        """Around the passes of a trace: records those that a backward pass may reach into."""
        return torch.set_grad_enabled(trace <= self._plan.tracked)

    # --- forward -------------------------------------------------------------------------------------------

    def track(self, instruction: Track, tensor: torch.Tensor, view: View | None) -> torch.Tensor:
        """The tensor, or what takes its place, with gradients reaching it."""
        with torch.enable_grad():
            if instruction.edited and tensor._is_view():
                # An edit in place of a view takes it off the way of its gradient.
                assert view is not None
                tensor = tensor.clone() if tensor.requires_grad else _begin(tensor.data)
                view.set(instruction.site, tensor, False)
            if not tensor.requires_grad:
                tensor = self._rooted(instruction, tensor, view)
            if not instruction.watched:
                return tensor
            edge = _edge(tensor)
            if edge not in self._hooks:
                hook = functools.partial(self._arrive, edge)
                self._hooks[edge] = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
            self._edges[instruction.node] = edge
        return tensor

    def _rooted(self, instruction: Track, tensor: torch.Tensor, view: View | None) -> torch.Tensor:
        if instruction.site is None:
            return _begin(tensor.data)
        try:
            return _begin(tensor)
        except RuntimeError:  # one of several views that an op of the model gave at once
            assert view is not None
            tensor = _begin(tensor.data)
            view.set(instruction.site, tensor, False)
            return tensor

    # --- backward ------------------------------------------------------------------------------------------

    def run(
        self, backward: Backward, slots: Slots, carry_out: Callable[[Sequence[Instruction], View], None]
    ) -> None:
        """One backward pass, with all that happens in it.

        Raises:
            GradientError: the loss does not depend on a value whose gradient is asked.
        """
        loss = slots[backward.loss]
        if not loss.requires_grad:
            raise self._no_dependence(backward, backward.values[0])
        given = None if backward.build is None else fitted(backward.build(slots), loss)
        edges = dict.fromkeys(self._edges[value] for value in backward.values)
        self._running, self._carry_out = backward, carry_out
        try:
            torch.autograd.grad(
                loss,
                [GradientEdge(*edge) for edge in edges],
                given,
                retain_graph=backward.retain,
                allow_unused=True,
            )
            for index in range(len(backward.arrivals)):
                self._happen(index)
        finally:
            self._running = self._carry_out = None
            self._arrived, self._happened = {}, set()
        for value in backward.done:
            self._forget(value)

    def get(self, site: Gradient, edited: bool) -> torch.Tensor:
        """The gradient of a value, as it stands."""
        return self._at(site.value).get(edited)

    def set(self, site: Gradient, value: Any, copied: bool) -> None:
        """Replace the gradient of a value on its way."""
        self._at(site.value).set(value, copied)

    def flush(self) -> None:
        """Gradients go on as their hooks end."""

    def _arrive(self, edge: _Edge, gradient: torch.Tensor) -> torch.Tensor | None:
        """torch's hook: the gradient of a tensor has come; what is returned goes on in its place."""
        running = self._running
        if running is None:
            return None
        arrived = self._arrived[edge] = _Arrived(gradient)
        changed = {value for value in running.values if self._edges[value] == edge}
        for index, arrival in enumerate(running.arrivals):
            if changed & set(arrival.changes):
                self._happen(index)
        return arrived.passed_on()

    def _happen(self, index: int) -> None:
        if index in self._happened:
            return
        assert self._running is not None
        assert self._carry_out is not None
        self._happened.add(index)
        arrival = self._running.arrivals[index]
        for needed in arrival.needs:
            self._happen(needed)
        with torch.enable_grad():  # hooks run without, and a value made here may go on to a later loss
            self._carry_out(arrival.instructions, self)

    def _at(self, value: int) -> _Arrived:
        assert self._running is not None
        found = self._arrived.get(self._edges[value])
        if found is None:
            raise self._no_dependence(self._running, value)
        return found

    def _no_dependence(self, backward: Backward, value: int) -> GradientError:
        flat = self._plan.flat
        number = sum(node.op == BACKWARD for node in flat.nodes[: backward.node])
        asked = next(
            i
            for i, node in enumerate(flat.nodes)
            if node.op in (GRAD, SET_GRAD) and node.args[0].node == value and node.args[1] == number
        )
        return no_dependence(flat, value, flat.nodes[backward.node].args[0].node, asked)

    # --- ending --------------------------------------------------------------------------------------------

    def _forget(self, value: int) -> None:
        edge = self._edges.pop(value, None)
        if edge is not None and edge not in self._edges.values():
            self._hooks.pop(edge).remove()

    def _forget_all(self) -> None:
        for value in list(self._edges):
            self._forget(value)


class _Arrived:
    """The gradient of one tensor in the pass under way."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self._gradient, self._copied, self._changed = gradient, False, False

    def get(self, edited: bool) -> torch.Tensor:
        if edited and not self._changed:  # torch may use what it gave a hook in other places
            self._gradient, self._changed = self._gradient.clone(), True
        return self._gradient

    def set(self, value: Any, copied: bool) -> None:
        new = fitted(value, self._gradient)
        self._gradient, self._copied, self._changed = new, copied and new is value, True

    def passed_on(self) -> torch.Tensor | None:
        if not self._changed:
            return None
        gradient = self._gradient.detach()
        return gradient.clone() if self._copied else gradient


class _Begin(torch.autograd.Function):
    """Nothing, in place: what it is given has a gradient from here on."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


def _begin(tensor: torch.Tensor) -> torch.Tensor:
    anchor = torch.zeros((), device=tensor.device, requires_grad=True)
    started: torch.Tensor = _Begin.apply(tensor, anchor)  # type: ignore[no-untyped-call]
    if tensor._is_view():  # so that other views of the same memory notice
        torch.autograd.graph.increment_version(tensor)
    return started


def _edge(tensor: torch.Tensor) -> _Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _require_grad(weights: Sequence[torch.nn.Parameter], wanted: bool) -> None:
    for weight in weights:
        weight.requires_grad_(wanted)

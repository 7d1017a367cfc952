"""Running a plan inside forward passes: hooks on the touched modules carry out the instructions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pellucid_shared.errors import ExecutionError, JobCancelledError, PellucidError, SiteError
from pellucid_shared.graph import Graph
from pellucid_shared.values import ModuleRef, Site

from . import inputs, packed
from .inputs import Rows, Segment
from .plan import Call, Event, Get, Instruction, Pass, Plan, Save, Set, Slots
from .sites import PackedView, Privates, View, WholeView


class _StopPassError(BaseException):
    """Unwinds the forward once nothing more of it is needed; no model code can mistake it for its own."""


class Run:
    """One execution of a plan on a model.

    Args:
        rows: one per invoke.
        literals: the tensors the graph names, by digest.
        cancelled: set from outside to end the run at the next touched site.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        graph: Graph,
        plan: Plan,
        rows: Sequence[Rows],
        literals: Mapping[str, torch.Tensor],
        cancelled: threading.Event | None,
    ) -> None:
        self._model, self._graph, self._plan, self._rows = model, graph, plan, rows
        self._cancelled = cancelled
        self._slots: Slots = [None] * plan.slots
        for name, slot in plan.literals.items():
            self._slots[slot] = literals[name]
        self._muted = False
        self._saved: dict[str, Any] = {}

    def execute(self) -> dict[str, Any]:
        """Run every pass; what was saved, by name."""
        self._carry_out(self._plan.before, None)
        for each in self._plan.passes:
            self._run_pass(each)
        return self._saved

    def apply(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Call a module of the model with every hook of this run off."""
        self._muted = True
        try:
            with packed.attention_of_its_own():
                return self._model.get_submodule(path)(*args, **kwargs)
        finally:
            self._muted = False

    # --- passes --------------------------------------------------------------------------------------------

    def _run_pass(self, each: Pass) -> None:
        rows = [self._rows[i] for i in each.invokes]
        if len(rows) == 1:
            self._forward(each, inputs.alone(self._model, rows[0]), WholeView)
            return
        arguments, segments = inputs.packed(self._model, rows)
        privates = Privates()

        def view(value: Any) -> View:
            return PackedView(value, segments, privates)

        with packed.attention_by_segment(self._model, segments):
            self._forward(each, arguments, view)

    def _forward(self, each: Pass, arguments: dict[str, Any], view: Callable[[Any], View]) -> None:
        done: set[int] = set()
        handles = self._hook(each.events, view, done)
        try:
            self._model(**arguments)
        except _StopPassError:
            pass
        except PellucidError:
            raise
        except Exception as error:
            raise ExecutionError(f"the model failed in its forward pass: {_reason(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        self._require_all(each.events, done)

    def _hook(self, events: Sequence[Event], view: Callable[[Any], View], done: set[int]) -> list[Any]:
        by_module: dict[str, dict[tuple[str, int], Event]] = {}
        for event in events:
            by_module.setdefault(event.module, {})[event.kind, event.call] = event
        handles = []
        for path, own in by_module.items():
            module, calls = self._model.get_submodule(path), Counter[str]()

            def before(
                _: Any,
                args: Any,
                kwargs: Any,
                own: dict[tuple[str, int], Event] = own,
                calls: Counter[str] = calls,
            ) -> Any:
                event = None if self._muted else own.get(("input", calls["input"]))
                calls["input"] += not self._muted
                return None if event is None else self._at(event, view((args, kwargs)), done)

            def after(
                _: Any,
                args: Any,
                output: Any,
                own: dict[tuple[str, int], Event] = own,
                calls: Counter[str] = calls,
            ) -> Any:
                event = None if self._muted else own.get(("output", calls["output"]))
                calls["output"] += not self._muted
                return None if event is None else self._at(event, view(output), done)

            kinds = {kind for kind, _ in own}
            if "input" in kinds:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if "output" in kinds:
                handles.append(module.register_forward_hook(after))
        return handles

    def _at(self, event: Event, view: View, done: set[int]) -> Any:
        if self._cancelled is not None and self._cancelled.is_set():
            raise JobCancelledError("the job was cancelled while it ran")
        before = view.value
        self._carry_out(event.instructions, view)
        done.add(id(event))
        if event.last:
            raise _StopPassError
        view.flush()
        return None if view.value is before else view.value

    def _require_all(self, events: Sequence[Event], done: set[int]) -> None:
        for event in events:
            if id(event) not in done:
                site = Site(event.module, event.kind, call=event.call)
                raise SiteError(
                    f"{site} was not reached: {event.module or 'the model'} was not called so often",
                    node=event.instructions[0].node,
                )

    # --- instructions --------------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction], view: View | None) -> None:
        slots = self._slots
        instruction: Instruction | None = None
        try:
            for instruction in instructions:
                if type(instruction) is Call:
                    if instruction.build is None:
                        args = list(instruction.args)
                        for position, slot in instruction.fills:
                            args[position] = slots[slot]
                        slots[instruction.out] = instruction.function(*args, **instruction.kwargs)
                    else:
                        nested, kwargs = instruction.build(slots)
                        slots[instruction.out] = instruction.function(*nested, **kwargs)
                elif type(instruction) is Get:
                    assert view is not None
                    slots[instruction.out] = view.get(instruction.site, instruction.edited)
                elif type(instruction) is Set:
                    assert view is not None
                    view.set(instruction.site, instruction.build(slots), instruction.copied)
                elif type(instruction) is Save:
                    self._saved[instruction.name] = _taken(instruction.build(slots), instruction.shared)
                for slot in instruction.frees:
                    slots[slot] = None
        except PellucidError as error:
            if error.node is None and instruction is not None:
                error.node = instruction.node
            raise
        except Exception as error:
            assert instruction is not None
            raise self._failed(instruction, error) from error

    def _failed(self, instruction: Instruction, error: Exception) -> ExecutionError:
        node = self._graph.nodes[instruction.node]
        name = node.op
        if node.args and isinstance(node.args[0], Site | ModuleRef):
            name = str(node.args[0]) if isinstance(node.args[0], Site) else node.args[0].path
        met = [_describe(self._slots[slot]) for slot in instruction.reads]
        given = f" on {', '.join(met)}" if met else ""
        return ExecutionError(f"{name} failed{given}: {_reason(error)}", node=instruction.node)


def _taken(value: Any, shared: bool) -> Any:
    """A saved structure on the CPU, every tensor contiguous and in memory of its own."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.device.type != "cpu":
            return value.cpu().contiguous()
        return value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    if isinstance(value, list):
        return [_taken(v, shared) for v in value]
    if isinstance(value, tuple):
        return tuple(_taken(v, shared) for v in value)
    if isinstance(value, dict):
        return {k: _taken(v, shared) for k, v in value.items()}
    return value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _reason(error: Exception) -> str:
    """The first line of a cause, without the noise torch adds."""
    text = str(error).strip().split("\n", 1)[0]
    return text[:300] or type(error).__name__


__all__ = ["Run", "Segment"]

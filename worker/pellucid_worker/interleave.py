"""Running a plan inside forward passes: hooks on the touched modules carry out the instructions."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pellucid_shared.errors import ExecutionError, JobCancelledError, PellucidError, SiteError
from pellucid_shared.graph import SAVE
from pellucid_shared.regions import Generation
from pellucid_shared.values import INSIDE, RESULT, ModuleRef, Site

from . import inputs, packed, skips
from .decode import Decoding
from .gradients import Gradients
from .guards import MISSING, by_turn, takes_missing
from .inputs import Rows
from .inside import Inside, eager_attention
from .logs import Teller
from .plan import (
    Act,
    Backward,
    Call,
    Event,
    Get,
    Group,
    Guarded,
    Instruction,
    Pass,
    Plan,
    Save,
    Set,
    Slots,
    Track,
)
from .sites import ResultView, View
from .skips import Around, Given


class _StopPassError(BaseException):
    """Unwinds the forward once nothing more of it is needed; no model code can mistake it for its own."""


#: Told of the run as it goes: "token" with the trace, the step, and each live invoke's new ids; "log" with
#: what a graph logs (see ``pellucid_shared.logs``).
Notify = Callable[[str, dict[str, Any]], None]


class Run:
    """One execution of a plan on a model.

    Args:
        rows: per trace, one per invoke.
        literals: the tensors the graph names, by digest.
        generators: per trace, one per invoke, for sampling.
        cancelled: set from outside to end the run at the next touched site, or the next step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        rows: Sequence[Sequence[Rows]],
        literals: Mapping[str, torch.Tensor],
        generators: Sequence[Sequence[torch.Generator]],
        cancelled: threading.Event | None,
        notify: Notify | None,
    ) -> None:
        self._model, self._plan, self._rows = model, plan, rows
        self._generators, self._cancelled, self._notify = generators, cancelled, notify
        self.teller = Teller(notify)
        self.skipped: Given = {}
        self._slots: Slots = [None] * plan.slots
        for name, slot in plan.literals.items():
            self._slots[slot] = literals[name]
        self._gradients = Gradients(plan)
        self._muted = False
        self._inside: Inside | None = None  # in a pass that touches calls inside modules
        self._ended: dict[tuple[int, int], int] = {}  # (trace, invoke) whose generation ended -> steps it had
        self._results: dict[tuple[int, int], torch.Tensor] = {}
        self._saved: dict[str, Any] = {}
        self._listed: dict[str, list[tuple[tuple[int, ...], Any]]] = {
            to.name: [] for to in plan.flat.saves.values() if to.turns
        }

    @property
    def is_muted(self) -> bool:
        """Whether what runs now is not the pass: a module applied, or one that only fills its cache."""
        return self._muted

    def execute(self) -> dict[str, Any]:
        """Run every pass; what was saved, by name."""
        with self._gradients.recorded(self._model):
            self._carry_out(self._plan.before, None)
            for group in self._plan.groups:
                with self._gradients.of_trace(group.trace):
                    self._run_group(group)
        return self._saved | {name: by_turn(entries) for name, entries in self._listed.items()}

    def apply(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Call a module of the model with every hook of this run off."""
        with packed.attention_of_its_own():
            return self.muted(self._model.get_submodule(path), *args, **kwargs)

    def muted(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with every hook of this run off."""
        before, self._muted = self._muted, True
        try:
            return function(*args, **kwargs)
        finally:
            self._muted = before

    def _run_group(self, group: Group) -> None:
        trace = self._plan.flat.traces[group.trace]
        with eager_attention(self._model) if group.eager else contextlib.nullcontext():
            if trace.generation is None:
                self._run_pass(group)
            else:
                self._generate(group, trace.generation)
        self._carry_out(group.after, ResultView(group.trace, self._results))

    # --- passes --------------------------------------------------------------------------------------------

    def _run_pass(self, group: Group) -> None:
        rows = [self._rows[group.trace][i] for i in group.invokes]
        for each in group.passes:
            if len(rows) == 1:
                alone = Around.alone(group.invokes[0], rows[0])
                self._forward(each, inputs.alone(self._model, rows[0]), alone)
                continue
            arguments, segments = inputs.packed(self._model, rows)
            with packed.attention_by_segment(self._model, segments):
                self._forward(each, arguments, Around.packed(group.invokes, segments))

    def _generate(self, group: Group, options: Generation) -> None:
        """Decode until every invoke has ended, or nothing more is wanted."""
        rows = [self._rows[group.trace][i] for i in group.invokes]
        generators = [self._generators[group.trace][i] for i in group.invokes]
        decoding = Decoding(self._model, rows, options, generators)
        passes = {each.step: each for each in group.passes}
        steps = options.max_new_tokens if group.whole else 1 + max(passes, default=-1)
        for step in range(steps):
            if not decoding.live:
                break
            self._require_wanted()
            each = passes.pop(step, Pass(step, ()))
            with decoding.step() as (arguments, segments):
                live = [group.invokes[i] for i in decoding.live]
                if segments is None:
                    around = Around.alone(live[0], rows[decoding.live[0]], keeps=True)
                else:
                    around = Around.packed(live, segments, keeps=True)
                output = self._forward(each, arguments, around)
            if output is None:  # stopped after the last site that anything needs
                break
            chosen = decoding.advance(output, segments)
            self._tell_tokens(group, step, chosen)
            for i in set(chosen) - set(decoding.live):
                self._ended[group.trace, group.invokes[i]] = step + 1
        for each in passes.values():  # steps that never ran
            for event in each.events:
                self._carry_out(event.instructions, None)
        for i, invoke in enumerate(group.invokes):
            self._results[group.trace, invoke] = decoding.result(i)

    def _tell_tokens(self, group: Group, step: int, chosen: Mapping[int, torch.Tensor]) -> None:
        if self._notify is not None and group.whole:
            tokens = {group.invokes[i]: ids.tolist() for i, ids in chosen.items()}
            self._notify("token", {"trace": group.trace, "step": step, "ids": tokens})

    def _forward(self, each: Pass, arguments: Any, around: Around) -> Any:
        """Run the model once with the pass's events; its output, or None where it was stopped early."""
        done: set[int] = set()
        handles = self._hook(each.events, around, done)
        output = None
        try:
            with self._watched(each.events, around.view, done):
                output = self._call(arguments)
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
        return output

    def _call(self, arguments: Any) -> Any:
        return self._model(**arguments)

    @contextlib.contextmanager
    def _watched(
        self, events: Sequence[Event], view: Callable[[Any], View], done: set[int]
    ) -> Iterator[None]:
        """Within this context the events of calls inside modules are carried out."""
        if not any(event.kind in INSIDE for event in events):
            yield
            return
        origin, muted = self._plan.flat.origin, lambda: self._muted
        self._inside = Inside(events, lambda event, value: self._at(event, view(value), done), origin, muted)
        try:
            with self._inside.watching(self._model, self._inside.paths):
                yield
        finally:
            self._inside = None

    def _require_wanted(self) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise JobCancelledError("the job was cancelled while it ran")

    def _hook(self, events: Sequence[Event], around: Around, done: set[int]) -> list[Any]:
        by_module: dict[str, dict[tuple[str, int], Event]] = {}
        for event in events:
            if event.kind not in INSIDE:
                by_module.setdefault(event.module, {})[event.kind, event.call] = event
        view, counts = around.view, defaultdict[str, Counter[str]](Counter)

        def pass_over(inside: frozenset[tuple[str, int]]) -> None:
            """Calls that do not happen: they count, and their events are those of invokes that have ended."""
            for path, _ in inside:
                counts[path].update(("input", "output", "call"))
            for event in events:
                if (event.module, event.call) in inside:
                    self._carry_out(event.instructions, None)
                    done.add(id(event))

        handles = skips.install(self, self._model, events, around, counts, pass_over)
        for path, own in by_module.items():
            module, calls = self._model.get_submodule(path), counts[path]

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
        """Carry out an event; the new value where it was replaced."""
        if self._inside is None:
            return self._carry_out_at(event, view, done)
        with self._inside.aside():
            return self._carry_out_at(event, view, done)

    def _carry_out_at(self, event: Event, view: View, done: set[int]) -> Any:
        self._require_wanted()
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
                path = (event.name,) if event.name else ()
                site = Site(event.module, event.kind, path, call=event.call)
                raise SiteError(
                    f"{site} was not reached: {event.module or 'the model'} was not called so often",
                    node=self._plan.flat.origin[event.instructions[0].node],
                )

    # --- instructions --------------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction], view: View | None) -> None:
        slots = self._slots
        instruction: Instruction | None = None
        try:
            for instruction in instructions:
                if self._ended and self._is_missing(instruction):
                    out = getattr(instruction, "out", None)
                    if out is not None:
                        slots[out] = MISSING
                    continue
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
                    self._save(instruction)
                elif type(instruction) is Track:
                    slots[instruction.slot] = self._gradients.track(
                        instruction, slots[instruction.slot], view
                    )
                elif type(instruction) is Backward:
                    self._gradients.run(instruction, slots, self._carry_out)
                elif isinstance(instruction, Act):
                    instruction.carry_out(slots, view, self)
                elif type(instruction) is Guarded:
                    if instruction.holds(slots):
                        self._carry_out((instruction.inner,), view)
                    elif isinstance(instruction.inner, Call | Get):
                        slots[instruction.out] = MISSING
                for slot in instruction.frees:
                    slots[slot] = None
        except PellucidError as error:
            if error.node is None and instruction is not None:
                error.node = self._plan.flat.origin[instruction.node]
            raise
        except Exception as error:
            assert instruction is not None
            raise self._failed(instruction, error) from error

    def _is_missing(self, instruction: Instruction) -> bool:
        """Whether an instruction belongs to a step that never ran; where that step had to run, an error."""
        if takes_missing(instruction):
            return False
        flat, position = self._plan.flat, instruction.node
        node, optional = flat.nodes[position], position in flat.optional
        if node.at is not None and node.site.kind != RESULT:
            had = self._ended.get((node.region, node.site.invoke))
            if had is not None and node.site.step >= had:
                if not optional:
                    raise SiteError(f"{node.site} was not reached: the generation ended after {had} steps")
                return True
        if not any(self._slots[slot] is MISSING for slot in instruction.reads):
            return False
        if node.op == SAVE and flat.saves[position].grown:
            return False
        if not optional:
            raise SiteError(f"{node.op} needs a value of a step that never ran: the generation ended before")
        return True

    def _save(self, save: Save) -> None:
        value = _taken(save.build(self._slots), save.shared)
        if save.to.turns:
            self._listed[save.to.name].append((save.to.turns, value))
        else:
            self._saved[save.to.name] = value

    def _failed(self, instruction: Instruction, error: Exception) -> ExecutionError:
        node = self._plan.flat.nodes[instruction.node]
        name = node.op
        if node.args and isinstance(node.args[0], Site | ModuleRef):
            name = str(node.args[0]) if isinstance(node.args[0], Site) else node.args[0].path
        met = [_describe(self._slots[slot]) for slot in instruction.reads]
        given = f" on {', '.join(met)}" if met else ""
        origin = self._plan.flat.origin[instruction.node]
        return ExecutionError(f"{name} failed{given}: {_reason(error)}", node=origin)


def _taken(value: Any, shared: bool) -> Any:
    """A saved structure on the CPU, every tensor contiguous and in memory of its own."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.device.type != "cpu":
            return value.cpu().contiguous()
        return value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    if isinstance(
        value, list
    ):  # of a list that grew step by step, what steps that never ran would add is left out
        return [_taken(v, shared) for v in value if v is not MISSING]
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

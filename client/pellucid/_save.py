"""Saving values: what comes back from a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid_shared.errors import GraphError
from pellucid_shared.graph import SAVE
from pellucid_shared.values import substitute

from ._backend import backend
from ._call import graph_value, recorder_of, values_in
from ._carry import Carry
from ._lines import users_line
from ._recorder import Recorder, active
from ._steps import GrowingList, StepList
from ._structure import Unread, wrapped
from ._value import Value


def save(value: Any, name: str | None = None) -> Any:
    """Send a value back when the run completes.

    Args:
        value: a value of the trace, or lists, tuples and dicts of them, numbers and strings.
        name: the name it comes back under; left out, ``saved_0``, ``saved_1``, ... in program order.

    Returns:
        The value itself; in a loop, or a body for several steps of generation, a list, which then has an
        entry for each turn or step that ran. After the block a tensor is a ``torch.Tensor`` where torch is
        installed, and behaves as a numpy array elsewhere; ``.value`` is the plain thing everywhere.

    Raises:
        RecordingError: no trace is open.
        GraphError: the name is taken.
    """
    if isinstance(value, Unread):
        value = value.read_all()
    if isinstance(value, Carry):
        value = value.value
    recorder = recorder_of(value) or active()
    value = wrapped(value)
    kept = StepList(recorder, repr(value)) if recorder.repeats() else value
    save_node(recorder, kept, graph_value(value, recorder), name)
    return kept


def save_node(recorder: Recorder, kept: Any, saved: Any, name: str | None) -> None:
    """Record that ``saved`` comes back under a name and fills ``kept``."""
    chosen = f"saved_{len(recorder.saved)}" if name is None else name
    if not isinstance(chosen, str) or not chosen:
        raise GraphError(f"a saved name is a string, found {name!r:.60}", where=users_line())
    if chosen in recorder.save_names:
        raise GraphError(f"the name {chosen!r} is saved twice; names are unique", where=users_line())
    node = recorder.add(SAVE, (saved,) if name is None else (saved, name))
    recorder.saved[node] = kept
    recorder.save_names[chosen] = node


def received(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results by name as users get them: torch tensors where torch is installed, numpy arrays elsewhere, and
    lists, tuples and dicts of them."""
    return {name: substitute(result, backend().received) for name, result in results.items()}


def fill(recorder: Recorder, results: Mapping[str, Any]) -> None:
    """Give every saved value its result; a step that never ran has none."""
    for name, node in recorder.save_names.items():
        saved = recorder.saved[node]
        if name in results or isinstance(saved, StepList):  # of a body for no step, an empty list
            _fill(saved, results.get(name, []))
        else:
            lost = "it was saved in a branch that did not run"
            if not recorder.in_branch(node):
                lost = "the generation ended before its step"
            recorder.lost |= {value._node: lost for value in values_in(saved)}


def _fill(value: Any, result: Any) -> None:
    if isinstance(value, Value):
        backend().fill(value, result)
    elif isinstance(value, StepList | GrowingList):
        value.fill(substitute(result, backend().received))
    elif isinstance(value, list | tuple):
        for member, part in zip(value, result, strict=True):
            _fill(member, part)
    elif isinstance(value, dict):
        for key, member in value.items():
            _fill(member, result[key])

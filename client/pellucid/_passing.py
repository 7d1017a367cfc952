"""What is said about a pass and not about a value: skip, stop, log; and the reading of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid_shared.errors import RecordingError
from pellucid_shared.graph import GET, LOG, ORIGINAL, PARAM, SKIP, STOP
from pellucid_shared.packing import WireTensor
from pellucid_shared.passing import MAX_TEXT, beginning
from pellucid_shared.values import RESULT, ModuleRef, Site

from . import _values
from ._call import graph_value, value_of
from ._carry import Carry
from ._lines import users_line
from ._recorder import Recorder
from ._structure import Unread
from ._turns import Number
from ._value import Value


def skip(recorder: Recorder, module: str, call: int, value: Any) -> None:
    """Record that a module does not run in the invoke and step that are being written."""
    site = Site(module, "output", (), recorder.current_invoke(), recorder.step_of(module), call)
    recorder.add(SKIP, (site, graph_value(value, recorder)))


def stop(recorder: Recorder) -> None:
    """Record that the pass of the invoke that is being written ends here."""
    recorder.add(STOP, (beginning(recorder.current_invoke(), recorder.step_of("")),))


def log(recorder: Recorder, parts: Sequence[Any], sep: str = " ") -> None:
    """Record that values are told of when the run comes by."""
    recorder.require_open()
    here = None
    if recorder.region is not None and recorder.invoke is not None:
        here = beginning(recorder.invoke, recorder.step_of(""))
    recorder.add(LOG, (here, *(_part(part, recorder) for part in parts)), {} if sep == " " else {"sep": sep})


def parameter(recorder: Recorder, module: str, name: str) -> Any:
    """Read a parameter or buffer of a module."""
    return value_of(recorder, recorder.add(PARAM, (ModuleRef(module), name)))


def original(recorder: Recorder, node: int) -> Any:
    """What was at the site that a value was read at, before this graph's edits there."""
    recorder.require_open()
    made = recorder.nodes[node]
    if made.op != GET or made.site.kind == RESULT:
        raise RecordingError(
            f"{recorder.describe(node)} is no site's own value: .original is of what module.output, "
            "module.input and their members give",
            where=users_line(),
        )
    if recorder.ground_of(made.region) != recorder.ground():
        raise RecordingError(
            f"{made.site} was read in another body; take .original where the site is read", where=users_line()
        )
    return value_of(recorder, recorder.add(ORIGINAL, (made.site,)))


def _part(part: Any, recorder: Recorder) -> Any:
    """A part of a log as a graph holds it; what has no place in one is told as ``str()`` shows it."""
    if (
        isinstance(part, Value | Unread | Number | Carry)
        or part is None
        or isinstance(part, bool | int | float | complex)
    ):
        return graph_value(part, recorder)
    if isinstance(part, list | tuple):
        parts = [_part(member, recorder) for member in part]
        return tuple(parts) if isinstance(part, tuple) else parts
    if isinstance(part, dict):
        return {str(key): _part(member, recorder) for key, member in part.items()}
    found = None if isinstance(part, str) else _values.literal(part)
    if isinstance(found, WireTensor):
        return recorder.add_literal(found)
    return str(part)[:MAX_TEXT]

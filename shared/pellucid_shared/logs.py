"""What a ``log`` event says, and the line it is shown as.

The data of an event: ``trace``, ``invoke`` (null outside of one) and ``step``, whole numbers; ``parts``,
what was logged: a string, number, boolean or null as it is, a list, ``{"items": [[key, part], ..]}`` for a
dict and ``{"tensor": {..}}`` with ``shape``, ``dtype``, ``values`` (its first 64 elements in order) and,
where they are defined, ``mean``, ``std`` (of a sample), ``min`` and ``max``; and ``text``, the line. Numbers
JSON cannot spell are strings ("nan", "inf", "1+2j").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Most ``log`` events of a job; one more says that there were more.
MAX_LOGS = 10_000
#: Most elements of a tensor that are told.
MAX_ELEMENTS = 64
#: Of a tensor with more elements than it shows, this many are in the line.
_SHOWN = 8


def line(parts: Sequence[Any], sep: str = " ") -> str:
    """Parts as one line for people."""
    return sep.join(part if isinstance(part, str) else _text(part) for part in parts)


def _text(part: Any) -> str:
    if isinstance(part, list):
        return f"[{', '.join(map(_text, part))}]"
    if not isinstance(part, Mapping):
        return repr(part)
    if "items" in part:
        return "{" + ", ".join(f"{key!r}: {_text(value)}" for key, value in part["items"]) + "}"
    return _tensor(part["tensor"])


def _tensor(tensor: Mapping[str, Any]) -> str:
    shape, values = list(tensor["shape"]), tensor["values"]
    if not shape:
        return _number(values[0])
    told = [f"{name} {_number(tensor[name])}" for name in ("mean", "std", "min", "max") if name in tensor]
    whole = len(values) == _count(shape)
    shown = values if whole else values[:_SHOWN]
    elements = ", ".join(map(_number, shown)) + ("" if whole else ", ...")
    return f"<{shape} {tensor['dtype']}{''.join(f' {t}' for t in told)}: {elements}>"


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)

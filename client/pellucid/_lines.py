"""The user's own line: file and number of the first frame outside Pellucid, torch and einops."""

from __future__ import annotations

import contextlib
import os
import sys
from types import FrameType

import pellucid_shared

#: Packages whose frames are never the user's. torch and einops matter only once they are imported.
_PACKAGES = ("torch", "einops", "numpy")
_OWN = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(pellucid_shared.__file__) + os.sep,
    contextlib.__file__,
)


def users_line() -> str:
    """``file:line`` of the code that called into Pellucid. Reads no variables and no source."""
    inside = _inside()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown line"


def _inside() -> tuple[str, ...]:
    found = list(_OWN)
    for name in _PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            found.append(os.path.dirname(file) + os.sep)
    return tuple(found)

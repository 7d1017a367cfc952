"""The user's own line: file and number of the first frame outside Pellucid, torch and einops."""

from __future__ import annotations

import contextlib
import functools
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
    inside = _inside(tuple(name for name in _PACKAGES if name in sys.modules))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown line"


@functools.cache
def _inside(loaded: tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of the files whose frames are not the user's."""
    files = [getattr(sys.modules[name], "__file__", None) for name in loaded]
    return (*_OWN, *(os.path.dirname(file) + os.sep for file in files if file))

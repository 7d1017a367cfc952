"""The user's own line: file and number of the first frame outside Pellucid, torch and Python's library."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pellucid_shared
from pellucid_shared.errors import PellucidError

#: Packages whose frames are never the user's, once they are imported.
_PACKAGES = ("torch", "transformers", "accelerate", "einops", "numpy")
_OWN = (os.path.dirname(__file__) + os.sep, os.path.dirname(pellucid_shared.__file__) + os.sep)
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
#: Installed packages may lie inside the folder of Python's library; their code is a user's.
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))


def users_line() -> str:
    """``file:line`` of the code that called into Pellucid. Reads no variables and no source."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown line"


def is_users(file: str) -> bool:
    """Whether a file is the user's, not of Pellucid, of what it builds on, or of Python."""
    return not file.startswith(_inside(tuple(name for name in _PACKAGES if name in sys.modules))) and (
        not file.startswith(_LIBRARY) or file.startswith(_INSTALLED)
    )


@contextmanager
def at_users_line() -> Iterator[None]:
    """An error from inside that names no line of its own gets the user's."""
    try:
        yield
    except PellucidError as error:
        error.where = error.where or users_line()
        raise


@functools.cache
def _inside(loaded: tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of the files whose frames are not the user's."""
    files = [getattr(sys.modules[name], "__file__", None) for name in loaded]
    return (*_OWN, *(os.path.dirname(file) + os.sep for file in files if file))

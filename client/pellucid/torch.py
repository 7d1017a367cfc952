"""torch's names for recording, where torch is not installed: ``from pellucid import torch``.

Every spelling of the registry is here: ``torch.softmax``, ``torch.nn.functional.gelu``, ``torch.zeros``,
``torch.linalg.norm``, the dtypes. The graphs are byte for byte those that torch's own functions record.
"""

from __future__ import annotations

from typing import Any

from pellucid_shared.specs import DTYPE_ALIASES, DTYPES
from pellucid_shared.values import Device, DType

from ._call import function, spellings

#: What torch calls a dtype and a device.
dtype, device = DType, Device


class _Namespace:
    """A part of torch that has functions: ``torch.nn.functional``."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _lookup(f"{self._path}.{name}")

    def __dir__(self) -> list[str]:
        return _names(self._path)

    def __repr__(self) -> str:
        return f"<{self._path} of pellucid>"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in DTYPES or name in DTYPE_ALIASES:
        return DType(DTYPE_ALIASES.get(name, name))
    return _lookup(f"torch.{name}")


def __dir__() -> list[str]:
    return sorted({*_names("torch"), *DTYPES, *DTYPE_ALIASES, "device", "dtype"})


def _lookup(path: str) -> Any:
    if path not in spellings() and any(name.startswith(f"{path}.") for name in spellings()):
        return _Namespace(path)
    return function(path)


def _names(path: str) -> list[str]:
    own = [name.removeprefix(f"{path}.") for name in spellings() if name.startswith(f"{path}.")]
    return sorted({name.partition(".")[0] for name in own})

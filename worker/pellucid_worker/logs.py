"""Telling of a run: what a graph logs becomes data that fits in an event, never a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pellucid_shared.logs import MAX_ELEMENTS, MAX_LOGS, line
from pellucid_shared.values import Site

from .tensors import dtype_name


class Teller:
    """Passes on what one run logs, up to ``MAX_LOGS`` times."""

    def __init__(self, notify: Callable[[str, dict[str, Any]], None] | None) -> None:
        self._notify, self._told = notify, 0

    def log(self, trace: int, site: Site | None, parts: list[Any], sep: str) -> None:
        """Tell of values; ``site``: where the pass they are logged in begins."""
        if self._notify is None or self._told > MAX_LOGS:
            return
        self._told += 1
        told = [_told(part) for part in parts]
        if self._told > MAX_LOGS:
            told = [f"{MAX_LOGS} lines were logged; the rest of this job's are left out"]
        invoke, step = (site.invoke, site.step) if site is not None else (None, 0)
        where = {"trace": trace, "invoke": invoke, "step": step}
        self._notify("log", {**where, "parts": told, "text": line(told, sep)})


def _told(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return {"tensor": _summary(part)}
    if isinstance(part, list | tuple):
        return [_told(member) for member in part]
    if isinstance(part, dict):
        return {"items": [[key, _told(member)] for key, member in part.items()]}
    return _plain(part)


def _summary(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype, statistics and first elements."""
    tensor = tensor.detach()
    found: dict[str, Any] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    count = tensor.numel()
    if count and not tensor.is_complex():
        exact = tensor if tensor.dtype in (torch.float32, torch.float64) else _wider(tensor)
        found["mean"] = _plain(exact.mean().item())
        if count > 1:
            found["std"] = _plain(exact.std().item())
        bounds = (tensor.byte() if tensor.dtype == torch.bool else tensor).aminmax()
        found["min"], found["max"] = (_plain(bound.item()) for bound in bounds)
    found["values"] = [_plain(v) for v in tensor.reshape(-1)[:MAX_ELEMENTS].tolist()]
    return found


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.double()


def _plain(value: Any) -> Any:
    """A number as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value).strip("()") if isinstance(value, complex) else value

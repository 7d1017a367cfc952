"""From tokenized invokes to the arguments of a model's forward: alone, or packed into one row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pellucid_shared.wire import TokenizedInvoke


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a packed pass that is one invoke's: tokens ``start`` to ``stop`` of the one row, which
    the invoke sees as ``[batch, tokens]``. ``mask`` is its own padding, or None where it has none."""

    start: int
    stop: int
    batch: int
    tokens: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Rows:
    """One invoke as tensors: ids, mask and positions, each [batch, tokens] int64; mask None: no padding."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor


def rows(invoke: TokenizedInvoke, pad: int, device: torch.device) -> Rows:
    """Rows of different lengths are padded on the left; positions count from each row's first real token."""
    batch, tokens = invoke.size
    masks = invoke.mask or [[1] * len(row) for row in invoke.ids]
    ids = torch.full((batch, tokens), pad, dtype=torch.long)
    mask = torch.zeros((batch, tokens), dtype=torch.long)
    for i, (row, bits) in enumerate(zip(invoke.ids, masks, strict=True)):
        ids[i, tokens - len(row) :] = torch.tensor(row)
        mask[i, tokens - len(row) :] = torch.tensor(bits)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Rows(ids.to(device), None if bool(mask.all()) else mask.to(device), positions.to(device))


def alone(model: torch.nn.Module, own: Rows) -> dict[str, Any]:
    """Forward arguments of a pass over one invoke, as plain use of the model would give them."""
    given: dict[str, Any] = {"input_ids": own.ids, "use_cache": False}
    if own.mask is not None:
        given |= {"attention_mask": own.mask, "position_ids": own.positions}
    return accepted(model, given)


def packed(model: torch.nn.Module, invokes: Sequence[Rows]) -> tuple[dict[str, Any], list[Segment]]:
    """Forward arguments of one row ``[1, sum of tokens]`` that holds every invoke, and where each lies."""
    segments: list[Segment] = []
    start = 0
    for own in invokes:
        batch, tokens = own.ids.shape
        segments.append(Segment(start, start + batch * tokens, batch, tokens, own.mask))
        start += batch * tokens
    ids = torch.cat([own.ids.reshape(-1) for own in invokes]).unsqueeze(0)
    positions = torch.cat([own.positions.reshape(-1) for own in invokes]).unsqueeze(0)
    return accepted(model, {"input_ids": ids, "position_ids": positions, "use_cache": False}), segments


def accepted(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in known}

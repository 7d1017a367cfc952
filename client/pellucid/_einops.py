"""einops over values where torch is not installed: a backend of einops' own kind, found by being a subclass.

Where torch is installed einops takes a value for the torch tensor it is. The calls here are those that its
torch backend makes, so that both record the same nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops._backends import AbstractBackend

from . import torch
from ._plain import PlainValue


class PellucidBackend(AbstractBackend):
    """What einops asks of a framework."""

    framework_name = "pellucid"

    def is_appropriate_type(self, tensor: Any) -> bool:
        return isinstance(tensor, PlainValue)

    def reduce(self, x: Any, operation: str, reduced_axes: Sequence[int]) -> Any:
        if operation in ("min", "max"):
            return x.amin(dim=reduced_axes) if operation == "min" else x.amax(dim=reduced_axes)
        if operation in ("sum", "mean"):
            return x.sum(dim=reduced_axes) if operation == "sum" else x.mean(dim=reduced_axes)
        for axis in sorted(reduced_axes, reverse=True):
            x = getattr(x, operation)(dim=axis)
        return x

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return x.permute(axes)

    def stack_on_zeroth_dimension(self, tensors: list[Any]) -> Any:
        return torch.stack(tensors)

    def add_axes(self, x: Any, n_axes: int, pos2len: dict[int, int]) -> Any:
        sizes = [-1] * n_axes
        for position, length in pos2len.items():
            x = self.add_axis(x, position)
            sizes[position] = length
        return x.expand(sizes)

    def tile(self, x: Any, repeats: Sequence[int]) -> Any:
        return x.repeat(repeats)

    def concat(self, tensors: Sequence[Any], axis: int) -> Any:
        return torch.cat(tensors, dim=axis)

    def add_axis(self, x: Any, new_position: int) -> Any:
        return torch.unsqueeze(x, new_position)

    def is_float_type(self, x: Any) -> bool:
        return bool(x.is_floating_point())

    def einsum(self, pattern: str, *x: Any) -> Any:
        return torch.einsum(pattern, *x)

"""Structures of tensors and plain values as safetensors bytes, and back. Never pickle, never torch."""

from __future__ import annotations

from dataclasses import dataclass

from .specs import TensorSpec


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as bytes: dtype name, shape, and C-ordered little-endian data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)

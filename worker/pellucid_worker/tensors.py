"""Between torch tensors and their wire form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pellucid_shared.packing import WireTensor
from pellucid_shared.specs import DTYPES

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The wire's name of a torch dtype, e.g. ``bfloat16``."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


#: Where a tensor lies: its storage, and its offset, shape and strides there.
Memory = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def memory(tensor: torch.Tensor) -> Memory:
    """What two tensors share that are one, or of which one is a view of all of the other."""
    tensor = getattr(tensor, "meta", tensor)  # one without numbers (meta.py) lies where its shape does
    place = tensor.untyped_storage()._cdata
    return place, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def to_wire(tensor: torch.Tensor) -> WireTensor:
    """The bytes of a tensor, over its own memory where it is contiguous and on the CPU."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return WireTensor(dtype_name(tensor.dtype), tuple(tensor.shape), memoryview(data))


def from_wire(tensor: WireTensor) -> torch.Tensor:
    """A torch tensor on the CPU with its own memory."""
    dtype = TORCH_DTYPES[tensor.dtype]
    if not tensor.spec.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def structure_to_wire(value: Any) -> Any:
    """A structure with every torch tensor in its wire form."""
    if isinstance(value, torch.Tensor):
        return to_wire(value)
    if isinstance(value, list):
        return [structure_to_wire(v) for v in value]
    if isinstance(value, tuple):
        return tuple(structure_to_wire(v) for v in value)
    if isinstance(value, Mapping):
        return {k: structure_to_wire(v) for k, v in value.items()}
    return value

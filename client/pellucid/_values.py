"""Tensors and numbers of the user's own as wire values, and wire tensors as torch tensors or arrays.

numpy and torch are looked up only where the user's value shows that they are loaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pellucid_shared.errors import OpArgumentError
from pellucid_shared.packing import WireTensor
from pellucid_shared.specs import DTYPES
from pellucid_shared.values import Device, DType

if TYPE_CHECKING:
    import torch


def literal(value: Any) -> Any:
    """A torch or numpy value as a graph's: WireTensor, DType, Device or number; None if it is neither."""
    torch_module = sys.modules.get("torch")
    if torch_module is not None:
        if isinstance(value, torch_module.Tensor):
            return from_torch(value)
        if isinstance(value, torch_module.dtype):
            return DType(str(value).removeprefix("torch."))
        if isinstance(value, torch_module.device):
            return Device(str(value))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return WireTensor.from_numpy(value)
        if isinstance(value, numpy.generic):
            return value.item()
        if isinstance(value, numpy.dtype) and value.name in DTYPES:
            return DType(value.name)
        if isinstance(value, type) and issubclass(value, numpy.generic):
            name = numpy.dtype(value).name
            return DType(name) if name in DTYPES else None
    return None


def plain_number(value: int | float | complex) -> int | float | complex:
    """A number as Python's own: subclasses (numpy's float64, an IntEnum) lose their class."""
    return (
        int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else complex(value)
    )


def from_torch(tensor: torch.Tensor) -> WireTensor:
    """A torch tensor's bytes, on any device, in any layout of strides."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise OpArgumentError(
            f"a tensor of {dtype} cannot be part of an experiment; cast it with .to() first"
        )
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return WireTensor(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def to_torch(tensor: WireTensor) -> torch.Tensor:
    """A torch tensor with storage of its own."""
    import torch

    dtype = getattr(torch, tensor.dtype)
    if not tensor.spec.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)

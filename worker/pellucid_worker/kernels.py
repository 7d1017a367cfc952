"""The one table that binds each registered op to a callable of torch or einops.

It is built once, at import, from the ids of the registry and nothing else: no text of a user's ever reaches
``getattr``. The engine calls ``kernel(op_id)(*args, **kwargs)`` with torch tensors in place of refs and
torch dtypes in place of :class:`DType`, and

* leaves out every :class:`Device` argument (devices are the engine's business),
* gives ``device=`` to the ops that :func:`takes_device` names: they make a tensor out of no other,
* gives ``generator=`` to the ops whose ``random`` is set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from pellucid_shared.errors import UnknownOpError, did_you_mean
from pellucid_shared.ops import Kind, Op, all_ops, lookup

Kernel = Callable[..., Any]


def kernel(op_id: str) -> Kernel:
    """The callable of an op.

    Raises:
        UnknownOpError: names the nearest ids.
    """
    try:
        return KERNELS[op_id]
    except KeyError:
        raise UnknownOpError(f"there is no op {op_id!r}.{did_you_mean(op_id, KERNELS)}") from None


def takes_device(op_id: str) -> bool:
    """Whether an op makes a tensor out of no other, so that the engine must say where."""
    kinds = {param.kind for param in lookup(op_id).params}
    return Kind.DEVICE in kinds and not kinds & {Kind.TENSOR, Kind.TENSORS}


def _getitem(input: torch.Tensor, index: Any) -> torch.Tensor:
    return input[index]


def _setitem(input: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    input[index] = value
    return input


# The *_like functions of torch take no generator.


def _like(make: Kernel) -> Kernel:
    def like(
        input: torch.Tensor,
        *sizes: int,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **bounds: int,
    ) -> torch.Tensor:
        made: torch.Tensor = make(
            *sizes,
            *bounds.values(),
            size=input.shape,
            dtype=dtype or input.dtype,
            device=input.device,
            generator=generator,
        )
        return made

    return like


_OWN: dict[str, Kernel] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "torch.rand_like": _like(torch.rand),
    "torch.randn_like": _like(torch.randn),
}


def _resolve(op: Op) -> Kernel:
    """The callable an op's ``kernel``, or else its id, names."""
    if op.id in _OWN:
        return _OWN[op.id]
    root, *path = (op.kernel or op.id).split(".")
    if root == "tensor":
        return _attribute(torch.Tensor, path)
    if root == "torch":
        return _attribute(torch, path)
    if root == "einops":
        import einops

        return _attribute(einops, path)
    raise RuntimeError(f"op {op.id} has no kernel: {op.kernel or op.id} is neither of torch nor of einops")


def _attribute(root: Any, path: list[str]) -> Kernel:
    found: Kernel = reduce(getattr, path, root)
    return found


KERNELS: dict[str, Kernel] = {op.id: _resolve(op) for op in all_ops().values()}

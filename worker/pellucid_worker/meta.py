"""The card of a model whose weights are not there: the probe runs it on tensors that have no numbers.

The model is built on torch's ``meta`` device, and each of its parameters and buffers becomes an ``Unknown``:
shape, dtype and strides of a tensor on the CPU, and nothing in it. What the model computes from them is
unknown too. Ids, positions and masks are real, so that code which looks at them goes the way it goes in a
loaded model (torch's own FakeTensor would not do: transformers takes another way when it meets one).

Where whole numbers or truth values are made from unknown numbers (the experts a router chooses), the op runs
on random ones: a model with a mixture of experts is then followed as by any input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError

from .loader import without_weights
from .probe import probe


class WeightsNeededError(InputError):
    """A model whose code, or whose quantized weights, say only once loaded what its modules are and do."""


#: An op on unknown numbers whose result the model looks at is run for real, if it is no larger than this.
_MOST_DRAWN = 2**24


class Unknown(torch.Tensor):
    """A tensor of the CPU's without its numbers; ``meta`` is the same on the meta device."""

    meta: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> Unknown:
        sizes, cpu = (meta.shape, meta.stride(), meta.storage_offset()), torch.device("cpu")
        made: Unknown = torch.Tensor._make_wrapper_subclass(cls, *sizes, dtype=meta.dtype, device=cpu)
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes the shape of a tensor without weights in place")
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_numbers(args[1]))
        if func is torch.ops.aten._grouped_mm.default:
            return Unknown(_grouped_mm(*_on_meta(args[:2])))
        if _is_read(func):
            return func(*_drawn(args), **_drawn(kwargs))
        found = func(*_on_meta(args), **_on_meta(kwargs))
        if func._schema.is_mutable:
            return args[0]
        if _whole_numbers(found):
            real = func(*_drawn(args), **_drawn(kwargs))
            return tree_map(_known_or_not, found, real)
        return tree_map(_known_or_not, found, found)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unknown({list(self.shape)}, {self.dtype})"


def meta_card(
    source: str,
    *,
    id: str,
    dtype: str | None = None,
    revision: str | None = None,
    has_tokenizer: bool = False,
) -> ModelCard:
    """The card of a model from its config alone; no weights are read, and none are made.

    It is the card that probing the loaded model gives, but for the fingerprint, for ``packs``, which is None
    (only numbers can show it), and for how many rows each expert of a mixture gets.

    Args:
        source: a folder, or a hub id.
        id, dtype, revision: as for :func:`pellucid_worker.loader.load`.

    Raises:
        WeightsNeededError: its code looks at numbers that are not there, or its weights are quantized, which
            changes its modules as they are loaded.
        NotFoundError, InputError: as for ``load``.
    """
    model = without_weights(source, dtype=dtype, revision=revision)
    if getattr(model.config, "quantization_config", None) is not None:
        raise WeightsNeededError(f"{source} is quantized, so its modules are known once it is loaded")
    without_numbers(model)
    try:
        return probe(model, id=id, source=source, has_tokenizer=has_tokenizer, weights=False)
    except Exception as error:  # a model file may do anything
        reason = str(error).strip().split("\n", 1)[0][:300]
        raise WeightsNeededError(f"{source} cannot be followed without its weights ({reason})") from error


def without_numbers(model: torch.nn.Module) -> None:
    """Make each parameter and buffer of a model on the meta device :class:`Unknown`; tied ones stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.nn.Parameter(Unknown(parameter.detach()), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = made.setdefault(id(buffer), Unknown(buffer))


def _is_read(func: Any) -> bool:
    """Whether an op gives Python a number, or a shape that numbers decide."""
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _whole_numbers(found: Any) -> bool:
    members = found if isinstance(found, list | tuple) else [found]
    return any(isinstance(m, torch.Tensor) and not _fractional(m) for m in members)


def _fractional(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _known_or_not(found: Any, real: Any) -> Any:
    if not isinstance(found, torch.Tensor):
        return found
    return Unknown(found) if _fractional(found) else real


def _on_meta(values: Any) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, Unknown):
            return value.meta
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    return tree_map(moved, values)


def _drawn(values: Any) -> Any:
    def number(value: Any) -> Any:
        if not isinstance(value, Unknown):
            return value
        if value.numel() > _MOST_DRAWN:
            raise NotImplementedError(f"the numbers of {value!r} decide what the model does")
        generator = torch.Generator().manual_seed(value.numel())
        return torch.rand(value.shape, generator=generator).to(value.dtype)

    return tree_map(number, values)


def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] of all experts, weights [experts, in, out]: [n, out]. On the CPU it takes every dtype,
    while its own rule of shapes takes bfloat16 only."""
    return rows.new_empty(rows.shape[0], weights.shape[-1])


def _as_numbers(indices: Sequence[Any]) -> list[Any]:
    """Masks among indices as the positions where they hold: how many these are, only their values say."""
    found: list[Any] = []
    for index in indices:
        mask = isinstance(index, torch.Tensor) and index.dtype is torch.bool
        found += index.nonzero().unbind(1) if mask else [index]
    return found

"""Attention cut by invoke, so that several invokes share one packed row and none sees another.

The model runs on ``[1, sum of tokens]``; our attention function, registered with transformers'
``AttentionInterface``, cuts q, k and v into each invoke's own ``[batch, heads, tokens, head_dim]`` and calls
the function the model would have used. Its name has no mask function, so the model builds no mask of the
whole row; each invoke's masks are made by transformers' own ``create_masks_for_generate``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .inputs import Segment

NAME = "pellucid_packed"


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the attention function needs of the pass under way."""

    segments: Sequence[Segment]
    caches: Sequence[Any]  # per segment: its own cache of keys and values, or None
    masks: Sequence[Any]  # per segment: a mask, None, or a dict of them by layer type
    implementation: str
    configs: Sequence[tuple[Any, str]]  # every config of the model, and its own implementation


_LAYOUT: ContextVar[_Layout | None] = ContextVar("pellucid_layout", default=None)


@contextlib.contextmanager
def attention_by_segment(
    model: torch.nn.Module, segments: Sequence[Segment], caches: Sequence[Any] | None = None
) -> Iterator[None]:
    """Within this context the model's attention sees each segment alone, behind what its cache holds of
    earlier steps, which grows."""
    AttentionInterface.register(NAME, _attend)
    config: Any = model.config
    kept = caches or [None] * len(segments)
    masks = [_masks(model, s, c) for s, c in zip(segments, kept, strict=True)]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    own = [(c, c._attn_implementation) for c in configs.values()]
    token = _LAYOUT.set(_Layout(segments, kept, masks, config._attn_implementation, own))
    try:
        _use(own, NAME)
        yield
    finally:
        _use(own)
        _LAYOUT.reset(token)


@contextlib.contextmanager
def attention_of_its_own() -> Iterator[None]:
    """Within this context, inside the other, the model's attention is what it is alone: for a module that is
    called on one invoke's values."""
    layout = _LAYOUT.get()
    if layout is None:
        yield
        return
    try:
        _use(layout.configs)
        yield
    finally:
        _use(layout.configs, NAME)


def _use(configs: Sequence[tuple[Any, str]], name: str | None = None) -> None:
    """Set an attention function in every config; by default each one's own."""
    for config, own in configs:
        config._attn_implementation = name or own


def _masks(model: torch.nn.Module, segment: Segment, cache: Any) -> Any:
    parameter = next(model.parameters())
    config: Any = model.config
    shape = (segment.batch, segment.tokens, 1)
    return create_masks_for_generate(
        config=config,
        inputs_embeds=torch.empty(shape, dtype=parameter.dtype, device=parameter.device),
        attention_mask=segment.mask,
        past_key_values=cache,
    )


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over q, k, v [1, heads, sum, head_dim], cut by segment; gives [1, sum, heads, head_dim]."""
    layout = _LAYOUT.get()
    assert layout is not None
    function = _function(module, layout.implementation)
    parts = []
    for segment, cache, masks in zip(layout.segments, layout.caches, layout.masks, strict=True):
        q, k, v = (_cut(x, segment) for x in (query, key, value))
        if cache is not None:
            k, v = cache.update(k, v, module.layer_idx)
        output, _ = function(module, q, k, v, _mask_of(module, masks), **kwargs)
        parts.append(output.reshape(1, segment.stop - segment.start, *output.shape[2:]))
    return torch.cat(parts, dim=1), None


def _cut(x: torch.Tensor, segment: Segment) -> torch.Tensor:
    heads, size = x.shape[1], x.shape[3]
    own = x[0, :, segment.start : segment.stop]
    return own.reshape(heads, segment.batch, segment.tokens, size).transpose(0, 1)


def _mask_of(module: torch.nn.Module, masks: Any) -> Any:
    if not isinstance(masks, dict):
        return masks
    config: Any = module.config
    index: Any = module.layer_idx
    return masks[config.layer_types[index]]


def _function(module: torch.nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function the model uses when it runs alone; eager ones live in the model's own file."""
    if implementation == "eager":
        found: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return found
    return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]

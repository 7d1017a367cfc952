"""Plain generation with hooks that know their step: ``transformers.generate``, and counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from references import first, with_first

#: Given the step and the first tensor of a module's output, returns None or what replaces it.
StepHook = Callable[[int, torch.Tensor], torch.Tensor | None]


def generate(
    model: Any,
    ids: torch.Tensor,
    *,
    at: Mapping[str, StepHook] | None = None,
    mask: torch.Tensor | None = None,
    seed: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """``model.generate`` over ``ids`` [batch, tokens] with a hook by module path; ids [batch, n]."""
    handles = []
    for path, hook in (at or {}).items():
        steps = iter(range(10**6))

        def after(module: Any, args: Any, output: Any, hook: StepHook = hook, steps: Any = steps) -> Any:
            changed = hook(next(steps), first(output))
            return None if changed is None else with_first(output, changed)

        handles.append(model.get_submodule(path).register_forward_hook(after))
    if seed is not None:
        torch.manual_seed(seed)
    own = {"do_sample": False, "pad_token_id": 0, **options}
    try:
        with torch.no_grad():
            found: torch.Tensor = model.generate(
                ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **own
            )
            return found
    finally:
        for handle in handles:
            handle.remove()


def captured(model: Any, ids: torch.Tensor, path: str, **options: Any) -> list[torch.Tensor]:
    """The first tensor of a module's output at each step."""
    seen: list[torch.Tensor] = []
    generate(model, ids, at={path: lambda step, h: seen.append(h.clone())}, **options)
    return seen

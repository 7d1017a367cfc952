"""Plain PyTorch hooks over plain transformers: what every experiment is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Given (args, kwargs), returns None or new (args, kwargs).
PreHook = Callable[[tuple[Any, ...], dict[str, Any]], Any]
#: Given the output, returns None or a new output.
PostHook = Callable[[Any], Any]


def forward(
    model: torch.nn.Module,
    ids: torch.Tensor,
    *,
    before: Mapping[str, PreHook] | None = None,
    after: Mapping[str, PostHook] | None = None,
    mask: torch.Tensor | None = None,
) -> Any:
    """One forward pass over ``ids`` [batch, tokens] with hooks by module path; returns the model's output."""
    handles = []
    for path, pre in (before or {}).items():
        hook = _pre(pre)
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    for path, post in (after or {}).items():
        handles.append(model.get_submodule(path).register_forward_hook(_post(post)))
    extra: dict[str, Any] = {}
    if mask is not None:
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **extra)
    finally:
        for handle in handles:
            handle.remove()


def capture(
    model: torch.nn.Module, ids: torch.Tensor, path: str, kind: str = "output", **kwargs: Any
) -> torch.Tensor:
    """The first tensor of one module's output or input, copied when the hook saw it."""
    seen: list[torch.Tensor] = []

    def before(args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        seen.append((args[0] if args else next(iter(kw.values()))).clone())

    def after(output: Any) -> None:
        seen.append(first(output).clone())

    hooks: dict[str, Any] = {"after": {path: after}} if kind == "output" else {"before": {path: before}}
    for name, given in kwargs.items():
        hooks[name] = {**given, **hooks.get(name, {})} if name in ("before", "after") else given
    forward(model, ids, **hooks)
    return seen[0]


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    return tensor if isinstance(output, torch.Tensor) else (tensor, *output[1:])


def _pre(hook: PreHook) -> Any:
    return lambda module, args, kwargs: hook(args, kwargs)


def _post(hook: PostHook) -> Any:
    return lambda module, args, output: hook(output)

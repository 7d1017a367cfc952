"""Modules that do not run for some of a pass's invokes: ``module.skip``.

A module is skipped by replacing its ``forward`` for the pass, since torch picks it before hooks run. Where
every invoke of the pass skips a call, the module is left out, unless it keeps keys and values of a
generation: then it runs with the run's hooks off, and what it returns is dropped. Where some need it, it runs
for all, and the rows of those that skip it are replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pellucid_shared.card import TensorLeaf
from pellucid_shared.values import Site

from .acts import Skip
from .inputs import Rows, Segment
from .plan import Event
from .sites import View, WholeView, packed_view
from .tensors import TORCH_DTYPES

if TYPE_CHECKING:
    from .interleave import Run

#: (module, call) -> invoke -> what it skips, and the tensors (or numbers) it gives instead, by leaf.
Given = dict[tuple[str, int], dict[int, tuple[Skip, list[tuple[Site, Any]]]]]


@dataclass(frozen=True, slots=True)
class Around:
    """The pass under way.

    Attributes:
        view: how it sees the tensors of an event.
        invokes: those that take part.
        segments: where each lies, or None where one has the pass to itself.
        size: (batch, tokens) of that one.
        keeps: it fills a cache of keys and values.
    """

    view: Callable[[Any], View]
    invokes: Sequence[int]
    segments: Mapping[int, Segment] | None
    size: tuple[int, int]
    keeps: bool

    @staticmethod
    def alone(invoke: int, rows: Rows, *, keeps: bool = False) -> Around:
        """One invoke has the pass to itself."""
        batch, tokens = rows.ids.shape
        return Around(WholeView, (invoke,), None, (batch, tokens), keeps)

    @staticmethod
    def packed(invokes: Sequence[int], segments: Sequence[Segment], *, keeps: bool = False) -> Around:
        """Several invokes share it."""
        own = dict(zip(invokes, segments, strict=True))
        return Around(packed_view(own), invokes, own, (0, 0), keeps)

    def shape(self, skip: Skip, site: Site) -> tuple[int, ...]:
        """The shape of the model's own tensor at a leaf of a skipped module's output."""
        leaf, prefill = skip.leaves[site.path]
        if self.segments is None:
            spec = leaf.spec(*self.size)
            assert spec is not None
            return spec.shape
        total = sum(segment.stop - segment.start for segment in self.segments.values())
        assert prefill.shape is not None
        rest = prefill.shape[1:] if prefill.shape[0] == "rows" else prefill.shape[2:]
        return (*((total,) if prefill.shape[0] == "rows" else (1, total)), *(int(s) for s in rest))


class _Handle:
    """A replaced ``forward``; ``remove`` puts the module's own back."""

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._before = module, module.__dict__.get("forward")
        module.forward = forward

    def remove(self) -> None:
        del self._module.forward
        if self._before is not None:
            self._module.forward = self._before


def install(
    run: Run,
    model: torch.nn.Module,
    events: Sequence[Event],
    around: Around,
    counts: Mapping[str, Counter[str]],
    pass_over: Callable[[frozenset[tuple[str, int]]], None],
) -> list[Any]:
    """Replace the ``forward`` of every module that the pass's events skip; the handles put them back.

    Args:
        counts: calls so far, by module.
        pass_over: told of the calls that do not happen.
    """
    run.skipped.clear()
    paths = {
        event.module
        for event in events
        if any(isinstance(getattr(i, "inner", i), Skip) for i in event.instructions)
    }

    def replaced(path: str) -> _Handle:
        module = model.get_submodule(path)
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if run.is_muted:
                return own(*args, **kwargs)
            call = counts[path]["call"]
            counts[path]["call"] += 1
            given = run.skipped.pop((path, call), None)
            if given is None:
                return own(*args, **kwargs)
            if len(given) < len(around.invokes):
                output = own(*args, **kwargs)
            else:
                if around.keeps and _keeps(module):
                    run.muted(own, *args, **kwargs)
                skip = next(iter(given.values()))[0]
                pass_over(skip.inside)
                output = _blank(skip, around, _device(model, args, kwargs))
            view = around.view(output)
            for _, parts in given.values():
                for site, part in parts:
                    view.set(site, part, False)
            view.flush()
            return view.value

        return _Handle(module, forward)

    return [replaced(path) for path in sorted(paths)]


def _keeps(module: torch.nn.Module) -> bool:
    """Whether a module has keys and values in a cache: transformers numbers the layers that have."""
    return any(hasattr(inner, "layer_idx") for inner in module.modules())


def _blank(skip: Skip, around: Around, device: torch.device) -> Any:
    """The output's structure with tensors that are still to be filled."""

    def made(structure: Any, path: tuple[int | str, ...]) -> Any:
        if path in skip.leaves:
            site = replace(skip.site, path=path)
            dtype = TORCH_DTYPES[skip.leaves[path][0].dtype]
            return torch.empty(around.shape(skip, site), dtype=dtype, device=device)
        if isinstance(structure, dict):
            return {k: made(v, (*path, k)) for k, v in structure.items()}
        if isinstance(structure, list | tuple):
            members = [made(v, (*path, i)) for i, v in enumerate(structure)]
            return members if skip.lists[path] else tuple(members)
        return structure

    return made(skip.value, ())


def _device(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> torch.device:
    tensors: Iterator[torch.Tensor] = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    found = next(tensors, None)
    return (next(model.parameters()) if found is None else found).device


__all__ = ["Around", "Given", "TensorLeaf", "install"]

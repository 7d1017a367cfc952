"""Reading and writing the tensors of one site event, alone or packed.

``arguments`` is what the hook holds: the module's output, or ``(args, kwargs)`` before it runs.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from pellucid_shared.values import Site

from .inputs import Segment
from .tensors import Memory, memory


class View(Protocol):
    """How a pass sees the tensors of one event."""

    #: The structure as it stands, replaced members included.
    value: Any

    def get(self, site: Any, edited: bool) -> torch.Tensor: ...

    def set(self, site: Any, value: Any, copied: bool) -> None:
        """``copied``: the value is edited once the model has moved on, so at ``flush`` the model gets a copy;
        until then the two are one tensor."""

    def flush(self) -> None:
        """Make what was written reach the model."""


class WholeView:
    """One invoke has the pass to itself: it gets the model's own tensors, as a plain hook would."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._copied: dict[tuple[int | str, ...], bool] = {}

    def get(self, site: Site, edited: bool) -> torch.Tensor:
        found: torch.Tensor = member(self.value, site.path)
        return found

    def set(self, site: Site, value: Any, copied: bool) -> None:
        new = fitted(value, member(self.value, site.path))
        self.value = with_member(self.value, site.path, new)
        self._copied[site.path] = copied and new is value

    def flush(self) -> None:
        """Edits were made in the model's tensors; only what is to be copied is left to do."""
        for path, copied in self._copied.items():
            if copied:
                self.value = with_member(self.value, path, member(self.value, path).clone())


class ResultView:
    """What is there behind the passes of a trace: the ids each invoke's generation ended with."""

    value: Any = None

    def __init__(self, trace: int, results: Mapping[tuple[int, int], torch.Tensor]) -> None:
        self._trace, self._results = trace, results

    def get(self, site: Site, edited: bool) -> torch.Tensor:
        return self._results[self._trace, site.invoke].clone()

    def set(self, site: Site, value: Any, copied: bool) -> None:
        raise AssertionError("a result is read alone")

    def flush(self) -> None:
        """Nothing was written."""


class Privates:
    """The private tensors of the invokes of a packed pass, by the model's tensor they are part of.

    One tensor inside the model, and any view of all of it, is one private tensor of each invoke; an entry
    lives as long as the model keeps such a tensor.
    """

    def __init__(self) -> None:
        self._found: dict[Memory, tuple[dict[int, weakref.ref[torch.Tensor]], dict[int, torch.Tensor]]] = {}

    def of(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        """Invoke -> its private part of ``tensor``; filled by the caller."""
        key, name = memory(tensor), id(tensor)
        holders, own = self._found.setdefault(key, ({}, {}))

        def gone(ref: weakref.ref[torch.Tensor]) -> None:
            if holders.get(name) is ref:
                del holders[name]
            if not holders and self._found.get(key, (None,))[0] is holders:
                del self._found[key]

        if name not in holders or holders[name]() is not tensor:
            holders[name] = weakref.ref(tensor, gone)
        return own

    def homes(self, invoke: int, private: torch.Tensor) -> list[torch.Tensor]:
        """The model's tensors that a private tensor is part of."""
        found = []
        for holders, own in list(self._found.values()):
            if own.get(invoke) is private:
                found += [tensor for ref in list(holders.values()) if (tensor := ref()) is not None][:1]
        return found


class PackedView:
    """Several invokes share the pass: each gets a private contiguous tensor of its own rows and tokens, which
    is written back where its graph wrote it."""

    def __init__(self, value: Any, segments: Mapping[int, Segment | slice], privates: Privates) -> None:
        self.value = value
        self._segments, self._privates = segments, privates
        self._edited: dict[tuple[int | str, ...], set[int]] = {}
        self._replaced: dict[tuple[int | str, ...], dict[int, torch.Tensor]] = {}
        self._copied: dict[tuple[tuple[int | str, ...], int], bool] = {}

    def get(self, site: Site, edited: bool) -> torch.Tensor:
        replaced = self._replaced.get(site.path, {})
        if site.invoke in replaced:
            return replaced[site.invoke]
        whole = member(self.value, site.path)
        own = self._privates.of(whole)
        if site.invoke not in own:
            own[site.invoke] = part(whole, self._segments[site.invoke]).clone()
        if edited:
            self._edited.setdefault(site.path, set()).add(site.invoke)
        return own[site.invoke]

    def set(self, site: Site, value: Any, copied: bool) -> None:
        present = part(member(self.value, site.path), self._segments[site.invoke])
        new = fitted(value, present)
        self._replaced.setdefault(site.path, {})[site.invoke] = new
        self._copied[site.path, site.invoke] = copied and new is value

    def flush(self) -> None:
        for path, invokes in self._edited.items():
            own = self._privates.of(member(self.value, path))
            for invoke in invokes:
                for home in self._privates.homes(invoke, own[invoke]):
                    part(home, self._segments[invoke]).copy_(own[invoke])
        for path, values in self._replaced.items():
            whole = member(self.value, path)
            new = whole.clone()  # a replacement is the model's next value here, not an edit of this one
            own = self._privates.of(new)
            own.update(self._privates.of(whole))  # invokes that replace nothing still name what they had
            for invoke, value in values.items():
                part(new, self._segments[invoke]).copy_(value)
                own[invoke] = value.clone() if self._copied[path, invoke] else value
            self.value = with_member(self.value, path, new)


def packed_view(segments: Mapping[int, Segment | slice]) -> Callable[[Any], View]:
    """How a pass that several invokes share sees the tensors of its events."""
    privates = Privates()
    return lambda value: PackedView(value, segments, privates)


def part(whole: torch.Tensor, segment: Segment | slice) -> torch.Tensor:
    """A segment's view of a packed tensor: ``[1, sum, ...]`` becomes ``[batch, tokens, ...]``, and the rows
    ``[sum, ...]`` of a site without a batch axis become ``[batch * tokens, ...]``. A slice is of rows."""
    if isinstance(segment, slice):
        return whole[segment]
    if whole.shape[0] == 1 and whole.ndim > 1:
        own = whole[0, segment.start : segment.stop]
        return own.view(segment.batch, segment.tokens, *own.shape[1:])
    return whole[segment.start : segment.stop]


def fitted(value: Any, present: torch.Tensor) -> torch.Tensor:
    """A replacement as the site takes it: a number fills, a tensor takes the site's dtype and device."""
    if not isinstance(value, torch.Tensor):
        return torch.full_like(present, value)
    result: torch.Tensor = value.to(device=present.device, dtype=present.dtype)
    if result.shape != present.shape:
        raise RuntimeError(f"the site has shape {list(present.shape)}, the value {list(result.shape)}")
    return result


def member(value: Any, path: tuple[int | str, ...]) -> Any:
    """The leaf of a structure at a path. Fields of a model's output are reached by name."""
    for step in path:
        value = getattr(value, str(step)) if _is_dataclass(value) else value[step]
    return value


def with_member(value: Any, path: tuple[int | str, ...], new: Any) -> Any:
    """The structure with the leaf at ``path`` replaced; containers along the path are made anew."""
    if not path:
        return new
    step, inner = path[0], with_member(member(value, path[:1]), path[1:], new)
    if isinstance(value, list | tuple):
        assert isinstance(step, int)
        items = [*value[:step], inner, *value[step + 1 :]]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if hasattr(value, "to_tuple"):  # a transformers ModelOutput: its fields are set in place, as a hook would
        value[step] = inner
        return value
    if _is_dataclass(value):
        return dataclasses.replace(value, **{str(step): inner})
    return {**value, step: inner}


def _is_dataclass(value: Any) -> bool:
    """Whether its fields are reached as attributes alone; a ModelOutput's are items too."""
    return dataclasses.is_dataclass(value) and not isinstance(value, Mapping)

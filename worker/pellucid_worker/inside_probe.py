"""What modules call inside, for the card: the calls of two runs of different sizes, side by side.

Attention is looked at as it is written out in the model's file (eager), since a fused kernel has nothing
inside. Of a run only shapes are kept, not its tensors.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch

from pellucid_shared.card import (
    Body,
    Call,
    Fields,
    InsideCall,
    OpaqueLeaf,
    PlainLeaf,
    Structure,
    TensorLeaf,
    leaf_at,
    leaves,
)
from pellucid_shared.card import Sequence as Items

from .inside import Frame, Watch, eager_attention, holds_tensor
from .tensors import dtype_name

#: Gives the axes of what has these two shapes in a small and a large run; None where they follow no rule.
Axes = Callable[[tuple[int, ...], tuple[int, ...]], "tuple[Any, ...] | None"]
_Key = tuple[str, int]  # a module's path, and which of its calls


@dataclass(eq=False)
class _Object:
    """A tensor of a run.

    Attributes:
        number: the one that the card knows it by; ``lent``: that of a view of it, where it has none.
        base: it is a view of that.
        named: a module or call takes or returns it; ``seen_through``: so is a view of it.
        overwritten: the model itself edits it in place.
    """

    number: int | None = None
    lent: int | None = None
    base: _Object | None = None
    named: bool = False
    seen_through: bool = False
    overwritten: bool = False

    @property
    def memory(self) -> _Object:
        """What stands for the memory it lies in."""
        return self if self.number is not None or self.base is None else self.base

    @property
    def packs(self) -> bool:
        whole = not self.seen_through and not self.overwritten
        return whole and not (self.base is not None and self.base.named)


@dataclass
class _Own:
    """One call of a torch function as it happened; shapes are of that run, numbers those of ``objects``."""

    name: str
    after: int
    inputs: Structure
    output: Structure


@dataclass
class Run:
    """One watched pass: the calls of each module's call, in order, and the tensors they name."""

    calls: dict[_Key, list[_Own]] = field(default_factory=dict)
    objects: list[_Object] = field(default_factory=list)

    def names(self, key: _Key) -> list[tuple[str, int]] | None:
        found = self.calls.get(key)
        return None if found is None else [(own.name, own.after) for own in found]


class Recording(Watch):
    """Watches every module of a pass; ``calls`` is what the card knows of them."""

    def __init__(self, calls: tuple[Call, ...]) -> None:
        super().__init__()
        self.run = Run()
        self._known = {(call.module, call.call): call for call in calls}
        self._alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def entered(self, frame: Frame, args: Any, kwargs: Any) -> None:
        key = frame.module, frame.number
        self.run.calls[key] = []
        if key in self._known:
            self._note(self._known[key].structure("input"), (args, kwargs))

    def left(self, frame: Frame, output: Any) -> None:
        if (call := self._known.get((frame.module, frame.number))) is not None:
            self._note(call.output, output)

    def called(self, frame: Frame, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = self._structure((args, kwargs))
        versions = [(given, given._version) for given in args if isinstance(given, torch.Tensor)]
        result = call(*args, **kwargs)
        for given, version in versions:
            if given._version != version:
                self.run.objects[self._object(given)].overwritten = True
        if holds_tensor(result):
            own = _Own(name, frame.children, inputs, self._structure(result))
            self.run.calls[frame.module, frame.number].append(own)
        return result

    def _note(self, known: Structure, value: Any) -> None:
        """The tensors of a module's arguments or output have the card's numbers."""
        for path, leaf in leaves(known):
            found = _at(value, path)
            if isinstance(leaf, TensorLeaf) and isinstance(found, torch.Tensor):
                seen = self.run.objects[self._object(found)]
                seen.number = leaf.object if seen.number is None else seen.number
                if seen.base is not None and seen.base.lent is None:
                    seen.base.lent = seen.number

    def _structure(self, value: Any) -> Structure:
        if isinstance(value, torch.Tensor):
            if not holds_tensor(value):
                return OpaqueLeaf(class_name="Tensor")
            return TensorLeaf(
                shape=tuple(value.shape), dtype=dtype_name(value.dtype), object=self._object(value)
            )
        if isinstance(value, list | tuple):
            items = tuple(map(self._structure, value))
            return Items(leaf="list" if isinstance(value, list) else "tuple", items=items)
        if isinstance(value, Mapping):
            return Fields(items={str(k): self._structure(v) for k, v in value.items()})
        if value is None or isinstance(value, bool | int | float | str | slice | torch.dtype | EllipsisType):
            return PlainLeaf(value=_text(value))
        return OpaqueLeaf(class_name=type(value).__name__)

    def _object(self, tensor: torch.Tensor, named: bool = True) -> int:
        """The position of a tensor among the run's objects; no tensor is kept alive for it."""
        reference, index = self._alive.get(id(tensor), (None, -1))
        if reference is None or reference() is not tensor:
            base = tensor._base if tensor._is_view() else None
            index = len(self.run.objects)
            self.run.objects.append(_Object())
            self._alive[id(tensor)] = weakref.ref(tensor), index
            if base is not None:
                self.run.objects[index].base = self.run.objects[self._object(base, named=False)]
        found = self.run.objects[index]
        if named and not found.named:
            found.named = True
            if found.base is not None:
                found.base.seen_through = True
        return index


def record_inside(model: torch.nn.Module, arguments: Mapping[str, Any], calls: tuple[Call, ...]) -> Run:
    """Run the model once and see what each module calls."""
    recording = Recording(calls)
    with recording.watching(model, [path for path, _ in model.named_modules()]):
        model(**copy.deepcopy(dict(arguments)))  # a cache grows
    return recording.run


class Bodies:
    """The bodies of a card, each once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found: dict[str, int] = {}
        self.all: list[Body] = []

    def add(
        self,
        calls: tuple[Call, ...],
        arguments: Sequence[Mapping[str, Any]],
        axes: Axes,
        packed: Run | None,
    ) -> tuple[Call, ...]:
        """The calls of a phase, each with the body that runs inside.

        Args:
            arguments: those of a small run and of a large one.
            packed: a packed pass, or None where the model does not pack.
        """
        own = record_inside(self._model, arguments[0], calls)
        try:
            with eager_attention(self._model):
                small, large = (record_inside(self._model, given, calls) for given in arguments)
        except Exception:  # no eager attention: a model file may lack it in any way
            small, large = own, record_inside(self._model, arguments[1], calls)
        # Where keys and values are kept for a window, what attention sees of a step follows no rule.
        layers = getattr(arguments[0].get("past_key_values"), "layers", ())
        slides = any(getattr(layer, "is_sliding", False) for layer in layers)
        result = []
        for call in calls:
            key = call.module, call.call
            names = small.names(key)
            eager = names != own.names(key)
            if names is None or names != large.names(key) or own.names(key) is None or (eager and slides):
                result.append(call)
                continue
            packs = packed is not None and not eager and packed.names(key) == names
            local: dict[_Object, int] = {}
            shape = _Merge(small, axes, local)
            inside = tuple(map(shape.call, small.calls[key], large.calls[key]))
            body = Body(calls=inside, eager=eager, packs=packs)
            known = {i: o.lent if o.number is None else o.number for o, i in local.items()}
            shared = {i: number for i, number in known.items() if number is not None}
            result.append(call.model_copy(update={"body": self._index(body), "shared": shared}))
        return tuple(result)

    def _index(self, body: Body) -> int:
        key = body.model_dump_json()
        if key not in self._found:
            self._found[key] = len(self.all)
            self.all.append(body)
        return self._found[key]


class _Merge:
    """Structures of a small and a large run as one; tensors are numbered from 0 within a body."""

    def __init__(self, small: Run, axes: Axes, local: dict[_Object, int]) -> None:
        self._objects, self._axes, self._local = small.objects, axes, local

    def call(self, small: _Own, large: _Own) -> InsideCall:
        inputs = self._one(small.inputs, large.inputs)
        args, kwargs = leaf_at(inputs, (0,)), leaf_at(inputs, (1,))
        return InsideCall(
            name=small.name,
            after=small.after,
            args=args.items if isinstance(args, Items) else (),
            kwargs=kwargs.items if isinstance(kwargs, Fields) else {},
            output=self._one(small.output, large.output),
            input_packs=self._packs(small.inputs),
            output_packs=self._packs(small.output),
        )

    def _one(self, small: Structure, large: Structure) -> Structure:
        if isinstance(small, TensorLeaf):
            assert small.object is not None
            memory = self._objects[small.object].memory
            number = self._local.setdefault(memory, len(self._local))
            same = isinstance(large, TensorLeaf) and small.shape is not None and large.shape is not None
            shape = self._axes(small.shape, large.shape) if same else None  # type: ignore[arg-type, union-attr]
            return TensorLeaf(shape=shape, dtype=small.dtype, object=number)
        if isinstance(small, Items) and isinstance(large, Items):
            return Items(leaf=small.leaf, items=tuple(map(self._one, small.items, large.items)))
        if isinstance(small, Fields) and isinstance(large, Fields):
            names = [k for k in small.items if k in large.items]
            return Fields(items={k: self._one(small.items[k], large.items[k]) for k in names})
        if small == large:
            return small
        sizes = [s.value for s in (small, large) if isinstance(s, PlainLeaf) and s.value.isdigit()]
        found = self._axes((int(sizes[0]),), (int(sizes[1]),)) if len(sizes) == 2 else None
        return OpaqueLeaf(class_name="?") if found is None else PlainLeaf(value=found[0])

    def _packs(self, structure: Structure) -> bool:
        objects = (leaf.object for _, leaf in leaves(structure) if isinstance(leaf, TensorLeaf))
        return all(self._objects[i].packs for i in objects if i is not None)


def _text(value: Any) -> str:
    if isinstance(value, slice):
        parts = [value.start, value.stop] if value.step is None else [value.start, value.stop, value.step]
        return ":".join("" if part is None else str(part) for part in parts)
    return "..." if value is Ellipsis else repr(value)


def _at(value: Any, path: tuple[int | str, ...]) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value

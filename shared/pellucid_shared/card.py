"""The model card: what a server knows of a model, and all a client needs to build graphs for it.

A worker makes it by probing the resident model at a few (batch, tokens) sizes; axes that follow the first
number are ``batch``, those that follow the second ``tokens``, products of both ``rows``. The order of
``events`` is the order in which the model calls its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .specs import TensorSpec
from .values import CALL, Site

if TYPE_CHECKING:
    from .inside import Insides

#: ``cache``: the tokens a decode step attends to, the prompt's and one for each step.
Axis = Literal["batch", "tokens", "rows", "cache"]
Size = int | Axis


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ignored_types=(cached_property,))


class TensorLeaf(_Frozen):
    """A tensor in a site. ``shape`` holds sizes and axis names; ``object`` numbers the tensor object: leaves
    with the same number in one phase are one and the same tensor (layer i's output is layer i+1's input), or
    a view of all of it."""

    leaf: Literal["tensor"] = "tensor"
    shape: tuple[Size, ...] | None  # None: the axes follow no rule the probe could find
    dtype: str
    object: int | None = None
    storage: int | None = None  # tensors with the same number share memory, where the card says so

    def spec(self, batch: int, tokens: int, step: int = 0) -> TensorSpec | None:
        """The concrete spec for a batch of that many rows of that many tokens, at a step of generation."""
        if self.shape is None:
            return None
        sizes = {"batch": batch, "tokens": tokens, "rows": batch * tokens, "cache": tokens + step}
        return TensorSpec(tuple(sizes[s] if isinstance(s, str) else s for s in self.shape), self.dtype)

    def packable(self) -> bool:
        """Whether a tenant's part of a packed pass is a plain slice of this leaf."""
        if self.shape is None:
            return False
        return self.shape[:2] == ("batch", "tokens") or (
            self.shape[:1] == ("rows",) and all(isinstance(s, int) for s in self.shape[1:])
        )

    def __str__(self) -> str:
        inside = "?" if self.shape is None else ", ".join(map(str, self.shape))
        return f"[{inside}] {self.dtype}"


class PlainLeaf(_Frozen):
    """A number, string, bool or None: shown, never written."""

    leaf: Literal["plain"] = "plain"
    value: str


class OpaqueLeaf(_Frozen):
    """Something that is neither tensor nor plain (a cache): never saved or written."""

    leaf: Literal["opaque"] = "opaque"
    class_name: str


class Sequence(_Frozen):
    leaf: Literal["tuple", "list"]
    items: tuple[Structure, ...]


class Fields(_Frozen):
    """A dict, or a model output object (``class_name`` is then its class) with named fields in order."""

    leaf: Literal["dict"] = "dict"
    class_name: str = "dict"
    items: dict[str, Structure]


Structure = Annotated[TensorLeaf | PlainLeaf | OpaqueLeaf | Sequence | Fields, Field(discriminator="leaf")]


class Call(_Frozen):
    """One call of one module: where it starts and ends in the order of events, what it takes and returns.

    ``args`` and ``kwargs`` are structures as passed. ``enter`` and ``exit`` are positions on one clock:
    the input site happens at ``enter``, the output site at ``exit``. ``body`` is which of the card's bodies
    runs inside; ``shared`` gives the numbers that tensors of the body have among those of the modules.
    """

    module: str
    call: int
    enter: int
    exit: int
    args: tuple[Structure, ...]
    kwargs: dict[str, Structure]
    output: Structure
    body: int | None = None
    shared: dict[int, int] = {}

    def structure(self, kind: str) -> Structure:
        """The structure a site of that kind indexes: the output, or (args, kwargs)."""
        if kind == "output":
            return self.output
        return Sequence(
            leaf="tuple", items=(Sequence(leaf="tuple", items=self.args), Fields(items=self.kwargs))
        )


class InsideCall(_Frozen):
    """One call of a torch function by a module itself, not by its children.

    Attributes:
        name: ``<function>_<ordinal>``, counted within the call of the module.
        after: how many of the module's children (counted by their calls) have ended by then.
        input_packs, output_packs: the memory has no second name, so an invoke may have a private part of it.
    """

    name: str
    after: int
    args: tuple[Structure, ...]
    kwargs: dict[str, Structure]
    output: Structure
    input_packs: bool = False
    output_packs: bool = False

    def structure(self, kind: str) -> Structure:
        """The output, or (args, kwargs)."""
        if kind == CALL:
            return self.output
        return Sequence(
            leaf="tuple", items=(Sequence(leaf="tuple", items=self.args), Fields(items=self.kwargs))
        )


class Body(_Frozen):
    """The calls inside a module that have to do with tensors, in order. Modules that do the same share one.

    Attributes:
        eager: they are these only under eager attention, not under the model's own.
        packs: they are the same in a packed pass.
    """

    calls: tuple[InsideCall, ...]
    eager: bool = False
    packs: bool = False

    @cached_property
    def index(self) -> dict[str, InsideCall]:
        return {call.name: call for call in self.calls}


class ModuleInfo(_Frozen):
    """One module of the tree: its class, and the parameters and buffers it owns directly."""

    path: str
    class_name: str
    parameters: dict[str, TensorLeaf] = {}
    buffers: dict[str, TensorLeaf] = {}


class ModelCard(_Frozen):
    """Everything a client needs to know of a served model.

    Attributes:
        id: the name it is served under.
        source: folder or hub id it was loaded from, as the administrator gave it.
        revision: the source's revision (a commit), or None.
        class_name: the transformers class.
        base_model_prefix: path of the base model; names absent at the root resolve through it.
        fingerprint: SHA-256 over what decides results bit for bit: weights, dtype, versions, device;
            ``meta`` where the card was made without weights.
        dtype: the parameters' dtype.
        parameters: number of parameters.
        vocab_size, max_tokens: bounds on ids and prompt length; max_tokens is None where the model has none.
        packs: invokes may share one packed pass (certified against alone); None: the card was made without
            weights, which cannot tell, and a scan takes it that they may.
        modules: the tree in depth-first order, root first.
        prefill: the calls of one forward pass, in order of ``enter``.
        decode: the calls of one decode step with a cache; empty where the model does not generate.
        bodies: what modules call inside, each once; see :class:`Call`.
        has_tokenizer: text can be tokenized.
        config: the model's config as JSON.
        versions: versions of torch, transformers, accelerate, pellucid.
        takes: ``tokens``; or ``tensors``, a torch module whose invokes share a pass row by row (axis 0).
    """

    id: str
    source: str
    revision: str | None = None
    class_name: str
    base_model_prefix: str = ""
    fingerprint: str
    dtype: str
    parameters: int
    vocab_size: int
    max_tokens: int | None = None
    packs: bool | None = False
    modules: tuple[ModuleInfo, ...]
    prefill: tuple[Call, ...]
    decode: tuple[Call, ...] = ()
    bodies: tuple[Body, ...] = ()
    has_tokenizer: bool = False
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    takes: Literal["tokens", "tensors"] = "tokens"

    @cached_property
    def module_index(self) -> dict[str, ModuleInfo]:
        return {m.path: m for m in self.modules}

    @cached_property
    def children(self) -> dict[str, tuple[str, ...]]:
        """Path -> names of its direct children, in order."""
        found: dict[str, list[str]] = {m.path: [] for m in self.modules}
        for module in self.modules[1:]:
            parent, _, name = module.path.rpartition(".")
            found[parent].append(name)
        return {path: tuple(names) for path, names in found.items()}

    @cached_property
    def call_index(self) -> dict[tuple[str, int], Call]:
        """(module path, call number) -> its call in the prefill phase."""
        return {(c.module, c.call): c for c in self.prefill}

    @cached_property
    def decode_index(self) -> dict[tuple[str, int], Call]:
        """The same of a decode step."""
        return {(c.module, c.call): c for c in self.decode}

    @cached_property
    def insides(self) -> Insides:
        """The calls inside modules."""
        from .inside import Insides

        return Insides(self)

    def call_at(self, site: Site) -> Call | None:
        """The call a site belongs to, in the phase of its step; None where there is none."""
        index = self.decode_index if site.step else self.call_index
        return index.get((site.module, site.call))


def leaves(
    structure: Structure, path: tuple[int | str, ...] = ()
) -> Iterator[tuple[tuple[int | str, ...], Structure]]:
    """Every leaf of a structure with its path, in order."""
    if isinstance(structure, Sequence):
        for i, item in enumerate(structure.items):
            yield from leaves(item, (*path, i))
    elif isinstance(structure, Fields):
        for key, item in structure.items.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, structure


def leaf_at(structure: Structure, path: tuple[int | str, ...]) -> Structure | None:
    """The part of a structure at ``path``, or None where there is none."""
    for step in path:
        if isinstance(structure, Sequence) and isinstance(step, int) and step < len(structure.items):
            structure = structure.items[step]
        elif isinstance(structure, Fields) and isinstance(step, str) and step in structure.items:
            structure = structure.items[step]
        else:
            return None
    return structure


Sequence.model_rebuild()
Fields.model_rebuild()

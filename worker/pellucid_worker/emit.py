"""From one graph node to one instruction: constants resolved, refs turned into slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pellucid_shared.graph import APPLY, Node
from pellucid_shared.ops import lookup
from pellucid_shared.values import Device, DType, ModuleRef, Ref, TensorRef, Value, refs, substitute

from . import guards
from .kernels import kernel, takes_device
from .plan import Call, Slots
from .tensors import TORCH_DTYPES


class Runtime:
    """What instructions need of the run they are part of; set anew for each run.

    Attributes:
        apply: ``apply(path, *args, **kwargs)`` calls a module of the model with the engine's hooks off.
        generators: per trace, what draws its random numbers.
        device: where tensors made out of nothing are put.
        model: whose parameters are read.
    """

    apply: Callable[..., Any]
    generators: list[Any]
    device: Any
    model: Any


def resolve(value: Value, slot_of: Callable[[Ref | TensorRef], int]) -> Value:
    """A value as instructions hold it: refs name slots, dtypes are torch's own."""

    def leaf(part: Value) -> Any:
        if isinstance(part, Ref | TensorRef):
            return Ref(slot_of(part))
        return TORCH_DTYPES[part.name] if isinstance(part, DType) else part

    return substitute(value, leaf)


def call(position: int, node: Node, slot_of: Callable[[Ref | TensorRef], int], runtime: Runtime) -> Call:
    """The instruction of a registry op or an applied module. Devices are left out: they are the engine's."""
    args = [resolve(v, slot_of) for v in node.args if not isinstance(v, Device)]
    kwargs = {k: resolve(v, slot_of) for k, v in node.kwargs.items() if not isinstance(v, Device)}
    if node.op == APPLY:
        module = args.pop(0)
        assert isinstance(module, ModuleRef)
        return _instruction(position, _applied(runtime, module.path), args, kwargs)
    if node.op in guards.KERNELS:
        return _instruction(position, guards.KERNELS[node.op], args, kwargs)
    function = kernel(node.op)
    if takes_device(node.op):
        function = _on_device(runtime, function)
    if lookup(node.op).random:
        function = _with_generator(runtime, node.region, function)
    return _instruction(position, function, args, kwargs)


def parameter(position: int, node: Node, copied: bool, runtime: Runtime) -> Call:
    """The instruction that reads a parameter or buffer; ``copied``: into memory of its own."""
    path, name = node.args[0].path, node.args[1]

    def read() -> Any:
        module = runtime.model.get_submodule(path)
        found = {**module._parameters, **module._buffers}[name].detach()
        if found.is_meta:
            raise RuntimeError("it is not in memory: it is offloaded")
        return found.clone() if copied else found

    return Call(position, read, (), {}, (), None, position, ())


def copy(position: int, source: int, out: int) -> Call:
    """The instruction that keeps the present version of a slot."""
    return Call(position, guards.keep, (None,), {}, ((0, source),), None, out, (source,))


def view_or(made: Call, base: int | None, older: int) -> Call:
    """The instruction of what torch makes a view or a copy: where it is a copy, the value is what slot
    ``older`` holds, which was made of the version the node stands behind."""
    assert base is not None
    inner = replace(made, frees=())

    def either(slots: Slots) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = inner.build(slots) if inner.build else (list(inner.args), dict(inner.kwargs))
        for position, slot in inner.fills:
            args[position] = slots[slot]
        return [slots[base], slots[older], args, kwargs], {}

    def function(source: Any, copied: Any, args: Any, kwargs: Any) -> Any:
        found = made.function(*args, **kwargs)
        return found if found.untyped_storage()._cdata == source.untyped_storage()._cdata else copied

    return replace(
        made, function=function, args=(), kwargs={}, fills=(), build=either, reads=(*made.reads, base, older)
    )


def builder(value: Value) -> Callable[[Slots], Any]:
    """A function that puts the slots' values where ``value`` has refs."""
    if isinstance(value, Ref):
        slot = value.node
        return lambda slots: slots[slot]
    return lambda slots: substitute(value, lambda v: slots[v.node] if isinstance(v, Ref) else v)


def reads(value: Value) -> tuple[int, ...]:
    """The slots a resolved value names."""
    return tuple(refs(value))


def _instruction(
    position: int, function: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> Call:
    nested = any(reads(v) for v in args if not isinstance(v, Ref)) or reads(kwargs)
    used = reads([args, dict(kwargs)])
    if nested:
        return Call(position, function, (), {}, (), builder((args, dict(kwargs))), position, used)
    fills = tuple((i, v.node) for i, v in enumerate(args) if isinstance(v, Ref))
    return Call(position, function, tuple(args), kwargs, fills, None, position, used)


def _applied(runtime: Runtime, path: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: runtime.apply(path, *args, **kwargs)


def _on_device(runtime: Runtime, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs, device=runtime.device)


def _with_generator(runtime: Runtime, trace: int, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs, generator=runtime.generators[trace])

"""Nodes and values of a graph as Python expressions over torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..graph import APPLY, Node
from ..ops import Kind, Op, lookup
from ..show import _INFIX
from ..values import Device, DType, ModuleRef, Ref, TensorRef, Value

#: The name of a value: of a node's, by position, or of a literal's, by digest.
Names = Callable[[Ref | TensorRef], str]


def expression(node: Node, names: Names, generator: str) -> str:
    """A call of a registry op, or of a module of the model.

    Args:
        generator: the expression of the generator that random ops draw from.
    """
    args = [a for a in node.args if not isinstance(a, Device)]
    kwargs = {k: v for k, v in sorted(node.kwargs.items()) if not isinstance(v, Device)}
    if node.op == APPLY:
        module = args.pop(0)
        assert isinstance(module, ModuleRef)
        return _call("apply", ["model", quoted(module.path), *_texts(args, names)], _keywords(kwargs, names))
    op = lookup(node.op)
    if node.op == "getitem" and len(args) == 2:
        return f"{_operand(args[0], names)}[{_index(args[1], names)}]"
    if node.op in _INFIX and len(args) == 2 and not kwargs and any(isinstance(a, Ref) for a in args):
        return f"{_operand(args[0], names)} {_INFIX[node.op]} {_operand(args[1], names)}"
    more = _keywords(kwargs, names)
    if node.op in ("torch.rand_like", "torch.randn_like"):  # in torch these take no generator
        return _like(node.op.removesuffix("_like"), _operand(args[0], names), kwargs, names, generator)
    if _makes_a_tensor(op):
        more["device"] = "device"
    if op.random:
        more["generator"] = generator
    name = op.kernel or op.id
    if name.startswith("tensor.") and args and isinstance(args[0], Ref):
        name = f"{names(args.pop(0))}.{name.removeprefix('tensor.')}"
    elif name.startswith("tensor."):
        name = f"torch.Tensor.{name.removeprefix('tensor.')}"
    return _call(name, _texts(args, names), more)


def assignment(node: Node, names: Names) -> str:
    """``target[index] = value`` of a ``setitem`` node."""
    given = dict(zip((p.name for p in lookup(node.op).params), node.args, strict=False)) | dict(node.kwargs)
    target, index, value = given["input"], given["index"], given["value"]
    return f"{_operand(target, names)}[{_index(index, names)}] = {text(value, names)}"


def text(value: Value, names: Names) -> str:
    """A value as Python."""
    if isinstance(value, Ref | TensorRef):
        return names(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, DType):
        return f"torch.{value.name}"
    if isinstance(value, list):
        return f"[{', '.join(_texts(value, names))}]"
    if isinstance(value, tuple):
        return f"({', '.join(_texts(value, names))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(k)}: {text(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_texts([value.start, value.stop, value.step], names))})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({text(value.real, names)}, {text(value.imag, names)})"
    return "..." if value is Ellipsis else repr(value)


def quoted(string: str) -> str:
    """A string as Python, in double quotes where that needs no more escapes."""
    plain = repr(string)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain and "\\'" not in plain else plain


def _texts(values: Sequence[Value], names: Names) -> list[str]:
    return [text(v, names) for v in values]


def _keywords(values: Mapping[str, Value], names: Names) -> dict[str, str]:
    return {key: text(value, names) for key, value in values.items()}


def _call(name: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str:
    if not all(key.isidentifier() for key in kwargs) or "from" in kwargs:
        spread = ", ".join(f"{key!r}: {value}" for key, value in kwargs.items())
        return f"{name}({', '.join([*args, '**{' + spread + '}'])})"
    return f"{name}({', '.join([*args, *(f'{key}={value}' for key, value in kwargs.items())])})"


def _operand(value: Value, names: Names) -> str:
    """A value where an operator binds to it."""
    plain = text(value, names)
    return f"({plain})" if plain.startswith("-") else plain


def _index(index: Any, names: Names) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_part(p, names) for p in parts) + ("," if _alone(index) else "") or "()"


def _alone(index: Any) -> bool:
    return isinstance(index, tuple) and len(index) == 1


def _part(index: Any, names: Names) -> str:
    if not isinstance(index, slice):
        return text(index, names)
    start, stop, step = ("" if v is None else text(v, names) for v in (index.start, index.stop, index.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _like(make: str, like: str, kwargs: Mapping[str, Value], names: Names, generator: str) -> str:
    dtype = text(kwargs["dtype"], names) if kwargs.get("dtype") is not None else f"{like}.dtype"
    return f"{make}({like}.shape, dtype={dtype}, device={like}.device, generator={generator})"


def _makes_a_tensor(op: Op) -> bool:
    """Whether an op makes a tensor out of no other, so that it must be told where."""
    kinds: set[Any] = {param.kind for param in op.params}
    return Kind.DEVICE in kinds and not kinds & {Kind.TENSOR, Kind.TENSORS}

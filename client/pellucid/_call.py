"""Calling an op on values: the user's arguments become one canonical node, the node becomes a value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pellucid_shared.errors import OpArgumentError, RecordingError, UnknownOpError, did_you_mean, nearest
from pellucid_shared.ops import Alias, Kind, Op, Param, all_ops, lookup
from pellucid_shared.packing import WireTensor
from pellucid_shared.specs import DTYPE_ALIASES, DTYPES, TensorSpec
from pellucid_shared.values import Device, DType, Ref

from . import _values
from ._backend import backend
from ._carry import Carry
from ._lines import users_line
from ._recorder import Recorder, active
from ._sizes import Size
from ._structure import DictValue, TupleValue, Unread, named_tuple
from ._turns import Number
from ._value import Value

#: The longest index tensor of the user's that is written as a list.
_LISTED = 64

#: Python's own types where a dtype stands, as torch reads them.
_PYTHON_DTYPES = {float: "float64", int: "int64", bool: "bool", complex: "complex128"}


@functools.cache
def spellings() -> dict[str, Op]:
    """Every name users write -> its op."""
    return {name: op for op in all_ops().values() for name in op.spellings}


def spelled(name: str) -> Op:
    """The op users write as ``name``.

    Raises:
        UnknownOpError: names the nearest spellings.
    """
    found = spellings().get(name)
    if found is None:
        raise UnknownOpError(
            f"{name} is not an operation a graph may hold.{nearest_to(name)}", where=users_line()
        )
    return found


def method(name: str) -> Op:
    """The op of a value's method.

    Raises:
        UnknownOpError: names the nearest methods.
    """
    found = spellings().get(f"torch.Tensor.{name}")
    if found is None:
        raise UnknownOpError(
            f"a value has no {name!r}.{nearest_to(f'torch.Tensor.{name}')}", where=users_line()
        )
    return found


def nearest_to(name: str) -> str:
    """A sentence with the nearest spellings: those of the same namespace, else by their last part."""
    space, _, last = name.rpartition(".")
    by_last: dict[str, str] = {}
    for full in spellings():
        if full.rpartition(".")[0] == space:
            by_last[full.rpartition(".")[2]] = full
    close = [by_last[short] for short in nearest(last, by_last)] or nearest(name, spellings())
    return f" Nearest: {', '.join(close)}." if close else ""


def call(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Record ``op(*args, **kwargs)`` and give back its value; an in-place op gives back what it wrote.

    Raises:
        GraphError: it does not fit; ``where`` is the user's line.
        RecordingError: no trace is open, or the values are of different ones.
    """
    recorder = recorder_of((*args, *kwargs.values())) or active()
    recorder.require_open()
    given = by_name(op, args, kwargs)
    if op.alias is Alias.INPLACE:
        target = given.get(op.aliases)
        if not isinstance(target, Value):
            target = backend().adopt(recorder, target)
            given[op.aliases] = target
        if recorder.whole is not None:
            recorder.whole.require_editable(target)
        recorder.add(op.id, *canonical(op, given, recorder))
        if recorder.whole is not None:
            recorder.whole.edited(target)
        return target
    value = value_of(recorder, recorder.add(op.id, *canonical(op, given, recorder)), op.fields)
    return as_tracked(recorder, value)


def as_tracked(recorder: Recorder, value: Any) -> Any:
    """A new value as it is where it was written: under ``torch.no_grad()`` gradients do not pass it."""
    if not recorder.tracks or backend().tracks():
        return value
    if isinstance(value, Value):
        if not value.is_floating_point():
            return value
        return value_of(recorder, recorder.add(lookup("torch.detach").id, (value.ref(recorder),)))
    if isinstance(value, TupleValue):
        return named_tuple([as_tracked(recorder, member) for member in value], value._fields)
    if isinstance(value, DictValue):
        return DictValue((k, as_tracked(recorder, member)) for k, member in value.items())
    return value


def value_of(recorder: Recorder, node: int, fields: Sequence[str] = ()) -> Any:
    """The value a node yields: a tensor, or a structure of tensors read out of it."""
    return _unpacked(recorder, node, recorder.spec(node), fields)


def _unpacked(recorder: Recorder, node: int, spec: Any, fields: Sequence[str] = ()) -> Any:
    if isinstance(spec, TensorSpec):
        return backend().tensor(recorder, node)
    if isinstance(spec, tuple | list):
        members = [
            _unpacked(recorder, _member(recorder, node, i), part) if part is not None else None
            for i, part in enumerate(spec)
        ]
        return named_tuple(members, fields)
    if isinstance(spec, dict):
        parts = {k: v for k, v in spec.items() if v is not None}
        return DictValue((k, _unpacked(recorder, _member(recorder, node, k), v)) for k, v in parts.items())
    return None  # what is no tensor (a cache, None) has no place in a graph


def _member(recorder: Recorder, node: int, key: int | str) -> int:
    return recorder.add("getitem", (Ref(node), key))


def by_name(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The user's arguments by parameter name, without those that say the default."""
    rest, named = list(args), {k: v for k, v in kwargs.items() if not k.startswith("_")}
    given: dict[str, Any] = {}
    for param in op.params:
        if param.keywords:
            given[param.name], named = named, {}
        elif param.variadic and rest:
            whole = len(rest) == 1 and isinstance(rest[0], list | tuple)
            given[param.name] = tuple(rest[0]) if whole else tuple(rest)
            rest = []
        elif rest and not param.keyword_only:
            given[param.name] = rest.pop(0)
        if param.name in named:
            if param.name in given:
                raise OpArgumentError(f"{op.id} is given {param.name!r} twice", where=users_line())
            given[param.name] = named.pop(param.name)
        if param.name in given and _same(given[param.name], param.default):
            del given[param.name]
    if rest:
        raise OpArgumentError(
            f"{op.id} takes at most {len(op.params)} arguments, found {len(args)}", where=users_line()
        )
    if named:
        wrong = next(iter(named))
        nearest = did_you_mean(wrong, [p.name for p in op.params])
        raise OpArgumentError(f"{op.id} has no argument {wrong!r}.{nearest}", where=users_line())
    return given


def canonical(op: Op, given: Mapping[str, Any], recorder: Recorder) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as a graph holds them: positional as far as they go without a gap, the rest by name."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    gap = False
    for param in op.params:
        if param.name not in given:
            gap = True
            continue
        if param.keywords:
            kwargs.update({k: graph_value(v, recorder) for k, v in given[param.name].items()})
            continue
        value = _argument(param, given[param.name], recorder)
        if gap or param.keyword_only:
            kwargs[param.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def graph_value(value: Any, recorder: Recorder) -> Any:
    """``value`` as a graph holds it: values of the trace become refs, the user's tensors literals.

    Raises:
        OpArgumentError: it has no place in a graph.
        ValueNotReadyError: it belongs to a trace that has ended.
        RecordingError: it belongs to another trace that is open.
    """
    if isinstance(value, Value):
        return value.ref(recorder)
    if isinstance(value, Unread):
        return graph_value(value.read_all(), recorder)
    if isinstance(value, Number):
        return value.ref(recorder)
    if isinstance(value, Carry):
        return graph_value(value.value, recorder)
    if value is None or value is Ellipsis or isinstance(value, bool | str):
        return value
    if isinstance(value, Size) and value.edit is recorder:
        return value
    if isinstance(value, int | float | complex):
        return _values.plain_number(value)
    if isinstance(value, slice):
        return slice(*(_bound(part, recorder) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):
        return tuple(graph_value(v, recorder) for v in value)
    if isinstance(value, list | range):
        return [graph_value(v, recorder) for v in value]
    if isinstance(value, dict):
        return {k: graph_value(v, recorder) for k, v in value.items()}
    if isinstance(value, DType | Device):
        return value
    if isinstance(value, type) and value in _PYTHON_DTYPES:
        return DType(_PYTHON_DTYPES[value])
    found = _values.literal(value)
    if found is not None:
        return recorder.add_literal(found) if isinstance(found, WireTensor) else found
    raise OpArgumentError(
        f"a {type(value).__name__} cannot be part of an experiment; values, tensors, arrays, numbers, "
        f"strings, and lists, tuples and dicts of them can: {value!r:.80}",
        where=users_line(),
    )


def plain_index(index: Any) -> Any:
    """An index with the user's own short index tensors as numbers and lists, which mean the same and are
    checked against the axis before anything is sent."""
    if isinstance(index, tuple):
        return tuple(map(plain_index, index))
    if isinstance(index, Value) or str(getattr(index, "dtype", "")).removeprefix("torch.") != "int64":
        return index
    return index.tolist() if index.ndim <= 1 and 0 < math.prod(index.shape) <= _LISTED else index


def recorder_of(value: Any) -> Recorder | None:
    """The recorder of the first value of a trace among nested arguments."""
    return next((found.recorder for found in values_in(value)), None)


def values_in(value: Any) -> Iterator[Value]:
    """Every value of a trace among nested arguments."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from values_in(item)


def function(name: str) -> Callable[..., Any]:
    """The op users write as ``name``, as a function over values."""
    op = spelled(name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        return call(op, args, kwargs)

    recorded.__name__ = recorded.__qualname__ = name.rpartition(".")[2]
    recorded.__doc__ = f"Record {op.id} ({', '.join(p.name for p in op.params)})."
    return recorded


def _argument(param: Param, value: Any, recorder: Recorder) -> Any:
    # `.to("cuda")` has its device where a dtype or a tensor may stand as well.
    if param.kind is Kind.DEVICE or (param.kind is Kind.ANY and param.name == "target"):
        value = Device(value) if isinstance(value, str) else value
    if param.kind is Kind.DTYPE and isinstance(value, str):
        name = value.removeprefix("torch.")
        name = DTYPE_ALIASES.get(name, name)
        return DType(name) if name in DTYPES else value
    if param.kind is Kind.INTS and isinstance(value, list):
        value = tuple(value)
    return graph_value(value, recorder)


def _bound(part: Any, recorder: Recorder) -> Any:
    if isinstance(part, Value):
        raise RecordingError(
            "a slice with a bound that only the run knows has no known shape; index with a tensor "
            "of positions, or use torch.where on a mask",
            where=users_line(),
        )
    return graph_value(part, recorder)


def _same(value: Any, default: Any) -> bool:
    """Whether an argument says what the default says; 1, 1.0 and True are three things."""
    return type(value) is type(default) and (value is default or bool(value == default))

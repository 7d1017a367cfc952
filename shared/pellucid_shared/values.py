"""The values a node's arguments may hold, and their one JSON spelling.

Plain JSON numbers, strings, booleans, null and lists stand for themselves. Everything else is an object
with one tag: ``{"ref": 7}``, ``{"tensor": "sha256:.."}``, ``{"slice": [a, b, c]}``, ``{"ellipsis": true}``,
``{"tuple": [..]}``, ``{"dict": [[key, value], ..]}``, ``{"dtype": "bfloat16"}``, ``{"device": "cpu"}``,
``{"complex": [re, im]}``, ``{"float": "nan"}``, ``{"site": {..}}``, ``{"module": "lm_head"}``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from .errors import GraphError
from .specs import DTYPES

INT_LIMIT = 2**63
#: What a site may be: of a module, of a call inside it, or the ids a generation ends with.
RESULT = "result"
#: The output, and the arguments, of a torch function that the module itself calls; see ``inside.py``.
CALL, CALL_INPUT = INSIDE = ("call", "call_input")
KINDS = ("output", "input", RESULT, *INSIDE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DEVICE = re.compile(r"(cpu|cuda|mps|meta)(:\d{1,3})?")


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier node."""

    node: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in the request's safetensors part, named by the SHA-256 of its dtype, shape and bytes."""

    digest: str


@dataclass(frozen=True, slots=True)
class DType:
    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """Accepted and ignored: devices are the engine's business."""

    name: str


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """A module of the model, by path; the root is the empty path."""

    path: str


@dataclass(frozen=True, slots=True)
class Site:
    """Where a graph touches the model: one tensor leaf of one module's input or output.

    Attributes:
        module: module path as the card spells it; the root is "".
        kind: "output", "input", or "result": the ids of a whole generation, the root's alone; "call" and
            "call_input": the output and the arguments of a call that the module's own code makes.
        path: leaf path. Into the output structure (empty for a bare tensor), or for an input into
            ``(args, kwargs)``: ``(0, i)`` is positional argument i, ``(1, "name")`` a keyword argument.
            For a call it begins with the call's name, ``("softmax_0",)``.
        invoke: index of the invoke in its region.
        step: step of generation; 0 is the prefill. In an iter region it counts from the body's own step.
        call: which call of the module within the step.
    """

    module: str
    kind: str = "output"
    path: tuple[int | str, ...] = ()
    invoke: int = 0
    step: int = 0
    call: int = 0

    def __str__(self) -> str:
        text, path = f"{self.module or 'model'}.{self.kind}", self.path
        if self.kind in INSIDE and path:
            of = "output" if self.kind == CALL else "inputs"
            text, path = f"{self.module or 'model'}.source.{path[0]}.{of}", path[1:]
        text += "".join(f"[{p!r}]" for p in path)
        marks = [
            f"{n} {v}" for n, v in (("invoke", self.invoke), ("step", self.step), ("call", self.call)) if v
        ]
        return f"{text} ({', '.join(marks)})" if marks else text


#: What an argument may be. Slices, Ellipsis, tuples, dicts and complex are Python's own.
Value: TypeAlias = Any


def encode(value: Value) -> Any:
    """The JSON form of ``value``.

    Raises:
        GraphError: the value has no place in a graph.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _bounded_int(int(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_key(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, Ref):
        return {"ref": value.node}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, TensorRef):
        return {"tensor": value.digest}
    if isinstance(value, DType):
        return {"dtype": value.name}
    if isinstance(value, Device):
        return {"device": value.name}
    if isinstance(value, ModuleRef):
        return {"module": value.path}
    if isinstance(value, Site):
        return {"site": _encode_site(value)}
    raise GraphError(f"a value of type {type(value).__name__} cannot be part of a graph")


def decode(data: Any) -> Value:
    """The value whose JSON form is ``data``; the inverse of :func:`encode`.

    Raises:
        GraphError: unknown tag, malformed content, or a spelling that is not the canonical one.
    """
    if data is None or isinstance(data, bool | str):
        return _utf8(data) if isinstance(data, str) else data
    if isinstance(data, int):
        return _bounded_int(data)
    if isinstance(data, float):
        if not math.isfinite(data):
            _bad("a number is too large for a float")
        return data
    if isinstance(data, list):
        return [decode(v) for v in data]
    if isinstance(data, dict):
        if len(data) != 1:
            _bad(f"a tagged value has exactly one key, found {_brief(list(data))}")
        ((tag, content),) = data.items()
        decoder = _DECODERS.get(tag)
        if decoder is None:
            _bad(f"unknown tag {_brief(tag)}; known: {', '.join(_DECODERS)}")
        return decoder(content)
    return _bad(f"{type(data).__name__} is not a JSON value")


def refs(value: Value) -> Iterator[int]:
    """The node positions ``value`` refers to, in order, with repeats."""
    if isinstance(value, Ref):
        yield value.node
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, slice):
        for item in (value.start, value.stop, value.step):
            yield from refs(item)


def tensors(value: Value) -> Iterator[str]:
    """The digests of the literals in ``value``, in order, with repeats."""
    if isinstance(value, TensorRef):
        yield value.digest
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def contains(value: Value, kind: type | tuple[type, ...]) -> bool:
    """Whether a part of ``value`` is an instance of ``kind``."""
    if isinstance(value, kind):
        return True
    if isinstance(value, list | tuple):
        return any(contains(v, kind) for v in value)
    if isinstance(value, dict):
        return any(contains(v, kind) for v in value.values())
    return False


def substitute(value: Value, leaf: Callable[[Value], Any]) -> Any:
    """A copy of ``value`` with ``leaf`` applied to everything that is not a list, tuple, dict or slice."""
    if isinstance(value, list):
        return [substitute(v, leaf) for v in value]
    if isinstance(value, tuple):
        return tuple(substitute(v, leaf) for v in value)
    if isinstance(value, dict):
        return {k: substitute(v, leaf) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(v, leaf) for v in (value.start, value.stop, value.step)))
    return leaf(value)


def dumps(data: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, no NaN or infinity."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _encode_site(site: Site) -> dict[str, Any]:
    data: dict[str, Any] = {"module": _utf8(site.module)}
    if site.kind != "output":
        data["kind"] = site.kind
    if site.path:
        data["path"] = list(site.path)
    for name in ("invoke", "step", "call"):
        number = getattr(site, name)
        if number:
            data[name] = number
    return data


def _decode_site(data: Any) -> Site:
    known = {"module", "kind", "path", "invoke", "step", "call"}
    if not isinstance(data, dict) or not isinstance(data.get("module"), str):
        _bad("a site is an object with a module path")
    if unknown := set(data) - known:
        _bad(f"a site has no {_brief(sorted(unknown))}")
    kind, path = data.get("kind", "output"), data.get("path", [])
    if kind not in KINDS:
        _bad(f"a site's kind is one of {', '.join(KINDS)}, found {_brief(kind)}")
    if not isinstance(path, list) or not all(_is_count(p) or isinstance(p, str) for p in path):
        _bad(f"a site's path holds names and positions, found {_brief(path)}")
    for name in ("invoke", "step", "call"):
        if not _is_count(data.get(name, 0)):
            _bad(f"a site's {name} is a whole number from 0, found {_brief(data[name])}")
    site = Site(
        _utf8(data["module"]),
        kind,
        tuple(path),
        data.get("invoke", 0),
        data.get("step", 0),
        data.get("call", 0),
    )
    if _encode_site(site) != data:
        _bad("a site leaves out what has its default value")
    return site


def _decode_ref(data: Any) -> Ref:
    if not _is_count(data):
        _bad(f"a ref is a node's position, found {_brief(data)}")
    return Ref(data)


def _decode_tensor(data: Any) -> TensorRef:
    if not isinstance(data, str) or not _DIGEST.fullmatch(data):
        _bad(f"a tensor is named sha256:<64 hex digits>, found {_brief(data)}")
    return TensorRef(data)


def _decode_slice(data: Any) -> slice:
    if not isinstance(data, list) or len(data) != 3:
        _bad(f"a slice is [start, stop, step], found {_brief(data)}")
    parts = [decode(v) for v in data]
    if not all(p is None or (isinstance(p, int | Ref) and not isinstance(p, bool)) for p in parts):
        _bad(f"a slice holds whole numbers or null, found {_brief(data)}")
    return slice(*parts)


def _decode_ellipsis(data: Any) -> Any:
    if data is not True:
        _bad('an ellipsis is {"ellipsis": true}')
    return Ellipsis


def _decode_tuple(data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list):
        _bad(f"a tuple is a list of values, found {_brief(data)}")
    return tuple(decode(v) for v in data)


def _decode_dict(data: Any) -> dict[str, Any]:
    pairs_ok = isinstance(data, list) and all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in data
    )
    if not pairs_ok:
        _bad(f"a dict is a list of [key, value] pairs, found {_brief(data)}")
    result = {_key(k): decode(v) for k, v in data}
    if len(result) != len(data):
        _bad("a dict names a key twice")
    return result


def _decode_dtype(data: Any) -> DType:
    if not isinstance(data, str) or data not in DTYPES:
        _bad(f"unknown dtype {_brief(data)}; known: {', '.join(DTYPES)}")
    return DType(data)


def _decode_device(data: Any) -> Device:
    if not isinstance(data, str) or not _DEVICE.fullmatch(data):
        _bad(f"unknown device {_brief(data)}")
    return Device(data)


def _decode_complex(data: Any) -> complex:
    parts = [decode(v) for v in data] if isinstance(data, list) else []
    if len(parts) != 2 or not all(isinstance(p, float) for p in parts):
        _bad(f"a complex number is [real, imaginary], two floats, found {_brief(data)}")
    return complex(*parts)


def _decode_float(data: Any) -> float:
    if data not in ("nan", "inf", "-inf"):
        _bad(f'a tagged float is "nan", "inf" or "-inf", found {_brief(data)}')
    return float(data)


def _decode_module(data: Any) -> ModuleRef:
    if not isinstance(data, str):
        _bad(f"a module is a path, found {_brief(data)}")
    return ModuleRef(_utf8(data))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "ref": _decode_ref,
    "tensor": _decode_tensor,
    "slice": _decode_slice,
    "ellipsis": _decode_ellipsis,
    "tuple": _decode_tuple,
    "dict": _decode_dict,
    "dtype": _decode_dtype,
    "device": _decode_device,
    "complex": _decode_complex,
    "float": _decode_float,
    "site": _decode_site,
    "module": _decode_module,
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < INT_LIMIT


def _bounded_int(value: int) -> int:
    if not -INT_LIMIT <= value < INT_LIMIT:
        _bad("a whole number does not fit in 64 bits")
    return value


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        _bad("a string holds a lone surrogate, which UTF-8 cannot spell")
    return text


def _key(key: Any) -> str:
    if not isinstance(key, str):
        _bad(f"a dict's keys are strings, found {_brief(key)}")
    return _utf8(key)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bad(message: str) -> NoReturn:
    raise GraphError(message)

"""The intervention graph: nodes in program order, regions, and its one canonical JSON.

A node's id is its position. These op ids are the graph's own, and those of control flow (``flow.py``); every
other is in the op registry:

    site.get(site)                      read a tensor where the model makes it
    site.original(site)                 a copy of it from before this graph's edits there
    site.set(site, value)               replace it; yields nothing
    module.apply(module, *args, **kw)   call a module of the model out of order
    module.skip(site, value)            do not run the module whose output this is; yields nothing
    param.get(module, name)             a copy of a parameter or buffer
    save(value[, "name"])               send a value, or a structure of values, back; yields nothing
    list.new()                          an empty list
    list.append(list, value)            lengthen it, in program order and step by step; yields nothing
    log(site or null, *parts)           tell of values as the run comes by; yields nothing
    stop(site)                          nothing after it touches a later site; yields nothing
    grad.backward(loss[, gradient])     one backward pass, once the forward passes of its trace have ended
    grad.get(value, number)             the gradient of a value in a backward pass; passes count from 0
    grad.set(value, number, gradient)   replace it on its way to what the value was made of
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import GraphError, LimitError
from .flow import FLOW_OPS
from .regions import (
    Each,
    Generation,
    Invoke,
    Region,
    Trace,
    above,
    bad,
    decode_region,
    encode_region,
    json_object,
    traces,
)
from .values import Ref, Site, TensorRef, Value, decode, dumps, encode, refs, substitute

VERSION = 1
MAX_BYTES = 8 * 2**20
MAX_DEPTH = 64

#: A string, or the rest of the text where one is not closed: each character is looked at once.
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")

GET, SET, APPLY, SAVE = "site.get", "site.set", "module.apply", "save"
LIST, APPEND = "list.new", "list.append"
ORIGINAL, SKIP, PARAM, LOG, STOP = "site.original", "module.skip", "param.get", "log", "stop"
BACKWARD, GRAD, SET_GRAD = "grad.backward", "grad.get", "grad.set"
GRADIENT_OPS = (BACKWARD, GRAD, SET_GRAD)
CORE_OPS = frozenset(
    (GET, SET, APPLY, SAVE, LIST, APPEND, ORIGINAL, SKIP, PARAM, LOG, STOP, *GRADIENT_OPS, *FLOW_OPS)
)
#: Those whose first argument is a site, and those that yield nothing.
SITE_OPS = (GET, SET, ORIGINAL, SKIP, LOG, STOP)
VOID_OPS = (SET, SAVE, APPEND, SKIP, LOG, STOP, BACKWARD, SET_GRAD)


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. ``region`` is the index of the region it belongs to."""

    op: str
    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)
    region: int = 0

    def refs(self) -> Iterator[int]:
        """Positions of the nodes this one takes values from, in order, with repeats."""
        for value in (*self.args, *self.kwargs.values()):
            yield from refs(value)

    @property
    def site(self) -> Site:
        """The site of a node that has one."""
        site = self.at
        assert site is not None
        return site

    @property
    def at(self) -> Site | None:
        """The site a node touches or is tied to, or None."""
        first = self.args[0] if self.args else None
        return first if isinstance(first, Site) else None


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole experiment: the model's name, regions, and nodes in program order."""

    model: str
    regions: tuple[Region, ...]
    nodes: tuple[Node, ...]

    def to_json(self) -> bytes:
        """The canonical bytes: the same experiment gives the same bytes.

        Raises:
            GraphError: a value has no JSON spelling; names the node.
        """
        return dumps(
            {
                "version": VERSION,
                "model": self.model,
                "regions": [encode_region(r) for r in self.regions],
                "nodes": [_encode_node(i, n) for i, n in enumerate(self.nodes)],
            }
        )

    @staticmethod
    def from_json(data: bytes | str) -> Graph:
        """Read a graph. Structure only; ``lint`` states the invariants.

        Raises:
            GraphError: not a graph of this version; names the node where one is at fault.
            LimitError: over 8 MiB of JSON, or nested deeper than 64.
        """
        return Graph.from_object(loads(data))

    @staticmethod
    def from_object(data: Any) -> Graph:
        """Read a graph from parsed JSON; raises as :meth:`from_json`."""
        top = json_object(data, "a graph", {"version", "model", "regions", "nodes"}, set())
        if top["version"] != VERSION or isinstance(top["version"], bool):
            bad(f"graph version {top['version']!r} is not known here; this reads version {VERSION}")
        if not isinstance(top["model"], str) or not top["model"]:
            bad("a graph names its model")
        if not isinstance(top["regions"], list) or not isinstance(top["nodes"], list):
            bad("regions and nodes are lists")
        return Graph(
            decode(top["model"]),
            tuple(decode_region(r) for r in top["regions"]),
            tuple(_decode_node(i, n) for i, n in enumerate(top["nodes"])),
        )

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save_names(self) -> dict[int, str]:
        """Position of each ``save`` node -> the name its value comes back under."""
        names: dict[int, str] = {}
        for position, node in enumerate(self.nodes):
            if node.op == SAVE:
                names[position] = node.args[1] if len(node.args) > 1 else f"saved_{len(names)}"
        return names

    def literals(self) -> set[str]:
        """Digests of the tensors the nodes name, and those that modules are called with: those of the
        request's safetensors part."""
        inputs = (invoke.tensors for trace in self.traces for invoke in trace.invokes)
        found = {digest for tensors in inputs if tensors is not None for digest in tensors.digests()}

        def leaf(value: Value) -> Value:
            if isinstance(value, TensorRef):
                found.add(value.digest)
            return value

        for node in self.nodes:
            substitute([*node.args, *node.kwargs.values()], leaf)
        return found

    @property
    def traces(self) -> tuple[Trace, ...]:
        """Its forward passes and generations, in order, as they are written."""
        return tuple(trace for _, trace in traces(self.regions))

    def trace_of(self, region: int) -> int:
        """Index among the regions of the trace that a region is, or stands in; -1: it is outside all."""
        return next((r for r in above(self.regions, region) if isinstance(self.regions[r], Trace)), -1)

    def sites(self) -> dict[int, Site]:
        """Position of each node that touches a site -> that site."""
        return {i: n.site for i, n in enumerate(self.nodes) if n.at is not None}


def loads(data: bytes | str) -> Any:
    """Parse JSON within limits: size and depth before parsing, no NaN, no overflowing float, no twin keys.

    Raises:
        GraphError: not JSON, or JSON a graph may not hold.
        LimitError: over ``MAX_BYTES`` or ``MAX_DEPTH``.
    """
    if isinstance(data, bytes):
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise GraphError(f"the request is not UTF-8 (byte {error.start})") from None
    else:
        text = data
    if len(data) > MAX_BYTES:
        raise LimitError(f"the graph is {len(data)} bytes; at most {MAX_BYTES} are taken")
    if (depth := _depth(text)) > MAX_DEPTH:
        raise LimitError(f"the JSON is nested {depth} deep; at most {MAX_DEPTH} is taken")
    try:
        return json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        raise GraphError(f"the request is not JSON: {error}") from None
    except ValueError as error:  # an integer literal past Python's digit limit
        raise GraphError(f"a number is not acceptable: {error}") from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _encode_node(position: int, node: Node) -> dict[str, Any]:
    try:
        data: dict[str, Any] = {"op": node.op}
        if node.args:
            data["args"] = [encode(v) for v in node.args]
        if node.kwargs:
            data["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
        if node.region:
            data["region"] = node.region
        return data
    except GraphError as error:
        raise type(error)(error.message, node=position) from None


def _decode_node(position: int, data: Any) -> Node:
    try:
        top = json_object(data, "a node", {"op"}, {"args", "kwargs", "region"})
        op, args, kwargs = top["op"], top.get("args", []), top.get("kwargs", {})
        region = top.get("region", 0)
        if not isinstance(op, str) or not op:
            bad("a node's op is a name")
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            bad("a node's args are a list and its kwargs an object")
        if not isinstance(region, int) or isinstance(region, bool) or region < 0:
            bad(f"a node's region is a position, found {region!r}")
        if any(key in top and not top[key] for key in ("args", "kwargs", "region")):
            bad("a node leaves out what is empty")
        return Node(
            decode(op),
            tuple(decode(v) for v in args),
            {decode(k): decode(v) for k, v in kwargs.items()},
            region,
        )
    except GraphError as error:
        raise type(error)(f"node {position}: {error.message}", node=position) from None


def _no_constant(name: str) -> NoReturn:
    raise GraphError(f'{name} is not JSON; a graph spells it {{"float": "{name.lower()}"}}')


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise GraphError(f"the number {text[:40]} is too large for a float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise GraphError("an object names a key twice")
    return result


__all__ = [
    "APPEND",
    "APPLY",
    "BACKWARD",
    "CORE_OPS",
    "GET",
    "GRAD",
    "GRADIENT_OPS",
    "LIST",
    "LOG",
    "ORIGINAL",
    "PARAM",
    "SAVE",
    "SET",
    "SET_GRAD",
    "SITE_OPS",
    "SKIP",
    "STOP",
    "VOID_OPS",
    "Each",
    "Generation",
    "Graph",
    "Invoke",
    "Node",
    "Ref",
    "Site",
    "Trace",
    "loads",
]

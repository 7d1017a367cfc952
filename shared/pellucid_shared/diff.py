"""What differs between two graphs, as lines a person can read."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from itertools import zip_longest

from .graph import Graph, Invoke, Node, Trace
from .regions import encode_region
from .show import statements
from .values import Ref, Value, dumps, encode, refs, substitute


def diff(a: Graph, b: Graph) -> list[str]:
    """Lines that are in ``a`` alone, after ``-``, and in ``b`` alone, after ``+``: model, inputs, nodes.

    Nodes are matched whatever their numbers: one more line at the top does not make every later one differ.
    Empty exactly where both have the same canonical bytes.
    """
    if a.to_json() == b.to_json():
        return []
    lines = []
    if a.model != b.model:
        lines += [f"- model {a.model!r}", f"+ model {b.model!r}"]
    mine, theirs = _inputs(a), _inputs(b)
    for old, new in zip_longest(mine, theirs):
        if old != new:
            lines += [f"{sign} {line}" for sign, line in (("-", old), ("+", new)) if line is not None]
    lines += _nodes(a, b)
    return lines or [f"- {a.to_json().decode()}", f"+ {b.to_json().decode()}"]


def _inputs(graph: Graph) -> list[str]:
    """A line for each trace that is no plain one, each body for steps, and each input."""
    lines = []
    for region in graph.regions:
        data = {k: v for k, v in encode_region(region).items() if k != "invokes"}
        if len(data) > 1:
            lines.append(dumps(data).decode())
        if isinstance(region, Trace):
            lines += [f"invoke {i}: {_input(invoke)}" for i, invoke in enumerate(region.invokes)]
    return lines


def _input(invoke: Invoke) -> str:
    return f"{invoke.input!r}" + (f", mask {invoke.mask!r}" if invoke.mask is not None else "")


def _nodes(a: Graph, b: Graph) -> list[str]:
    lines, i, j = [], 0, 0
    shown_a, shown_b = statements(a), statements(b)
    for x, y in [*_matched(a, b), (len(a.nodes), len(b.nodes))]:
        alone_a, alone_b = range(i, x), range(j, y)
        if {shown_a[k] for k in alone_a} & {shown_b[k] for k in alone_b}:  # it shows in JSON alone
            lines += [f"- {_json(a, k)}" for k in alone_a] + [f"+ {_json(b, k)}" for k in alone_b]
        else:
            lines += [f"- {shown_a[k]}" for k in alone_a] + [f"+ {shown_b[k]}" for k in alone_b]
        i, j = x + 1, y + 1
    return lines


def _json(graph: Graph, position: int) -> str:
    return dumps(json.loads(graph.to_json())["nodes"][position]).decode()


def _matched(a: Graph, b: Graph) -> list[tuple[int, int]]:
    """Positions in ``a`` and ``b`` of nodes that are the same but for their numbers, in order. A node that
    was changed stands for the one it was where others refer to it."""
    keys = [_key(node) for node in a.nodes], [_key(node) for node in b.nodes]
    matched: list[tuple[int, int]] = []
    stands_for: dict[int, int] = {}
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if a2 - a1 != b2 - b1:
            continue
        for i, j in zip(range(a1, a2), range(b1, b2), strict=True):
            if tag == "equal" and [stands_for.get(n) for n in _refs(a.nodes[i])] == _refs(b.nodes[j]):
                matched.append((i, j))
            stands_for[i] = j
    return matched


def _key(node: Node) -> bytes:
    """A node without the numbers of those it refers to, which ``_refs`` gives."""

    def leaf(value: Value) -> Value:
        return Ref(0) if isinstance(value, Ref) else value

    args, kwargs = substitute(list(node.args), leaf), substitute(dict(node.kwargs), leaf)
    return dumps([node.op, encode(args), {k: encode(v) for k, v in kwargs.items()}, node.region])


def _refs(node: Node) -> list[int]:
    values = [*node.args, *(value for _, value in sorted(node.kwargs.items()))]
    return list(refs(values))

"""A graph as code a person can read: one line a node."""

from __future__ import annotations

from typing import Any

from .flow import CARRIED, CARRY, CARRY_SET, FLAG, INDEX, PICK, UNTIL, WHILE
from .graph import (
    APPEND,
    APPLY,
    BACKWARD,
    GET,
    GRAD,
    LIST,
    LOG,
    ORIGINAL,
    PARAM,
    SAVE,
    SET,
    SET_GRAD,
    SKIP,
    STOP,
    Each,
    Graph,
    Invoke,
    Node,
    Trace,
)
from .regions import GENERATION_OPTIONS, Cond, Loop, Outside, Region, above, traces
from .values import Device, DType, ModuleRef, Ref, Site, TensorRef, Value

_INFIX = {
    "torch.add": "+",
    "torch.sub": "-",
    "torch.mul": "*",
    "torch.div": "/",
    "torch.matmul": "@",
    "torch.pow": "**",
    "torch.eq": "==",
    "torch.ne": "!=",
    "torch.lt": "<",
    "torch.le": "<=",
    "torch.gt": ">",
    "torch.ge": ">=",
    "number.add": "+",
    "number.sub": "-",
    "number.mul": "*",
    "number.div": "/",
    "number.floordiv": "//",
    "number.mod": "%",
    "number.eq": "==",
    "number.ne": "!=",
    "number.lt": "<",
    "number.le": "<=",
    "number.gt": ">",
    "number.ge": ">=",
}


def show(graph: Graph) -> str:
    """The graph as text, e.g.::

    trace "gpt2":
        invoke 0: 'The Eiffel Tower is in the city of'
        v0 = transformer.h.3.output
        v1 = v0 * 2
        transformer.h.3.output = v1
        save(v0, 'saved_0')
    """
    names = graph.save_names()
    lines: list[str] = []
    opened: set[int] = set()  # traces whose head is written
    before: list[int] = []
    for position, node in enumerate(graph.nodes):
        path = _path(graph, node.region)
        for depth, region in enumerate(path):
            if isinstance(graph.regions[region], Trace):
                lines += _heads(graph, region, opened, depth)
            elif path[: depth + 1] != before[: depth + 1]:
                lines.append("    " * depth + _body(graph.regions[region]))
        before = path
        lines.append("    " * len(path) + _statement(position, node, names))
    lines += _heads(graph, len(graph.regions), opened, 0)
    return "\n".join(lines) + "\n"


def _path(graph: Graph, region: int) -> list[int]:
    """The regions around a node, from outside to inside, that are shown."""
    found = [r for r in above(graph.regions, region) if not isinstance(graph.regions[r], Outside)]
    return found[::-1]


def _heads(graph: Graph, until: int, opened: set[int], depth: int) -> list[str]:
    """The heads of the traces up to a region that have none yet."""
    new = [i for i, _ in traces(graph.regions) if i <= until and i not in opened]
    opened.update(new)
    return ["    " * depth + line for i in new for line in _head(graph, graph.regions[i])]


def _body(region: Region) -> str:
    if isinstance(region, Each):
        return f"for each step of {_steps(region)}:"
    if isinstance(region, Loop):
        return f"for each of {'at most ' if region.bounded else ''}{region.count} turns:"
    assert isinstance(region, Cond)
    if region.flag is None:
        return "else:"
    return f"{'if' if region.after is None else 'elif'} v{region.flag}:"


def _head(graph: Graph, trace: Region) -> list[str]:
    assert isinstance(trace, Trace)
    if trace.generation is None:
        what = "trace"
    else:
        given = {f: getattr(trace.generation, f) for f in GENERATION_OPTIONS}
        options = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        what = f"generate({options})"
    seed = f", seed {trace.seed}" if trace.seed else ""
    return [
        f'{what} "{graph.model}"{seed}:',
        *(f"    invoke {i}: {_invoke(v)}" for i, v in enumerate(trace.invokes)),
    ]


def _steps(each: Each) -> str:
    if isinstance(each.steps, slice):
        return _slice(each.steps)
    return f"{each.steps}{' if it runs' if each.optional else ''}"


def statements(graph: Graph) -> list[str]:
    """The line of each node."""
    names = graph.save_names()
    return [_statement(i, n, names) for i, n in enumerate(graph.nodes)]


def tensor_name(digest: str) -> str:
    """A tensor of the request's safetensors part as a graph's lines name it."""
    return f"tensor<{digest.removeprefix('sha256:')[:8]}>"


def _invoke(invoke: Invoke) -> str:
    if invoke.tensors is not None:
        given = [_text(v) for v in invoke.tensors.args]
        return ", ".join(given + [f"{k}={_text(v)}" for k, v in invoke.tensors.kwargs.items()])
    text = repr(invoke.input)
    text = text if len(text) <= 90 else text[:87] + "..."
    return text if invoke.mask is None else f"{text} (masked)"


def _statement(position: int, node: Node, names: dict[int, str]) -> str:
    if node.op == GET:
        return f"v{position} = {node.site}"
    if node.op == SET:
        return f"{node.site} = {_text(node.args[1])}"
    if node.op == SAVE:
        return f"save({_text(node.args[0])}, {names[position]!r})"
    if node.op == LIST:
        return f"v{position} = []"
    if node.op == ORIGINAL:
        return f"v{position} = original({node.site})"
    if node.op == PARAM:
        return f"v{position} = {f'{node.args[0].path}.{node.args[1]}'.removeprefix('.')}"
    if node.op == SKIP:
        return f"skip({node.site}, {_text(node.args[1])})"
    if node.op in (LOG, STOP):
        given = [*map(_text, node.args[1:]), *(f"{k}={v!r}" for k, v in node.kwargs.items())]
        return f"{node.op}({', '.join(given)}){_place(node)}"
    if node.op == APPEND:
        return f"{_text(node.args[0])}.append({_text(node.args[1])})"
    if node.op == BACKWARD:
        return f"{_text(node.args[0])}.backward({', '.join(map(_text, node.args[1:]))})"
    if node.op == GRAD:
        return f"v{position} = {_text(node.args[0])}.grad  # backward {node.args[1]}"
    if node.op == SET_GRAD:
        return f"{_text(node.args[0])}.grad = {_text(node.args[2])}  # backward {node.args[1]}"
    if node.op in (WHILE, UNTIL):
        return f"end the loop {'unless' if node.op == WHILE else 'if'} {_text(node.args[0])}"
    if node.op == CARRY:
        return f"v{position} = carry({_text(node.args[0])}) before the first turn"
    if node.op == CARRY_SET:
        return f"{_text(node.args[0])}.value = {_text(node.args[1])}"
    if node.op == "setitem" and len(node.args) == 3:
        base, index, value = node.args
        return f"{_text(base)}[{_index(index)}] = {_text(value)}; v{position} = {_text(base)}"
    return f"v{position} = {_expression(node)}"


def _place(node: Node) -> str:
    """Which invoke and step a node stands in, where that is not the first."""
    return "" if node.at is None else str(node.at).removeprefix("model.input")


def _expression(node: Node) -> str:
    if node.op == INDEX:
        return "the turn"
    if node.op == PICK:
        return f"{_text(node.args[0])}[{_text(node.args[1])}]"
    if node.op == FLAG:
        return f"flag({_text(node.args[0])})"
    if node.op == CARRIED:
        return f"{_text(node.args[0])}.value"
    if node.op == "getitem" and len(node.args) == 2:
        return f"{_text(node.args[0])}[{_index(node.args[1])}]"
    if node.op in _INFIX and len(node.args) == 2 and not node.kwargs:
        return f"{_text(node.args[0])} {_INFIX[node.op]} {_text(node.args[1])}"
    args, name = list(node.args), node.op
    if node.op == APPLY:
        name = _text(args.pop(0))
    elif node.op.startswith("tensor.") and args:
        name = f"{_text(args.pop(0))}.{node.op.removeprefix('tensor.')}"
    parts = [_text(v) for v in args] + [f"{k}={_text(v)}" for k, v in sorted(node.kwargs.items())]
    return f"{name}({', '.join(parts)})"


def _text(value: Value) -> str:
    if isinstance(value, Ref):
        return f"v{value.node}"
    if isinstance(value, TensorRef):
        return tensor_name(value.digest)
    if isinstance(value, DType):
        return f"torch.{value.name}"
    if isinstance(value, Device):
        return repr(value.name)
    if isinstance(value, ModuleRef | Site):
        return (value.path or "model") if isinstance(value, ModuleRef) else str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    return "..." if value is Ellipsis else repr(value)


def _index(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_slice(p) if isinstance(p, slice) else _text(p) for p in parts) or "()"


def _slice(index: slice) -> str:
    start, stop, step = ("" if v is None else _text(v) for v in (index.start, index.stop, index.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")

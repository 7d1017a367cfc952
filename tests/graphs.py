"""Graphs written node by node, for tests that go below the client."""

from __future__ import annotations

from typing import Any

from pellucid_shared.graph import APPLY, GET, SAVE, SET, Graph, Invoke, Node, Trace
from pellucid_shared.values import ModuleRef, Ref, Site
from pellucid_shared.wire import TokenizedInvoke
from pellucid_worker.engine import Engine


class Program:
    """Nodes in program order; each verb adds one and gives its value."""

    def __init__(self, model: str = "m") -> None:
        self.model = model
        self.nodes: list[Node] = []

    def op(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        self.nodes.append(Node(name, args, kwargs))
        return Ref(len(self.nodes) - 1)

    def get(
        self, module: str, kind: str = "output", path: tuple[int | str, ...] = (), invoke: int = 0
    ) -> Ref:
        return self.op(GET, Site(module, kind, path, invoke))

    def set(
        self,
        module: str,
        value: Any,
        kind: str = "output",
        path: tuple[int | str, ...] = (),
        invoke: int = 0,
    ) -> None:
        self.op(SET, Site(module, kind, path, invoke), value)

    def apply(self, module: str, *args: Any, **kwargs: Any) -> Ref:
        return self.op(APPLY, ModuleRef(module), *args, **kwargs)

    def fill(self, target: Ref, value: Any, index: Any = ...) -> Ref:
        """``target[index] = value``."""
        return self.op("setitem", target, index, value)

    def save(self, value: Any, name: str) -> None:
        self.op(SAVE, value, name)

    def graph(self, invokes: int = 1, seed: int = 0) -> Graph:
        return Graph(self.model, (Trace((Invoke([1]),) * invokes, seed=seed),), tuple(self.nodes))


def run(engine: Engine, program: Program, *inputs: list[list[int]], **more: Any) -> dict[str, Any]:
    """Run a program on rows of ids, one batch for each invoke; ``tensors`` are its literals by digest."""
    tensors, seed = more.pop("tensors", {}), more.pop("seed", 0)
    invokes = [TokenizedInvoke(ids=ids) for ids in inputs]
    return engine.run(program.graph(len(inputs), seed), invokes, tensors, **more)

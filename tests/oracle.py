"""What a program means, by an interpreter over plain PyTorch hooks that shares nothing with the engine.

Every invoke has a real forward pass of its own, in a thread; at each touched module all of them meet, and the
program's nodes that can run by then run, in program order, on plain tensors. Aliasing is PyTorch's own: two
values are one storage where torch says so. A node that the program places before an edit, and that runs after
it, reads the storage as it was: the interpreter keeps a copy of every storage from before each edit.

A first run, which gives every site the very tensor written to it, finds out which values share storage and
when edits run; the second one uses that: a node waits for
edits that stand before it, and the model keeps a copy of what it was given where only the name's is edited
later.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pellucid_shared.graph import APPLY, GET, SAVE, SET, Node
from pellucid_shared.values import Ref, Site, TensorRef, substitute

_EDITS = {
    "tensor.neg_": lambda x: x.neg_(),
    "tensor.tanh_": lambda x: x.tanh_(),
    "tensor.zero_": lambda x: x.zero_(),
    "tensor.mul_": lambda x, y: x.mul_(y),
    "tensor.add_": lambda x, y: x.add_(y),
    "tensor.sub_": lambda x, y: x.sub_(y),
    "tensor.copy_": lambda x, y: x.copy_(y),
    "setitem": lambda x, index, y: x.__setitem__(index, y),
}
_CALLS = {
    "getitem": lambda x, index: x[index],
    "tensor.view": lambda x, shape: x.view(shape),
    "torch.reshape": lambda x, shape: x.reshape(shape),
    "tensor.expand_as": lambda x, y: x.expand_as(y),
    "tensor.view_as": lambda x, y: x.view_as(y),
    "torch.transpose": torch.transpose,
    "torch.unsqueeze": torch.unsqueeze,
    "torch.detach": torch.detach,
    "torch.add": lambda x, y: x + y,
    "torch.sub": lambda x, y: x - y,
    "torch.mul": lambda x, y: x * y,
    "torch.maximum": torch.maximum,
    "torch.neg": lambda x: -x,
    "torch.tanh": torch.tanh,
    "torch.clone": lambda x: x.clone(),
    "torch.mean": torch.mean,
    "torch.sum": torch.sum,
    "torch.cat": torch.cat,
    "torch.zeros": torch.zeros,
    "torch.ones": torch.ones,
    "torch.zeros_like": torch.zeros_like,
    "torch.ones_like": torch.ones_like,
}

Key = tuple[str, str, int]


class TooLateError(Exception):
    """A write that the model has no use for any more."""


def meaning(
    model: torch.nn.Module, nodes: Sequence[Node], prompts: Sequence[Any], literals: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What a program saves, by name."""
    facts = _Run(model, nodes, prompts, literals, None).go()
    return _Run(model, nodes, prompts, literals, facts).go().saved


@dataclass
class Facts:
    """What a run found.

    Attributes:
        storage: node -> the storage of its value, and the tensor, which keeps it from being used again.
        moment: node -> (number of the event, number in the run) at which it ran.
    """

    storage: dict[int, int] = field(default_factory=dict)
    moment: dict[int, tuple[int, int]] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        model: torch.nn.Module,
        nodes: Sequence[Node],
        prompts: Sequence[Any],
        literals: dict[str, torch.Tensor],
        facts: Facts | None,
    ) -> None:
        self.model, self.nodes, self.prompts, self.literals = model, nodes, prompts, literals
        self.known, self.found = facts, Facts()
        self.values: dict[int, Any] = {}
        self.born: dict[int, int] = {}
        self.before: dict[int, list[tuple[int, int, torch.Tensor]]] = {}  # storage -> (number, edit, copy)
        self.event = self.number = 0
        self.muted = False
        self.held: list[Any] = [None] * len(prompts)
        self.here = threading.local()
        self.calls: dict[tuple[int, str, str], int] = {}
        self.failure: BaseException | None = None

    def go(self) -> Facts:
        with torch.no_grad():
            self._carry_out(None)
            if len(self.prompts) == 1:
                self.here.invoke = 0
                with self._hooked(self._carry_out):
                    self._forward(0)
            else:
                self._forward_all()
            saves = [(i, n) for i, n in enumerate(self.nodes) if n.op == SAVE]
            for _, node in saves:
                self.found.saved[node.args[1]] = self._filled(node.args[0], None)
        return self.found

    # --- passes --------------------------------------------------------------------------------------------

    def _forward_all(self) -> None:
        keys: list[Key] = []
        barrier = threading.Barrier(len(self.prompts), action=lambda: self._guarded(keys[0]))

        def meet(key: Key) -> None:
            keys[:] = [key]
            barrier.wait(60)

        def body(invoke: int) -> None:
            self.here.invoke = invoke
            try:
                with torch.no_grad():
                    self._forward(invoke)
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                self.failure = self.failure or error
                barrier.abort()

        threads = [threading.Thread(target=body, args=(i,)) for i in range(len(self.prompts))]
        with self._hooked(meet):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure

    def _guarded(self, key: Key) -> None:
        try:
            with torch.no_grad():
                self._carry_out(key)
        except BaseException as error:
            self.failure = error
            raise

    def _forward(self, invoke: int) -> None:
        self.model(input_ids=torch.tensor(self.prompts[invoke]), use_cache=False)

    @contextlib.contextmanager
    def _hooked(self, meet: Callable[[Key], None]) -> Iterator[None]:
        """Within this context every pass calls ``meet`` at each touched call of a module."""
        touched = {(s.module, s.kind, s.call) for s in self._sites()}
        handles = []

        def hook(path: str, kind: str) -> Any:
            def at(_: Any, args: Any, more: Any) -> Any:
                if self.muted:
                    return None
                invoke, calls = self.here.invoke, self.calls
                number = calls[invoke, path, kind] = calls.get((invoke, path, kind), -1) + 1
                if (path, kind, number) not in touched:
                    return None
                self.held[invoke] = (args, more) if kind == "input" else more
                meet((path, kind, number))
                return self.held[invoke]

            return at

        for path, kind in sorted({key[:2] for key in touched}):
            module = self.model.get_submodule(path)
            if kind == "input":
                handles.append(module.register_forward_pre_hook(hook(path, kind), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook(path, kind)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _sites(self) -> list[Site]:
        return [n.site for n in self.nodes if n.op in (GET, SET)]

    # --- nodes ---------------------------------------------------------------------------------------------

    def _carry_out(self, key: Key | None) -> None:
        """Run, in program order, what can run by now."""
        self.event += 1
        given: dict[tuple[int, Any], int] = {}  # what the model is to keep a copy of
        for position, node in enumerate(self.nodes):
            if position in self.found.moment or node.op == SAVE:
                continue
            here = node.op in (GET, SET) and key == (node.site.module, node.site.kind, node.site.call)
            if node.op in (GET, SET) and not here:
                continue
            if node.op != GET and not self._ready(position):
                if node.op == SET:
                    raise TooLateError(position)
                continue
            self.number += 1
            self.found.moment[position] = (self.event, self.number)
            if node.op == GET:
                self._name(position, _at(self.held[node.site.invoke], node.site.path), self.number)
            elif node.op == SET:
                self._write(position, node)
                given[node.site.invoke, node.site.path] = position
            elif node.op in _EDITS:
                self._edit(position, node)
            else:
                self._compute(position, node)
        for (invoke, path), position in given.items():
            if self._parted(position):
                self.held[invoke] = _with(self.held[invoke], path, _at(self.held[invoke], path).clone())

    def _ready(self, position: int) -> bool:
        """Whether all that a node takes is there, edits that stand before it included."""
        refs = list(self.nodes[position].refs())
        if not all(ref in self.values for ref in refs):
            return False
        if self.known is None:
            return True
        storage = self.known.storage
        mine = {storage[ref] for ref in refs if ref in storage}
        return not any(
            edit < position and edit not in self.found.moment and storage.get(edit) in mine
            for edit, node in enumerate(self.nodes)
            if node.op in _EDITS
        )

    def _name(self, position: int, tensor: torch.Tensor, born: int) -> None:
        self.values[position], self.born[position] = tensor, born
        self.found.storage[position] = _storage(tensor)
        self.found.kept.append(tensor)

    def _compute(self, position: int, node: Node) -> None:
        if node.op == APPLY:
            path = node.args[0].path

            def call(*args: Any, **kwargs: Any) -> Any:
                self.muted = True
                try:
                    return self.model.get_submodule(path)(*args, **kwargs)
                finally:
                    self.muted = False

            args = node.args[1:]
        else:
            call, args = _CALLS[node.op], node.args
        live = call(*self._filled(args, None), **self._filled(dict(node.kwargs), None))
        for ref in node.refs():
            if _storage(self.values[ref]) == _storage(live):
                self._name(position, live, self.born[ref])  # a view: it goes with what it is a view of
                return
        older = call(*self._filled(args, position), **self._filled(dict(node.kwargs), position))
        self._name(position, older, self.number)

    def _edit(self, position: int, node: Node) -> None:
        target = self.values[node.args[0].node]
        others = self._filled(node.args[1:], position)
        whole = target.new_empty(0).set_(target.untyped_storage())
        key = _storage(target)
        self.before.setdefault(key, []).append((self.number, position, whole.clone()))
        _EDITS[node.op](target, *others)
        self._name(position, target, self.born[node.args[0].node])

    def _write(self, position: int, node: Node) -> None:
        held, site = self.held[node.site.invoke], node.site
        present, value = _at(held, site.path), self._filled(node.args[1], position if self.known else None)
        if not isinstance(value, torch.Tensor):
            value = torch.full_like(present, value)
        assert value.shape == present.shape
        self.held[site.invoke] = _with(held, site.path, value)
        self.found.storage[position] = _storage(value)
        self.found.kept.append(value)

    def _parted(self, position: int) -> bool:
        """Whether what was written is edited later, and not by way of what the model shows there."""
        if self.known is None:
            return False
        known, storage = self.known, self.found.storage[position]
        for edit, node in enumerate(self.nodes):
            later = edit in known.moment and known.moment[edit][0] > self.event
            if later and node.op in _EDITS and known.storage[edit] == known.storage[position]:
                root = edit
                while self.nodes[root].op not in (GET, SET):
                    refs = [r for r in self.nodes[root].refs() if known.storage[r] == known.storage[edit]]
                    if not refs:
                        break
                    root = refs[0]
                shown = self.nodes[root].op == GET and known.moment[root] > known.moment[position]
                if not shown:
                    return storage is not None
        return False

    def _filled(self, value: Any, reader: int | None) -> Any:
        """A value with tensors in it: as they are, or as of a node's place in the program."""

        def leaf(part: Any) -> Any:
            if isinstance(part, TensorRef):
                return self.literals[part.digest].clone()
            if not isinstance(part, Ref):
                return part
            tensor = self.values[part.node]
            if reader is not None:
                for number, edit, copy in self.before.get(_storage(tensor), []):
                    if number > self.born[part.node] and edit > reader:
                        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            return tensor

        return substitute(value, leaf)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _at(value: Any, path: Sequence[Any]) -> Any:
    for step in path:
        value = value[step]
    return value


def _with(value: Any, path: Sequence[Any], new: Any) -> Any:
    if not path:
        return new
    inner = _with(value[path[0]], path[1:], new)
    if isinstance(value, tuple):
        return (*value[: path[0]], inner, *value[path[0] + 1 :])
    value = value.copy()
    value[path[0]] = inner
    return value

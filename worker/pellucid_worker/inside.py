"""The torch functions that a module itself calls, seen and changed while it runs: ``module.source``.

A thread-local ``TorchFunctionMode`` is on while a watched module runs, and hooks tell it which module that is
just now; no source is read or rewritten.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import cache_utils

from pellucid_shared.errors import SiteError
from pellucid_shared.values import CALL, CALL_INPUT, INSIDE

from .plan import Event

#: Operators that have a spelling for the operand on the right.
_REFLECTED = frozenset(("radd", "rsub", "rmul", "rdiv", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"))


class Frame:
    """A module that is running.

    Attributes:
        module: its path.
        number: which of its calls in the pass this is.
        children: how many calls of its children have ended.
        counts: how often it has called each function.
        done: how many of its calls gave a tensor.
    """

    __slots__ = ("children", "counts", "done", "module", "number")

    def __init__(self, module: str, number: int) -> None:
        self.module, self.number, self.children, self.done = module, number, 0, 0
        self.counts: Counter[str] = Counter()


class Watch(TorchFunctionMode):
    """Sees the calls of some modules and none of those inside their children.

    Within its context (``watching``) each call of a watched module's own goes through ``called``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: list[Frame | None] = []  # None: a child, or code that is not the model's
        self._numbers: Counter[str] = Counter()

    def called(self, frame: Frame, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Carry out a call of a module's own; what it gives the module."""
        raise NotImplementedError

    def entered(self, frame: Frame, args: Any, kwargs: Any) -> None:
        """A watched module was called."""

    def left(self, frame: Frame, output: Any) -> None:
        """A watched module has returned."""

    def ignores(self) -> bool:
        """Whether modules are called now that are not part of the pass."""
        return False

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module, paths: Iterable[str]) -> Iterator[None]:
        """Within this context passes of the model are watched at these modules."""
        watched = {id(model.get_submodule(path)): path for path in paths}
        around = {id(m): m for path in watched.values() for m in model.get_submodule(path).modules()}
        handles: list[Any] = []
        for key, module in around.items():
            before, after = self._hooks(watched.get(key))
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._running:  # the pass was ended inside
                self._running.clear()
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is called within this context is not the module's doing."""
        self._running.append(None)
        try:
            yield
        finally:
            if self._running:
                self._running.pop()

    def _hooks(self, path: str | None) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_: Any, args: Any, kwargs: Any) -> None:
            if self.ignores():
                return
            frame = None
            if path is not None:
                frame = Frame(path, self._numbers[path])
                self._numbers[path] += 1
            if not self._running:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._running.append(frame)
            if frame is not None:
                with self.aside():
                    self.entered(frame, args, kwargs)

        def after(_: Any, args: Any, output: Any) -> None:
            if self.ignores():
                return
            frame = self._running[-1]
            if frame is not None:
                with self.aside():
                    self.left(frame, output)
            self._running.pop()
            if not self._running:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            elif (parent := self._running[-1]) is not None:
                parent.children += 1

        return before, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame, kwargs = self._running[-1] if self._running else None, kwargs or {}
        function = _function_name(func) if frame is not None else None
        if frame is None or function is None or _in_a_cache():
            return func(*args, **kwargs)
        ordinal = frame.counts[function]
        frame.counts[function] += 1
        return self.called(frame, f"{function}_{ordinal}", func, args, kwargs)


class Inside(Watch):
    """Carries out the events of a pass that are calls inside modules.

    Args:
        at: carries out an event on a value; the new value, or None where it stays.
        origin: node of the flat graph -> node of the user's, for errors.
        muted: whether the run calls a module of its own now.
    """

    def __init__(
        self,
        events: Sequence[Event],
        at: Callable[[Event, Any], Any],
        origin: Sequence[int],
        muted: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._at, self._origin, self.ignores = at, origin, muted  # type: ignore[method-assign]
        self._events: dict[tuple[str, int], dict[tuple[str, str], Event]] = {}
        for event in events:
            if event.kind in INSIDE:
                own = self._events.setdefault((event.module, event.call), {})
                own[event.kind, event.name] = event

    @property
    def paths(self) -> set[str]:
        """The modules that are touched."""
        return {module for module, _ in self._events}

    def called(self, frame: Frame, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        own = self._events.get((frame.module, frame.number))
        if own is None:
            return call(*args, **kwargs)
        event = own.get((CALL_INPUT, name))
        new = self._at(event, {name: (args, kwargs)}) if event is not None else None
        if new is not None:
            args, kwargs = new[name]
        result = call(*args, **kwargs)
        if holds_tensor(result):
            self._require_known(frame, name, next(iter(own.values())))
        event = own.get((CALL, name))
        new = self._at(event, {name: result}) if event is not None else None
        return result if new is None else new[name]

    def _require_known(self, frame: Frame, name: str, event: Event) -> None:
        """Raise SiteError where the module calls something else than it did when the card was made."""
        known = event.names[frame.done] if frame.done < len(event.names) else "nothing"
        frame.done += 1
        if known != name:
            raise SiteError(
                f"{frame.module or 'the model'} calls {name} on this input where it called {known} when the "
                "model was probed, so its calls cannot be told by name; read its .input and .output instead",
                node=self._origin[event.instructions[0].node],
            )


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor of the model's or holds one."""
    if isinstance(value, torch.Tensor):
        return not torch._C._functorch.is_functorch_wrapped_tensor(value)  # of a row, inside torch.vmap
    if isinstance(value, list | tuple):
        return any(map(holds_tensor, value))
    return isinstance(value, Mapping) and any(map(holds_tensor, value.values()))


@contextlib.contextmanager
def eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model's attention is written out in torch functions, in its own file."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    own = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in own:
            config._attn_implementation = name


def _in_a_cache() -> bool:
    """Whether the torch function that is looked at was called by a cache of keys and values: what that calls
    is not the module's own, and differs from step to step."""
    caller: FrameType | None = sys._getframe(2)
    while caller is not None and caller.f_globals.get("__name__", "").partition(".")[0] == "torch":
        caller = caller.f_back
    return caller is not None and caller.f_code.co_filename == cache_utils.__file__


def _function_name(func: Any) -> str | None:
    """What a torch function is called in ``source``; None for the attributes of tensors."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return None
    if name.startswith("__"):
        name = name.strip("_")
        name = name[1:] if name in _REFLECTED else name
    name = name.lstrip("_")
    return name if name.isidentifier() else None

"""Every module's output at once: ``tracer.cache()`` and ``invoker.save_all()``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pellucid_shared.card import Structure, TensorLeaf, leaves
from pellucid_shared.errors import InputError, SiteError, UnknownModuleError, ValueNotReadyError

from . import _sites
from ._lines import users_line
from ._recorder import Recorder
from ._save import save

if TYPE_CHECKING:
    from ._names import Names
    from ._tree import Module


class Entry:
    """What a cache has of one module, and the way to those below it.

    Attributes:
        output: what the module returned: a tensor, or a structure with None for what is no tensor.
        input: its first argument; cached with ``include_inputs=True``.
        inputs: its arguments, ``(args, kwargs)``; likewise.
    """

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self._path = cache, path

    @property
    def output(self) -> Any:
        return self._cache._part(self._path, "output")

    @property
    def input(self) -> Any:
        inputs = self._cache._part(self._path, "inputs")
        for step in self._cache._first[self._path]:
            inputs = inputs[step]
        return inputs

    @property
    def inputs(self) -> Any:
        return self._cache._part(self._path, "inputs")

    def __getattr__(self, name: str) -> Entry:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._cache._below(self._path, name)

    def __getitem__(self, key: int | str) -> Entry:
        return self._cache._below(self._path, str(key))

    def __repr__(self) -> str:
        return f"<cached {self._path or 'model'}: {', '.join(self._cache._kinds(self._path)) or 'nothing'}>"


class Cache(Mapping[str, Entry]):
    """Outputs, and inputs if asked for, by the path of their module; the root is the empty path.

    It is a mapping from path to :class:`Entry`, and can be walked as the model is.
    """

    def __init__(self, recorder: Recorder, paths: list[str], include_inputs: bool) -> None:
        self._recorder, self._paths, self._include_inputs = recorder, paths, include_inputs
        self._saved: dict[str, dict[str, Any]] | None = None
        self._first = {p: _sites.first_input(recorder, p).path for p in (paths if include_inputs else ())}

    def read(self) -> None:
        """Read and save everything: the body has ended."""
        found = {path: {"output": _whole(self._recorder, path, "output")} for path in self._paths}
        if self._include_inputs:
            for path, parts in found.items():
                parts["inputs"] = _whole(self._recorder, path, "input")
        self._saved = save(found) if found else {}

    def __getitem__(self, path: str) -> Entry:
        found = self._names.resolve(path, self._recorder.card) if path else ""
        if found is None or found not in self._ready:
            raise UnknownModuleError(
                f"nothing is cached of {path!r}; cached are {_listed(self._ready)}", where=users_line()
            )
        return Entry(self, found)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(Entry(self, ""), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._names.resolve(path, self._recorder.card) in self._ready

    def __repr__(self) -> str:
        return f"<cache of {len(self._paths)} modules: {_listed(self._paths)}>"

    @property
    def _names(self) -> Names:
        names: Names = self._recorder.owner._names()  # type: ignore[attr-defined]
        return names

    @property
    def _ready(self) -> dict[str, dict[str, Any]]:
        if self._saved is None:
            raise ValueNotReadyError(
                "a cache is filled when the body it was asked for in ends; look into it after the block",
                where=users_line(),
            )
        return self._saved

    def _below(self, path: str, name: str) -> Entry:
        found = self._names.child(path, name, self._recorder.card)
        if found is None:
            raise UnknownModuleError(
                f"{self._recorder.model} has no module {name!r} below {path or 'the model'}",
                where=users_line(),
            )
        return Entry(self, found)

    def _kinds(self, path: str) -> list[str]:
        return list(self._ready.get(path, ()))

    def _part(self, path: str, kind: str) -> Any:
        parts = self._ready.get(path)
        if parts is None or kind not in parts:
            why = (
                "they are cached with include_inputs=True" if parts else f"cached are {_listed(self._ready)}"
            )
            raise SiteError(f"no {kind} of {path or 'the model'} is cached: {why}", where=users_line())
        return parts[kind]


def called(recorder: Recorder, modules: Iterable[Module | str] | Module | str | None = None) -> list[str]:
    """The paths of the modules that are called and give a tensor, in the order of the tree.

    Args:
        modules: only these.

    Raises:
        SiteError: one of these is never called.
        UnknownModuleError: one of these does not exist.
    """
    from ._tree import Module

    card = recorder.card
    known = [m.path for m in card.modules if (m.path, 0) in card.call_index]
    if modules is None:
        return [path for path in known if _has_tensor(card.call_index[path, 0].output)]
    given = [modules] if isinstance(modules, str | Module) else list(modules)
    wanted: dict[str, None] = {}
    for module in given:
        if not isinstance(module, str | Module):
            raise InputError(
                f"modules are given as modules or their paths, found {module!r:.60}", where=users_line()
            )
        path = module.path if isinstance(module, Module) else _resolved(recorder, module)
        if path not in known:
            raise SiteError(
                f"{path or 'the model'} is never called, so there is nothing to cache", where=users_line()
            )
        wanted[path] = None
    return list(wanted)


def outputs(recorder: Recorder) -> Any:
    """Read and save the output of every module that is called, by path."""
    from ._tree import Module

    model: Any = recorder.owner
    return save({path: _sites.whole(Module(model, path).output) for path in called(recorder)})


def _resolved(recorder: Recorder, path: str) -> str:
    names: Names = recorder.owner._names()  # type: ignore[attr-defined]
    found = names.resolve(path, recorder.card) if path else ""
    if found is None:
        raise UnknownModuleError(f"{recorder.model} has no module {path!r}", where=users_line())
    return found


def _whole(recorder: Recorder, path: str, kind: str) -> Any:
    return _sites.whole(_sites.read(recorder, path, kind))


def _has_tensor(structure: Structure) -> bool:
    return any(isinstance(leaf, TensorLeaf) and leaf.shape is not None for _, leaf in leaves(structure))


def _listed(paths: Iterable[str]) -> str:
    names = [path or "the model" for path in paths]
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "") if names else "nothing"

"""``module.source``: the calls a module makes itself, by name, each with its output and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pellucid_shared.card import InsideCall
from pellucid_shared.errors import PellucidError, RecordingError
from pellucid_shared.inside import calls_of
from pellucid_shared.values import CALL, CALL_INPUT, Site

from . import _sites
from ._lines import users_line
from ._recorder import recording

if TYPE_CHECKING:
    from ._tree import Module


class Source:
    """The calls inside one module: ``model.layers[3].source.add_0``.

    A call is named ``<function>_<ordinal>``; the ordinal counts that function's calls within one call of the
    module, from 0. What a child module calls is the child's. Those of attention are the calls it makes when
    it is written out (eager attention), and a trace that touches them runs so.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        if not module._card().bodies:  # a model in this process that is not loaded yet
            module._model._load()

    def __getattr__(self, name: str) -> SourceCall:
        if name.startswith("_"):
            raise AttributeError(name)
        card, site = self._module._card(), self._site(name)
        call = card.call_at(site)
        if call is None:
            where = self._module.path or "the model"
            raise _sites.NoFieldError(f"{where} is never called, so it calls nothing", where=users_line())
        try:
            card.insides.require(call, site)
        except PellucidError as error:
            raise _sites.NoFieldError(error.message, where=users_line()) from None
        return SourceCall(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        where = f"{self._module.path or 'model'}.source.{name}"
        raise RecordingError(
            f"{where} cannot be assigned: {where}.output and {where}.input can", where=users_line()
        )

    def __iter__(self) -> Iterator[str]:
        return (call.name for call in self._calls())

    def __len__(self) -> int:
        return len(self._calls())

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        return "\n  ".join([f"{self._module.path or 'model'}.source:", *map(_show, self._calls())])

    def _site(self, name: str) -> Site:
        """The site of a call as the card knows it: in a trace, in the step that is being written."""
        path, step = self._module.path, 0
        if recording():
            step = self._module._recorder().phase_of(path)
        return Site(path, CALL, (name,), step=step)

    def _calls(self) -> list[InsideCall]:
        return list(calls_of(self._module._card(), self._module.path, self._site("").step))


class SourceCall:
    """One call inside a module. Its values are sites, read and written as those of modules are."""

    def __init__(self, module: Module, name: str) -> None:
        self._module, self._name = module, name

    @property
    def output(self) -> Any:
        """What the call gave: a tensor, or a structure of tensors. Assign to replace it.

        Raises:
            SiteError: it is no tensor, or one of a shape that follows no rule.
            RecordingError: outside a trace.
        """
        return _sites.read(self._module._recorder(), self._module.path, CALL, (self._name,))

    @output.setter
    def output(self, value: Any) -> None:
        _sites.replace(self._module._recorder(), self._module.path, CALL, value, (self._name,))

    @property
    def input(self) -> Any:
        """The first tensor among the arguments. Assign to replace it."""
        recorder = self._module._recorder()
        return _sites.read_input(recorder, self._module.path, CALL_INPUT, (self._name,))

    @input.setter
    def input(self, value: Any) -> None:
        recorder = self._module._recorder()
        _sites.replace_input(recorder, self._module.path, value, CALL_INPUT, (self._name,))

    @property
    def inputs(self) -> Any:
        """All arguments, ``(args, kwargs)``. Assign to replace them."""
        return _sites.read(self._module._recorder(), self._module.path, CALL_INPUT, (self._name,))

    @inputs.setter
    def inputs(self, value: Any) -> None:
        _sites.replace(self._module._recorder(), self._module.path, CALL_INPUT, value, (self._name,))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("output", "input", "inputs") or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        raise RecordingError(
            f"{self!r} has no {name!r}: its .output, .input and .inputs can be assigned", where=users_line()
        )

    def __repr__(self) -> str:
        return f"{self._module.path or 'model'}.source.{self._name}"


def _show(call: InsideCall) -> str:
    """One line of a listing: ``softmax_0([batch, 4, tokens, tokens] float32, dim=-1) -> [...] float32``."""
    given = [_sites.show_structure(arg) for arg in call.args]
    given += [f"{name}={_sites.show_structure(arg)}" for name, arg in call.kwargs.items() if name[0] != "_"]
    return f"{call.name}({', '.join(given)}) -> {_sites.show_structure(call.output)}"

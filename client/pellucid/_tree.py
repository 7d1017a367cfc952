"""The module tree of a model, as its card has it: attributes, indexing, and the sites of each module."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pellucid_shared.card import ModelCard, ModuleInfo
from pellucid_shared.errors import (
    GradientError,
    IndexOutOfRangeError,
    PellucidError,
    RecordingError,
    UnknownModuleError,
    did_you_mean,
)
from pellucid_shared.graph import APPLY
from pellucid_shared.values import ModuleRef

from . import _passing, _sites, compat
from ._call import as_tracked, graph_value, value_of
from ._calls import Calls
from ._later import MODEL, refuse
from ._lines import users_line
from ._names import Names, look_up
from ._recorder import Recorder, active
from ._source import Source
from ._steps import Steps, StepsBody, advance
from ._value import Value

if TYPE_CHECKING:
    from ._model import LanguageModel

_LISTS = ("ModuleList", "Sequential")
#: What of a module can be assigned.
_SITES = ("output", "input", "inputs", "backward_output", "backward_input")


class Module:
    """One module of a model.

    Attributes:
        path: its path in the model, ``model.layers.3``; the root is the empty path.
    """

    path: str
    _model: LanguageModel
    _call: int

    def __init__(self, model: LanguageModel, path: str, call: int = 0) -> None:
        own = self.__dict__
        own["_model"], own["path"], own["_call"] = model, path, call

    # --- sites ---------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returned: a tensor, or a structure of tensors. Assign to replace it.

        Raises:
            SiteError: the module is never called in a forward pass.
            RecordingError: outside a trace.
        """
        recorder = self._recorder()
        if recorder.tuple_outputs and not self._call:
            return compat.read_output(recorder, self.path)
        return _sites.read_output(recorder, self.path, self._call)

    @output.setter
    def output(self, value: Any) -> None:
        recorder = self._recorder()
        if recorder.tuple_outputs and not self._call:
            compat.replace_output(recorder, self.path, value)
        else:
            _sites.replace_output(recorder, self.path, value, self._call)

    @property
    def input(self) -> Any:
        """The first positional argument, or the first keyword argument. Assign to replace it."""
        recorder = self._recorder()
        if recorder.tuple_outputs and not self._call:
            return compat.read_arguments(recorder, self.path)
        return _sites.read_input(recorder, self.path, call=self._call)

    @input.setter
    def input(self, value: Any) -> None:
        recorder = self._recorder()
        if recorder.tuple_outputs and not self._call:
            compat.replace_arguments(recorder, self.path, value)
        else:
            _sites.replace_input(recorder, self.path, value, call=self._call)

    @property
    def inputs(self) -> Any:
        """All arguments, ``(args, kwargs)``. Assign to replace them."""
        return _sites.read(self._recorder(), self.path, "input", call=self._call)

    @inputs.setter
    def inputs(self, value: Any) -> None:
        _sites.replace(self._recorder(), self.path, "input", value, call=self._call)

    @property
    def calls(self) -> Calls:
        """Its calls within one pass: ``module.calls[1].output`` where the model calls it more than once;
        ``module.output`` is that of call 0."""
        return Calls(self.path, self._card(), lambda call: Module(self._model, self.path, call))

    def skip(self, value: Any) -> None:
        """Do not run the module; a copy of ``value`` is its output. Where it keeps keys and values of a
        generation, those are made all the same.

        Args:
            value: a tensor (``module.input``), a number that fills, or a structure as the output's.

        Raises:
            SiteError: the module is never called, or returns what no value can stand for.
            ShapeError: the value does not have the output's form, shape or kind of dtype.
        """
        _passing.skip(self._recorder(), self.path, self._call, value)

    @property
    def source(self) -> Source:
        """The calls of torch functions that the module makes itself: ``source.softmax_0.output``."""
        return Source(self)

    @property
    def backward_output(self) -> Any:
        """The gradient at the module's output: ``.output.grad``. Assign to replace it.

        Raises:
            GradientError: the module returns a structure; its members have gradients.
        """
        return self._one(self.output, "output").grad

    @backward_output.setter
    def backward_output(self, value: Any) -> None:
        self._one(self.output, "output").grad = value

    @property
    def backward_input(self) -> Any:
        """The gradient at the first argument: ``.input.grad``. Assign to replace it."""
        return self._one(self.input, "input").grad

    @backward_input.setter
    def backward_input(self, value: Any) -> None:
        self._one(self.input, "input").grad = value

    def _one(self, found: Any, kind: str) -> Any:
        """A site that is one tensor, which has a gradient."""
        if isinstance(found, Value):
            return found
        raise GradientError(
            f"{self.path or 'model'}.{kind} is no single tensor; a member of it has a gradient, such as "
            f"{self.path or 'model'}.{kind}[0].grad: {found!r}",
            where=users_line(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module to a value, at any point and out of order: ``model.lm_head(model.model.norm(h))``.

        Raises:
            ShapeError: the value does not fit the module.
            RecordingError: outside a trace.
        """
        recorder = self._recorder()
        given = [graph_value(v, recorder) for v in args]
        named = {k: graph_value(v, recorder) for k, v in kwargs.items()}
        value = value_of(recorder, recorder.add(APPLY, (ModuleRef(self.path), *given), named))
        return as_tracked(recorder, value)

    def next(self, steps: int = 1) -> Module:
        """This module, whose sites name the next step of the generation from here on in the invoke.

        Raises:
            RecordingError: outside a generation, or past its last step.
        """
        advance(self._recorder(), steps, self.path)
        return self

    @property
    def iter(self) -> Steps:
        """Steps of the generation, as ``tracer.iter``."""
        return Steps(self._recorder())

    def all(self) -> StepsBody:
        """``with module.all():`` a body for every step of the generation."""
        return self.iter[:]

    def _recorder(self) -> Recorder:
        recorder = active()
        if not self._model._is_of(recorder.owner):
            raise RecordingError(
                f"{self.path or 'this model'} belongs to {self._model.name}, and the open trace is of "
                f"{recorder.model}",
                where=users_line(),
            )
        return recorder

    # --- the tree ------------------------------------------------------------------------------------------

    @property
    def children(self) -> dict[str, Module]:
        """The direct children by name; the way to a child that is called ``output`` or ``input``."""
        card = self._card()
        return {name: Module(self._model, _join(self.path, name)) for name in card.children[self.path]}

    def modules(self) -> Iterator[Module]:
        """This module and all below it, depth first."""
        for _, module in self.named_modules():
            yield module

    def parameters(self) -> Iterator[Any]:
        """The parameters of this module and all below it, as values."""
        for _, value in self.named_parameters():
            yield value

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(path from here, value) of every parameter of this module and all below it, as torch names them;
        one that several modules share comes once for each.

        Raises:
            RecordingError: outside a trace.
        """
        for path, module in self.named_modules():
            inside = path.removeprefix(self.path).removeprefix(".")
            for name in module._info().parameters:
                yield _join(inside, name), _passing.parameter(self._recorder(), path, name)

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and all below it, depth first."""
        inside = f"{self.path}." if self.path else ""
        for info in self._card().modules:
            if info.path == self.path or info.path.startswith(inside):
                yield info.path, Module(self._model, info.path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = self._model._names().child(self.path, name, self._card())
        if found is not None:
            return Module(self._model, found)
        if name in {**self._info().parameters, **self._info().buffers}:
            return _passing.parameter(self._recorder(), self.path, name)
        self._refuse_what_is_to_come(name)
        raise self._unknown(self._card(), name)

    def get(self, path: str) -> Any:
        """The module or site at a path below this one: ``model.get("model.layers.3.output")``.

        Aliases and, at the root, names of the base model are found as attributes are.

        Raises:
            UnknownModuleError: there is no such module; names the nearest.
        """
        return look_up(self, path)

    def _child(self, name: str) -> Module:
        """The child of that name, alias, or place in a list.

        Raises:
            UnknownModuleError: there is none.
            IndexOutOfRangeError: a list is shorter.
        """
        found = self._model._names().child(self.path, name, self._card())
        if found is not None:
            return Module(self._model, found)
        if self._is_list() and name.removeprefix("-").isdigit():
            member: Module = self[int(name)]
            return member
        raise self._unknown(self._card(), name)

    def _refuse_what_is_to_come(self, name: str) -> None:
        spelling = f"{self.path or 'model'}.{name}"
        refuse({} if self.path else MODEL, name, spelling)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SITES or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        raise RecordingError(
            f"{_join(self.path, name)} cannot be assigned: .output, .input and .inputs of a module can",
            where=users_line(),
        )

    def __getitem__(self, index: Any) -> Any:
        names = self._card().children[self.path]
        if isinstance(index, str):
            return self._child(index)
        if not self._is_list():
            raise UnknownModuleError(
                f"{self.path or 'the model'} is a {self._info().class_name}, which is not indexed by "
                f"{index!r}; its children are {', '.join(names) or 'none'}",
                where=users_line(),
            )
        if isinstance(index, slice):
            return [Module(self._model, _join(self.path, name)) for name in names[index]]
        try:
            index = operator.index(index)
        except TypeError as error:
            if isinstance(error, PellucidError):
                raise
            raise UnknownModuleError(
                f"{self.path} is indexed by a whole number or a slice, found {index!r:.60}",
                where=users_line(),
            ) from None
        if not -len(names) <= index < len(names):
            raise IndexOutOfRangeError(
                f"{self.path}[{index}] is out of range: it has {len(names)} modules, 0 to {len(names) - 1}",
                where=users_line(),
            )
        return Module(self._model, _join(self.path, names[index]))

    def __len__(self) -> int:
        return len(self._card().children[self.path])

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Module]:
        return iter(self.children.values())

    def __dir__(self) -> list[str]:
        bases = (self.path, *self._fallbacks(self._card()))
        names = [
            n for base in bases for n in (*self._card().children[base], *self._model._names().below(base))
        ]
        own = (*self._info().parameters, *self._info().buffers)
        return sorted({*super().__dir__(), *own, *(n for n in names if n.isidentifier())})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Module) and (
            (other._model, other.path, other._call) == (self._model, self.path, self._call)
        )

    def __hash__(self) -> int:
        return hash((id(self._model), self.path, self._call))

    def __repr__(self) -> str:
        return show_tree(self._card(), self._model._names(), self.path)

    # --- the card ------------------------------------------------------------------------------------------

    def _card(self) -> ModelCard:
        return self._model.card

    def _info(self) -> ModuleInfo:
        return self._card().module_index[self.path]

    def _is_list(self) -> bool:
        names = self._card().children[self.path]
        return self._info().class_name in _LISTS or (bool(names) and all(n.isdigit() for n in names))

    def _fallbacks(self, card: ModelCard) -> tuple[str, ...]:
        """Where else a name absent here is looked up: the root also has its base model's children."""
        prefix = card.base_model_prefix
        return (prefix,) if not self.path and prefix in card.children and prefix else ()

    def _unknown(self, card: ModelCard, name: str) -> UnknownModuleError:
        full = _join(self.path, name)
        names = [_join(b, n) for b in (self.path, *self._fallbacks(card)) for n in card.children[b]]
        names += [_join(self.path, n) for n in (*self._info().parameters, *self._info().buffers)]
        near = did_you_mean(full, names) or did_you_mean(full, card.module_index)
        return UnknownModuleError(
            f"{card.id} has no module or parameter {full!r}.{near or f' Here are: {_listed(names)}.'}",
            where=users_line(),
        )


def show_tree(card: ModelCard, aliases: Names, path: str = "") -> str:
    """The tree with class names, aliases and what each module returns; equal neighbours in a list are shown
    once."""
    info = card.module_index[path]
    lines = [f"{info.class_name}{_returns(card, path)}"]
    names = card.children[path]
    shown = [(name, show_tree(card, aliases, _join(path, name))) for name in names]
    start = 0
    while start < len(shown):
        end = start
        while end + 1 < len(shown) and names[end + 1].isdigit() and shown[end + 1][1] == shown[start][1]:
            end += 1
        name, text = shown[start]
        name = ", ".join((name, *aliases.of(_join(path, name))))
        label = f"({name})" if end == start else f"({name}-{names[end]}): {end - start + 1} x"
        label = f"{label}:" if end == start else label
        lines += f"{label} {text}".splitlines()
        start = end + 1
    return "\n  ".join(lines)


def _returns(card: ModelCard, path: str) -> str:
    call = card.call_index.get((path, 0))
    return f" -> {_sites.show_structure(call.output)}" if call is not None else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"

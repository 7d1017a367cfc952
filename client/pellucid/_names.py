"""Names of the user's own for modules, and looking modules and sites up by path."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, UnknownModuleError, did_you_mean

from ._lines import users_line

if TYPE_CHECKING:
    from ._tree import Module

_SITES = ("output", "input", "inputs")


class Names:
    """Every alias of a model.

    A name stands beside the module it names, and at the root too where the module was named by its path:
    ``{"transformer.h": "layers"}`` gives ``model.transformer.layers`` and ``model.layers``. A lone name that
    many modules have, ``{"attn": "attention"}``, gives each of them the alias beside it.
    """

    def __init__(self) -> None:
        self._paths: dict[tuple[str, str], str] = {}

    def find(self, parent: str, name: str) -> str | None:
        """The path of the module that is called ``name`` below ``parent`` by an alias."""
        return self._paths.get((parent, name))

    def below(self, parent: str) -> list[str]:
        """The aliases that stand below a module."""
        return [alias for base, alias in self._paths if base == parent]

    def of(self, path: str) -> list[str]:
        """The aliases that stand beside a module."""
        parent = path.rpartition(".")[0]
        return [alias for (base, alias), found in self._paths.items() if found == path and base == parent]

    def add(self, renames: Mapping[str, str], card: ModelCard, taken: set[str]) -> None:
        """Add aliases: all of ``renames``, or none where one cannot be.

        Args:
            renames: path, or lone name, of modules -> alias.
            taken: names that modules answer themselves.

        Raises:
            UnknownModuleError: a path the model does not have.
            InputError: an alias that is no name, or that stands for something else already.
        """
        if not isinstance(renames, Mapping):
            raise InputError(
                f'names are given as {{"path": "alias"}}, found {renames!r:.60}', where=users_line()
            )
        work = Names()
        work._paths = added = dict(self._paths)
        for old, alias in renames.items():
            _require_a_name(alias, taken)
            for parent, path in work._places(str(old), card):
                there = f"{parent}.{alias}" if parent else alias
                base = parent or card.base_model_prefix
                same = added.get((parent, alias), path)
                if alias in card.children[parent] or alias in card.children.get(base, ()) or same != path:
                    stands = same if same != path else "a module of the model"
                    raise InputError(
                        f"{old!r} cannot be called {alias!r}: {there} is {stands} already", where=users_line()
                    )
                added[parent, alias] = path
        self._paths = added

    def _places(self, old: str, card: ModelCard) -> list[tuple[str, str]]:
        """(where the alias stands, module it names) of everything called ``old``."""
        path = self.resolve(old, card)
        if path is not None:
            parent = path.rpartition(".")[0]
            return [(place, path) for place in dict.fromkeys((parent, ""))]
        found = [p for p in card.module_index if p.rpartition(".")[2] == old]
        if not found or not old:
            raise UnknownModuleError(
                f"{card.id} has no module {old!r} to be renamed.{did_you_mean(old, card.module_index)}",
                where=users_line(),
            )
        return [(p.rpartition(".")[0], p) for p in found]

    def resolve(self, path: str, card: ModelCard) -> str | None:
        """The model's own path of a module given by any path; None where there is none."""
        found = ""
        for part in path.split("."):
            here = self.child(found, part, card)
            if here is None:
                return None
            found = here
        return found

    def child(self, parent: str, name: str, card: ModelCard) -> str | None:
        """The path of a child by name or alias; the root also has its base model's."""
        prefix = card.base_model_prefix
        for base in (parent, prefix) if not parent and prefix in card.children else (parent,):
            if name in card.children[base]:
                return f"{base}.{name}" if base else name
            if (alias := self.find(base, name)) is not None:
                return alias
        return None


def look_up(module: Module, path: str) -> Any:
    """The module or site at a path below a module.

    Raises:
        UnknownModuleError: there is no such module; names the nearest.
    """
    if not isinstance(path, str) or not path:
        raise InputError(
            f"a module or site is looked up by its path, 'model.layers.3.output'; found {path!r:.60}",
            where=users_line(),
        )
    parts = path.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "source" and part not in module.children:
            found: Any = module.source
            for inner in parts[position + 1 :]:
                found = getattr(found, inner)
            return found
        if last and part in _SITES and part not in module.children:
            return getattr(module, part)
        module = module._child(part)
    return module


def _require_a_name(alias: object, taken: set[str]) -> None:
    if not isinstance(alias, str) or not alias.isidentifier() or keyword.iskeyword(alias):
        raise InputError(
            f"an alias is one name, as it is written after a dot; found {alias!r:.60}", where=users_line()
        )
    if alias in taken or alias.startswith("_"):
        raise InputError(
            f"{alias!r} cannot be an alias: every module has a {alias!r} of its own", where=users_line()
        )

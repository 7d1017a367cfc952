"""Lists, tuples and dicts of values: plain containers that can be saved and know their plain value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class _Structure:
    """What the containers of values share."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """The plain structure: tensors (arrays where torch is absent), numbers and strings.

        Raises:
            ValueNotReadyError: a member was not saved, or its job failed.
        """
        return plain(self)

    def save(self, name: str | None = None) -> Any:
        """Send the structure back, as ``pellucid.save`` does."""
        from ._save import save

        return save(self, name)


class Unread:
    """A structure whose tensors are read when they are reached for: what a site with several members is."""

    def read_all(self) -> Any:
        """The plain structure with every tensor read."""
        raise NotImplementedError


class ListValue(_Structure, list[Any]):
    """A list of values."""


class DictValue(_Structure, dict[str, Any]):
    """A dict of values; as a model's output it can also be read by attribute and by position."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no {name!r}; there is {', '.join(self)}")

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int) and -len(self) <= key < len(self):
            return list(self.values())[key]
        raise KeyError(f"there is no {key!r}; there is {', '.join(self)}")


class TupleValue(_Structure, tuple[Any, ...]):
    """A tuple of values; the result of an op such as ``topk`` names its members as torch does."""

    _fields: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self[self._fields.index(name)]
        has = f"it has {', '.join(self._fields)}" if self._fields else "index it instead"
        raise AttributeError(f"a tuple of {len(self)} values has no {name!r}; {has}")


def named_tuple(members: Sequence[Any], fields: Sequence[str]) -> TupleValue:
    """A tuple whose members can also be read by name."""
    result = TupleValue(members)
    result._fields = tuple(fields)
    return result


def wrapped(structure: Any) -> Any:
    """A structure whose containers know their plain value."""
    if isinstance(structure, _Structure):
        return structure
    if isinstance(structure, list):
        return ListValue(wrapped(v) for v in structure)
    if isinstance(structure, tuple):
        return TupleValue(wrapped(v) for v in structure)
    if isinstance(structure, dict):
        return DictValue((k, wrapped(v)) for k, v in structure.items())
    return structure


def plain(structure: Any) -> Any:
    """The plain value of a structure whose members are filled."""
    if isinstance(structure, list):
        return [plain(v) for v in structure]
    if isinstance(structure, tuple):
        return tuple(plain(v) for v in structure)
    if isinstance(structure, dict):
        return {k: plain(v) for k, v in structure.items()}
    return getattr(structure, "value", structure)

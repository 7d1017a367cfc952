"""Reading and writing where a graph touches the model: ``.output``, ``.input`` and ``.inputs`` of modules.

A site is a tensor, or a structure whose tensors are read when they are reached for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace as replace_field
from typing import Any, NoReturn, TypeAlias

from pellucid_shared.card import Fields, OpaqueLeaf, PlainLeaf, Structure, TensorLeaf, leaf_at
from pellucid_shared.card import Sequence as Items
from pellucid_shared.check import site_spec
from pellucid_shared.errors import (
    IndexOutOfRangeError,
    PellucidError,
    RecordingError,
    ShapeError,
    SiteError,
    ValueNotReadyError,
)
from pellucid_shared.graph import GET, ORIGINAL, SET
from pellucid_shared.values import RESULT, Site

from ._call import graph_value, value_of
from ._lines import users_line
from ._recorder import WHOLE, Recorder
from ._structure import DictValue, ListValue, TupleValue, Unread
from ._value import Value
from ._whole import WholeBatch

Path: TypeAlias = "tuple[int | str, ...]"


class NoFieldError(SiteError, AttributeError):
    """A name that a site's structure does not have; an AttributeError too, for ``hasattr``."""


class Untouched:
    """A part of a site that is no tensor (a cache, None): it can be passed along where it was."""

    def __init__(self, site: Site, what: str) -> None:
        self.site, self.what = site, what

    def __repr__(self) -> str:
        return f"<{self.site}: {self.what}>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise SiteError(f"{self.site} is {self.what}; it cannot be read or written", where=users_line())


class SiteStructure(Unread):
    """A site that holds several things: a tuple, a dict, or a model's output with named fields.

    Members are read by position or name, iterated and unpacked; assigning to one replaces it in the model.
    """

    _recorder: Recorder
    _site: Site
    _structure: Items | Fields
    _members: dict[int | str, Any]
    _region: int | None

    def __init__(self, recorder: Recorder, site: Site, structure: Items | Fields) -> None:
        own = self.__dict__
        own["_recorder"], own["_site"], own["_structure"], own["_members"] = recorder, site, structure, {}
        own["_region"] = recorder.region

    # --- reading -------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return tuple(self._member(k) for k in self._keys()[key])
        return self._member(self._key(key))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "original" and name not in self._structure.items:
            return originals(self._recorder, self._site, self._structure)
        return self._member(self._key(name))

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._structure, Fields):
            return iter(self._structure.items)
        return iter(self[:])

    def __len__(self) -> int:
        return len(self._structure.items)

    def keys(self) -> list[str]:
        """The names of the fields."""
        return [str(key) for key in self._keys()]

    def read_all(self) -> Any:
        """The structure with every tensor read; what is no tensor becomes None."""
        parts = {key: whole(self._member(key)) for key in self._keys()}
        if isinstance(self._structure, Fields):
            return parts
        return tuple(parts.values()) if self._structure.leaf == "tuple" else list(parts.values())

    def save(self, name: str | None = None) -> Any:
        """Send all tensors of the structure back, as ``pellucid.save`` does."""
        from ._save import save

        return save(self, name)

    @property
    def value(self) -> NoReturn:
        raise ValueNotReadyError(f"{self!r} was not saved: keep what .save() gives back", where=users_line())

    def __add__(self, other: Any) -> tuple[Any, ...]:
        return self[:] + tuple(other)  # type: ignore[no-any-return]

    def __radd__(self, other: Any) -> tuple[Any, ...]:
        return tuple(other) + self[:]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<{self._site}: {show_structure(self._structure)}>"

    # --- writing -------------------------------------------------------------------------------------------

    def __setitem__(self, key: Any, value: Any) -> None:
        key = self._key(key)
        self._members[key] = value  # nothing to keep: whoever reads this member now wants the new one
        write(self._recorder, _inside(self._site, key), self._part(key), value)
        del self._members[key]

    def keep(self, site: Site) -> None:
        """Read the leaf at ``site``, which is about to be replaced, if it is one of this structure's."""
        depth = len(self._site.path)
        if site.path[:depth] == self._site.path:
            with self._recorder.outside_branches(self._region):
                member = self._member(site.path[depth])
            if isinstance(member, SiteStructure):
                member.keep(site)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    # --- keys ----------------------------------------------------------------------------------------------

    def _keys(self) -> list[int | str]:
        items = self._structure.items
        return list(items) if isinstance(items, Mapping) else list(range(len(items)))

    def _key(self, key: Any) -> int | str:
        keys = self._keys()
        if isinstance(key, int) and -len(keys) <= key < len(keys):
            return keys[key]
        if isinstance(key, str) and key in keys:
            return key
        message = f"{self._site} has no {key!r}; it has {', '.join(map(repr, keys)) or 'nothing'}"
        if isinstance(key, int):
            raise IndexOutOfRangeError(message, where=users_line())
        raise NoFieldError(message, where=users_line())

    def _part(self, key: int | str) -> Structure:
        part = leaf_at(self._structure, (key,))
        assert part is not None
        return part

    def _member(self, key: int | str) -> Any:
        known = self._members.get(key)
        if key not in self._members or (isinstance(known, Value) and not self._recorder.is_seen(known._node)):
            self._members[key] = _read(self._recorder, _inside(self._site, key), self._part(key))
        return self._members[key]


def read(recorder: Recorder, module: str, kind: str, path: Path = (), call: int = 0) -> Any:
    """The value at a module's output, or at ``("input")`` all its arguments as ``(args, kwargs)``.

    ``path`` is the name of a call inside it, where ``kind`` is of calls.

    Raises:
        SiteError: the module is never called, or not so often.
    """
    site = _site(recorder, module, kind, path, call)
    return _read(recorder, site, _structure(recorder, site))


def read_result(recorder: Recorder) -> Any:
    """The ids that the generation ends with, [batch, prompt + new] int64.

    Raises:
        RecordingError: the trace does not generate.
    """
    if recorder.current_trace().generation is None:
        raise RecordingError(
            "one forward pass ends with no ids; generate: `with model.generate(prompt, max_new_tokens=n):`",
            where=users_line(),
        )
    site = Site("", RESULT, (), recorder.current_invoke())
    if site.invoke == WHOLE:
        return _whole(recorder).read_result(site)
    return value_of(recorder, recorder.add(GET, (site,)))


def read_output(recorder: Recorder, module: str, call: int = 0) -> Any:
    """What the module returned."""
    return read(recorder, module, "output", call=call)


def replace_output(recorder: Recorder, module: str, value: Any, call: int = 0) -> None:
    """Assign to what the module returned."""
    replace(recorder, module, "output", value, call=call)


def read_input(recorder: Recorder, module: str, kind: str = "input", path: Path = (), call: int = 0) -> Any:
    """The first positional argument, or the first keyword argument where none is positional."""
    site, structure = _first_input(recorder, module, kind, path, call)
    return _read(recorder, site, structure)


def replace(recorder: Recorder, module: str, kind: str, value: Any, path: Path = (), call: int = 0) -> None:
    """Assign to a module's output, or to all its arguments."""
    site = _site(recorder, module, kind, path, call)
    write(recorder, site, _structure(recorder, site), value)


def replace_input(
    recorder: Recorder, module: str, value: Any, kind: str = "input", path: Path = (), call: int = 0
) -> None:
    """Assign to the argument :func:`read_input` reads."""
    write(recorder, *_first_input(recorder, module, kind, path, call), value)


def originals(recorder: Recorder, site: Site, structure: Structure) -> Any:
    """What was at a site before this graph's edits there: a value, or a structure of them; what is no tensor
    is None."""
    if isinstance(structure, Fields):
        return DictValue((k, originals(recorder, _inside(site, k), v)) for k, v in structure.items.items())
    if isinstance(structure, Items):
        parts = [originals(recorder, _inside(site, i), v) for i, v in enumerate(structure.items)]
        return TupleValue(parts) if structure.leaf == "tuple" else ListValue(parts)
    if isinstance(structure, TensorLeaf) and structure.shape is not None:
        return value_of(recorder, recorder.add(ORIGINAL, (site,)))
    return None


def write(recorder: Recorder, site: Site, structure: Structure, value: Any) -> None:
    """Replace what is at a site, leaf by leaf; a leaf that is given back as it was read is left alone.

    Raises:
        ShapeError: the structures, shapes or dtypes differ.
        SiteError: something that is no tensor would be written.
    """
    if isinstance(structure, TensorLeaf):
        _write_tensor(recorder, site, structure, value)
    elif isinstance(structure, Items | Fields):
        for key, part, member in _pairs(site, structure, value):
            write(recorder, _inside(site, key), part, member)
    elif not (isinstance(value, Untouched) and value.site == site) and value is not None:
        what = "None" if isinstance(structure, PlainLeaf) else f"a {structure.class_name}"
        raise SiteError(
            f"{site} is {what} and cannot be written; pass along what was there", where=users_line()
        )


def first_input(recorder: Recorder, module: str) -> Site:
    """The site that :func:`read_input` reads."""
    return _first_input(recorder, module)[0]


def show_structure(structure: Structure) -> str:
    """A structure in one line: ``([batch, tokens, 576] float32, None)``."""
    if isinstance(structure, TensorLeaf):
        return str(structure)
    if isinstance(structure, PlainLeaf):
        return structure.value
    if isinstance(structure, OpaqueLeaf):
        return structure.class_name
    if isinstance(structure, Items):
        inside = ", ".join(map(show_structure, structure.items))
        return f"({inside})" if structure.leaf == "tuple" else f"[{inside}]"
    name = structure.class_name if structure.class_name != "dict" else ""
    return f"{name}({', '.join(f'{k}={show_structure(v)}' for k, v in structure.items.items())})"


def _read(recorder: Recorder, site: Site, structure: Structure) -> Any:
    recorder.require_open()
    if isinstance(structure, Items | Fields):
        found = SiteStructure(recorder, site, structure)
        recorder.unread.setdefault(_whole_site(recorder, site), weakref.WeakSet()).add(found)
        return found
    if isinstance(structure, TensorLeaf) and structure.shape is not None:
        if site.invoke == WHOLE:
            return _whole(recorder).read(site, structure)
        return value_of(recorder, recorder.add(GET, (site,)))
    return Untouched(site, show_structure(structure))


def _write_tensor(recorder: Recorder, site: Site, leaf: TensorLeaf, value: Any) -> None:
    if isinstance(value, SiteStructure | Untouched | tuple | list | dict):
        raise ShapeError(
            f"{site} is one tensor and was given a {type(value).__name__}; assign the tensor itself",
            where=users_line(),
        )
    if site.invoke != WHOLE and isinstance(value, Value) and recorder.shows(value.ref(recorder).node, site):
        return
    for structure in list(recorder.unread.get(_whole_site(recorder, site), ())):
        structure.keep(site)  # names already taken keep what was there
    if site.invoke == WHOLE:
        for one, part in _whole(recorder).taken_apart(site, leaf, value):
            _write_tensor(recorder, one, leaf, part)
        return
    recorder.last_set[recorder.trace_index(), site] = recorder.add(SET, (site, graph_value(value, recorder)))


def _pairs(site: Site, structure: Items | Fields, value: Any) -> Iterator[tuple[int | str, Structure, Any]]:
    parts: dict[Any, Structure] = (
        {**structure.items} if isinstance(structure, Fields) else dict(enumerate(structure.items))
    )
    given: dict[Any, Any] | None = None
    if isinstance(value, SiteStructure):
        given = {key: value[key] for key in value._keys()}
    elif isinstance(value, Mapping) and isinstance(structure, Fields):
        given = dict(value)
    elif isinstance(value, tuple | list) and isinstance(structure, Items):
        given = dict(enumerate(value))
    if given is None or list(given) != list(parts):
        what = (
            f"{type(value).__name__} of {len(value)}"
            if isinstance(value, tuple | list | dict)
            else (str(value) if isinstance(value, Value | SiteStructure) else type(value).__name__)
        )
        raise ShapeError(
            f"{site} is {show_structure(structure)} and was given {what}; assign a structure of the same "
            f"form, or one member: {_inside(site, next(iter(parts), 0))} = value",
            where=users_line(),
        )
    for key, part in parts.items():
        yield key, part, given[key]


def _site(recorder: Recorder, module: str, kind: str, path: Path = (), call: int = 0) -> Site:
    """The whole of a module's output or arguments, in the invoke and step that are being written."""
    return Site(module, kind, path, recorder.current_invoke(), recorder.step_of(module), call)


def _whole(recorder: Recorder) -> WholeBatch:
    assert recorder.whole is not None
    return recorder.whole


def _whole_site(recorder: Recorder, site: Site) -> tuple[Any, ...]:
    return recorder.ground(), site.module, site.kind, site.invoke, site.step, site.call


def _structure(recorder: Recorder, site: Site) -> Structure:
    seen = replace_field(site, step=recorder.phase_of(site.module))
    call = recorder.card.call_at(seen)
    found = None if call is None else recorder.card.insides.part(call, seen)
    if found is None:
        try:
            assert recorder.region is not None
            site_spec(seen, recorder.card, recorder.scene(recorder.region))
        except PellucidError as error:
            error.where = users_line()
            raise
        raise AssertionError("a module without a call has no site")
    return found


def _first_input(
    recorder: Recorder, module: str, kind: str = "input", path: Path = (), call: int = 0
) -> tuple[Site, Structure]:
    site = _site(recorder, module, kind, path, call)
    structure = _structure(recorder, site)
    assert isinstance(structure, Items)
    args, kwargs = structure.items
    tops: list[tuple[Path, Structure]]
    tops = [((0, i), part) for i, part in enumerate(args.items if isinstance(args, Items) else ())]
    tops += [((1, k), part) for k, part in (kwargs.items.items() if isinstance(kwargs, Fields) else ())]
    if not tops:
        raise SiteError(f"{module or 'the model'} is called without arguments", where=users_line())
    inner, part = next(((p, s) for p, s in tops if isinstance(s, TensorLeaf)), tops[0])
    return replace_field(site, path=(*path, *inner)), part


def _inside(site: Site, key: int | str) -> Site:
    return replace_field(site, path=(*site.path, key))


def whole(member: Any) -> Any:
    """A member with every tensor of it read; None for what is no tensor."""
    if isinstance(member, Unread):
        return member.read_all()
    return None if isinstance(member, Untouched) else member

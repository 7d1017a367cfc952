"""Ops that are about a pass and not about a value: ``module.skip``, ``stop`` and ``log``; and ``param.get``.

A skip takes effect where its module would begin. A log and a stop are tied to the pass (of an invoke, at a
step) they are written about by the site where it begins, the root's input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import EllipsisType
from typing import Any

from .card import (
    Call,
    Fields,
    ModelCard,
    OpaqueLeaf,
    PlainLeaf,
    Sequence,
    Structure,
    TensorLeaf,
    leaves,
)
from .clock import Clock
from .errors import GraphError, OrderError, ShapeError, SiteError, UnknownModuleError, did_you_mean
from .flat import Flat
from .graph import LOG, ORIGINAL, PARAM, SKIP, STOP, Node
from .specs import TensorSpec
from .values import RESULT, Device, DType, Site, Value, contains

MAX_PARTS = 64
MAX_TEXT = 1000

#: (trace, invoke, step) of a pass as one invoke sees it.
_Pass = tuple[int, int, int]


def beginning(invoke: int, step: int) -> Site:
    """The site where a pass begins: what logs and stops are tied to."""
    return Site("", "input", (), invoke, step)


# --- invariants that need no model -------------------------------------------------------------------------


def lint_passing(node: Node) -> None:
    """The invariants of this module's ops; see ``lint``.

    Raises:
        GraphError: one does not hold.
    """
    site = node.at
    if node.op == ORIGINAL and node.site.kind == RESULT:
        raise GraphError("a result has no original; it is never edited where it is made")
    if node.op == PARAM and not isinstance(node.args[1], str):
        raise GraphError("param.get takes a module and a name")
    if node.op == SKIP:
        assert site is not None
        if site.kind != "output" or site.path:
            raise GraphError(f"module.skip takes the whole output of a module, found {site}")
        if contains(node.args[1], _NOT_MADE):
            raise GraphError("module.skip takes tensors, numbers, and lists, tuples and dicts of them")
    if node.op in (LOG, STOP) and site is not None and site != beginning(site.invoke, site.step):
        raise GraphError(f"{node.op} is tied to where a pass begins, the root's input; found {site}")
    if node.op == LOG:
        _lint_log(node)


_NOT_MADE = (slice, EllipsisType, DType, Device)


def _lint_log(node: Node) -> None:
    parts = list(_members(node.args[1:]))
    if not 0 < len(parts) <= MAX_PARTS:
        raise GraphError(f"a log has 1 to {MAX_PARTS} parts, found {len(parts)}")
    texts = [*(part for part in parts if isinstance(part, str)), *node.kwargs.values()]
    if contains(parts, _NOT_MADE) or not set(node.kwargs) <= {"sep"} or not all(map(_is_text, texts)):
        raise GraphError(
            "a log takes values, numbers, strings, and lists, tuples and dicts of them, and sep, a string; "
            f"strings have at most {MAX_TEXT} characters"
        )


def _is_text(value: Value) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _members(value: Value) -> Iterator[Value]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _members(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _members(part)
    else:
        yield value


# --- against a card ----------------------------------------------------------------------------------------


def require_pass(node: Node, card: ModelCard) -> None:
    """Raise SiteError unless the model has the pass that a log or a stop is tied to."""
    if node.at is not None and card.call_at(node.at) is None:
        raise SiteError(f"{card.id} does not generate step by step, so it has no step {node.at.step}")


def parameter_spec(path: str, name: str, card: ModelCard) -> TensorSpec:
    """The spec of a parameter or buffer of a module that the model has.

    Raises:
        UnknownModuleError: the module has none of that name; gives the nearest.
    """
    info = card.module_index[path]
    leaf = info.parameters.get(name) or info.buffers.get(name)
    if leaf is None:
        names = [*info.parameters, *info.buffers]
        near = did_you_mean(name, names)
        has = near or (f" It has {', '.join(names)}." if names else " It has none of its own.")
        raise UnknownModuleError(f"{path or 'the model'} has no parameter {name!r}.{has}")
    spec = leaf.spec(0, 0)
    assert spec is not None
    return spec


def skipped_parts(site: Site, value: Any, card: ModelCard) -> Iterator[tuple[Site, Any]]:
    """(site, value) of each tensor of the output that ``value`` stands for, in order.

    Raises:
        SiteError: the module is not called so, or returns something that no value can stand for.
        ShapeError: the structures differ.
    """
    yield from _parts(site, _call(site, card).output, value)


def skipped_sites(site: Site, card: ModelCard) -> list[Site]:
    """The sites of the tensors of a skipped module's output."""
    return [
        replace(site, path=path)
        for path, leaf in leaves(_call(site, card).output)
        if isinstance(leaf, TensorLeaf)
    ]


def calls_inside(site: Site, card: ModelCard) -> tuple[tuple[str, int], ...]:
    """(module, call) of each call that does not happen where the module of ``site`` is skipped."""
    own = _call(site, card)
    phase = card.decode if site.step else card.prefill
    return tuple((c.module, c.call) for c in phase if own.enter < c.enter and c.exit < own.exit)


def _call(site: Site, card: ModelCard) -> Call:
    call = card.call_at(site)
    if call is not None:
        return call
    name, phase = site.module or "the model", card.decode if site.step else card.prefill
    count = sum(c.module == site.module for c in phase)
    if count:
        raise SiteError(f"{name} is called {count} times in a pass; call {site.call} was asked (from 0)")
    raise SiteError(f"{name} is never called in a pass of {card.id}, so it cannot be skipped")


def _parts(site: Site, structure: Structure, value: Any) -> Iterator[tuple[Site, Any]]:
    if isinstance(structure, TensorLeaf):
        yield site, value
        return
    if isinstance(structure, OpaqueLeaf) or getattr(structure, "class_name", "dict") != "dict":
        raise SiteError(
            f"{site} is a {structure.class_name}, which no value can stand for; skip the modules inside "  # type: ignore[union-attr]
            f"{site.module or 'the model'}"
        )
    if isinstance(structure, PlainLeaf):
        if repr(value) != structure.value:
            raise ShapeError(f"{site} is {structure.value}, and the skip gives something else there")
        return
    keys: list[int | str]
    given: list[int | str] | None = None
    if isinstance(structure, Sequence):
        keys = list(range(len(structure.items)))
        if isinstance(value, tuple | list):
            given = list(range(len(value)))
    else:
        keys = list(structure.items)
        given = list(value) if isinstance(value, dict) else None
    if given is None or sorted(map(str, given)) != sorted(map(str, keys)):
        kind = "tensor" if isinstance(value, TensorSpec) else type(value).__name__
        found = kind if given is None else f"{kind} of {', '.join(map(str, given)) or 'nothing'}"
        raise ShapeError(f"{site} is {_form(structure)}, and the skip gives a {found}; give the same form")
    for key in keys:
        items: Any = structure.items
        yield from _parts(replace(site, path=(*site.path, key)), items[key], value[key])


def _form(structure: Sequence | Fields) -> str:
    if isinstance(structure, Sequence):
        inside = ", ".join(
            "tensor" if isinstance(i, TensorLeaf) else str(i) for i in map(_brief, structure.items)
        )
        return f"a {structure.leaf} ({inside})"
    return f"a dict of {', '.join(structure.items)}"


def _brief(structure: Structure) -> Any:
    return structure.value if isinstance(structure, PlainLeaf) else structure


# --- order -------------------------------------------------------------------------------------------------


class Passing:
    """When logs, stops and skips run, and what they rule out; nodes come in program order."""

    def __init__(self, flat: Flat, card: ModelCard, clock: Clock) -> None:
        self._flat, self._card, self._clock = flat, card, clock
        self._touched: dict[_Pass, list[int]] = defaultdict(list)  # nodes that touch sites of a pass
        self._skips: dict[_Pass, list[int]] = defaultdict(list)
        self._latest: dict[tuple[int, int], tuple[int, Site]] = {}  # (trace, invoke) -> latest event touched
        self._stops: dict[tuple[int, int], tuple[int, Site | None]] = {}  # the same where it was stopped
        self._told: dict[_Pass, int] = {}  # when the last log of a pass runs

    def touch(self, position: int, node: Node) -> int:
        """Note that a node touches its site; the site's event.

        Raises:
            OrderError: the site is later than the stop that the program places before the node.
        """
        site, trace = node.site, node.region
        event = self._clock.at(trace, replace(site, kind="input") if node.op == SKIP else site)
        stop = self._stops.get((trace, site.invoke))
        if stop is not None and event > stop[0]:
            until = f"after {stop[1]}" if stop[1] is not None else "before it begins"
            what = "what a generation ends with" if site.kind == RESULT else str(site)
            raise OrderError(
                f"{what} comes after tracer.stop(), which ends the pass {until}; take it before the stop, or "
                "stop later"
                + (" (max_new_tokens= makes a generation shorter)" if site.kind == RESULT else ""),
                node=self._flat.origin[position],
            )
        if site.kind == RESULT:
            return event
        if event > self._latest.get((trace, site.invoke), (-1, site))[0]:
            self._latest[trace, site.invoke] = event, site
        self._touched[trace, site.invoke, site.step].append(position)
        return event

    def when(self, position: int, node: Node, needs: int) -> int:
        """When a skip, log or stop that needs what exists at ``needs`` runs. Logs of one pass keep their
        order, as printed lines would."""
        site, trace = node.at, node.region
        if node.op == SKIP:
            event = self.touch(position, node)
            self._skips[trace, node.site.invoke, node.site.step].append(position)
            return event
        if site is None:
            return max(needs, self._clock.at(trace, Site("", RESULT)))
        begins = self._clock.at(trace, site)
        if node.op == STOP:
            latest, last = self._latest.get((trace, site.invoke), (-1, None))
            self._stops[trace, site.invoke] = (latest, last) if latest > begins else (begins, None)
            return begins
        when = max(needs, begins, self._told.get((trace, site.invoke, site.step), -1))
        if when <= self._clock.at(trace, replace(site, kind="output")):
            self._told[trace, site.invoke, site.step] = when
        return when

    def require_no_site_inside_a_skipped_module(self) -> None:
        """Raise SiteError for the first node that touches a site that its own invoke skips over."""
        exclude = self._flat.exclude
        for key, skips in self._skips.items():
            for position in sorted(self._touched[key]):
                for skip in skips:
                    if position != skip and self._is_inside(position, skip) and not exclude(position, skip):
                        raise self._inside(position, skip)

    def _is_inside(self, position: int, skip: int) -> bool:
        node, over = self._flat.nodes[position], self._flat.nodes[skip]
        own, around = self._card.call_at(node.site), self._card.call_at(over.site)
        assert own is not None
        assert around is not None
        if own is around:
            return node.op == SKIP and position > skip
        return around.enter < own.enter and own.exit < around.exit

    def _inside(self, position: int, skip: int) -> SiteError:
        node, over = self._flat.nodes[position], self._flat.nodes[skip].site
        origin = self._flat.origin[position]
        if node.op == SKIP and node.site == over:
            return SiteError(f"{over.module} is skipped twice in one pass", node=origin)
        step = f" in step {over.step}" if over.step else ""
        return SiteError(
            f"{node.site} is inside {over.module}, which is skipped{step} and does not run for this input; "
            f"there is nothing to read or write there. Touch it in another invoke, or skip less",
            node=origin,
        )

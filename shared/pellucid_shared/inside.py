"""What a card knows of the calls inside modules, ``module.source``: names, structures, and when they happen.

A module's own calls of torch functions lie between its children's: each happens after so many of them have
ended. The clock of sites is the card's, made finer, so that there are places between any two events of
modules for every call: its input, then its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .card import Body, Call, Fields, InsideCall, ModelCard, Sequence, Structure, TensorLeaf, leaf_at
from .errors import SiteError, did_you_mean
from .values import CALL, CALL_INPUT, INSIDE, Site

#: Calls of one body are numbered below this; numbers of tensors that only they see are made with it.
_MOST_OBJECTS = 100_000


@dataclass(frozen=True, slots=True)
class Moment:
    """Which call a position on the fine clock belongs to; ``kind`` as a site's, ``names`` those of all calls
    of its module, in order."""

    module: str
    kind: str
    call: int
    name: str
    names: tuple[str, ...]


class Insides:
    """The calls inside the modules of one card.

    Attributes:
        scale: how many positions of the fine clock one of the card's is.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._places: list[dict[str, tuple[int, int]]] = []  # per body: name -> (gap, place in it)
        longest = 0
        for body in card.bodies:
            found: Counter[int] = Counter()
            places = {}
            for call in body.calls:
                places[call.name] = (call.after, found[call.after])
                found[call.after] += 1
            self._places.append(places)
            longest = max([longest, *found.values()])
        self.scale = 1 + 2 * longest
        self._gaps = [_gaps(calls) if card.bodies else {} for calls in (card.prefill, card.decode)]
        self._owners = [
            {start: (key, gap) for key, starts in gaps.items() for gap, start in enumerate(starts)}
            for gaps in self._gaps
        ]

    def body(self, call: Call) -> Body | None:
        """The calls inside one call of a module; None where they are not known."""
        return None if call.body is None else self._card.bodies[call.body]

    def part(self, call: Call, site: Site) -> Structure | None:
        """What the card has at a site of any kind in a call of its module; None where there is none."""
        if site.kind not in INSIDE:
            return leaf_at(call.structure(site.kind), site.path)
        inside = self._inside(call, site)
        if inside is None:
            return None
        found = leaf_at(inside.structure(site.kind), site.path[1:])
        return None if found is None else _numbered(found, call)

    def when(self, site: Site) -> int:
        """The position of a site's event on the fine clock of its pass; the site is known to exist."""
        call = self._card.call_at(site)
        assert call is not None
        if site.kind not in INSIDE:
            return self.scale * (call.exit if site.kind == "output" else call.enter)
        assert call.body is not None
        gap, place = self._places[call.body][str(site.path[0])]
        start = self._gaps[bool(site.step)][call.module, call.call][gap]
        return self.scale * start + 2 * place + (1 if site.kind == CALL_INPUT else 2)

    def at(self, step: int, within: int) -> Moment:
        """The inverse of :meth:`when`, of a position that belongs to a call inside a module."""
        start, place = divmod(within, self.scale)
        (module, number), gap = self._owners[bool(step)][start]
        call = self._card.call_at(Site(module, step=step, call=number))
        assert call is not None
        assert call.body is not None
        calls = self._card.bodies[call.body].calls
        own = [inside.name for inside in calls if inside.after == gap]
        kind = CALL_INPUT if place % 2 else CALL
        return Moment(module, kind, number, own[(place - 1) // 2], tuple(inside.name for inside in calls))

    def is_eager(self, site: Site) -> bool:
        """Whether the site is there only under eager attention."""
        body = self._body_at(site) if site.kind in INSIDE else None
        return body is not None and body.eager

    def packs(self, site: Site) -> bool:
        """Whether invokes that share a pass can be told apart at a site as far as calls go: those inside its
        module are the same in a packed pass, and no other name of the model's is for the same memory."""
        if site.kind not in INSIDE:
            return True
        body = self._body_at(site)
        inside = body.index.get(str(site.path[0])) if body is not None and site.path else None
        if inside is None or body is None:
            return False
        return body.packs and (inside.output_packs if site.kind == CALL else inside.input_packs)

    def require(self, call: Call, site: Site) -> None:
        """Raise SiteError unless the call a site names is one that its module makes; says which it makes."""
        if site.kind not in INSIDE or self._inside(call, site) is not None:
            return
        asked, where = str(site.path[0]) if site.path else "", site.module or "the model"
        body = self.body(call)
        if body is None:
            when = "a step of generation after the first" if site.step else "a forward pass"
            raise SiteError(
                f"{where}.source has no {asked}: what {where} calls in {when} differs from input to input, "
                "or from what it is under eager attention; read its .input and .output instead"
            )
        names = [inside.name for inside in body.calls]
        function, _, ordinal = asked.rpartition("_")
        same = [name for name in names if name.rpartition("_")[0] == function]
        if same and ordinal.isdigit():
            raise SiteError(
                f"{where}.source has no {asked}: {function} is called so that there are {', '.join(same)}"
            )
        near = did_you_mean(asked, names) or did_you_mean(f"{asked}_0", names)
        has = f"It calls {', '.join(names)}" if names else "It calls nothing of its own"
        raise SiteError(f"{where}.source has no {asked}.{near} {has}")

    def _body_at(self, site: Site) -> Body | None:
        call = self._card.call_at(site)
        return None if call is None else self.body(call)

    def _inside(self, call: Call, site: Site) -> InsideCall | None:
        if call.body is None or not site.path:
            return None
        return self._card.bodies[call.body].index.get(str(site.path[0]))


def _gaps(calls: tuple[Call, ...]) -> dict[tuple[str, int], list[int]]:
    """Each call of a module -> the events behind which its own code runs: its start, its children's ends."""
    gaps: dict[tuple[str, int], list[int]] = {}
    running: list[Call] = []
    for call in calls:
        while running and running[-1].exit < call.enter:
            running.pop()
        if running:
            gaps[running[-1].module, running[-1].call].append(call.exit)
        gaps[call.module, call.call] = [call.enter]
        running.append(call)
    return gaps


def _numbered(structure: Structure, call: Call) -> Structure:
    """A part of a body with the numbers that its tensors have in this call of its module."""
    if isinstance(structure, TensorLeaf):
        assert structure.object is not None
        own = -1 - call.enter * _MOST_OBJECTS - structure.object  # no module takes or returns it
        return structure.model_copy(update={"object": call.shared.get(structure.object, own)})
    if isinstance(structure, Sequence):
        return Sequence(leaf=structure.leaf, items=tuple(_numbered(s, call) for s in structure.items))
    if isinstance(structure, Fields):
        items = {k: _numbered(s, call) for k, s in structure.items.items()}
        return Fields(class_name=structure.class_name, items=items)
    return structure


def calls_of(card: ModelCard, module: str, step: int = 0) -> Iterator[InsideCall]:
    """The calls inside a module's first call in a pass, in order; none where they are not known."""
    call = card.call_at(Site(module, step=step))
    body = None if call is None else card.insides.body(call)
    if body is not None:
        yield from body.calls

"""Which version of a value each node of a script reads, where edits in place come between.

A script's variables are tensors with storage that they share, as in the program. A node that runs after an
edit which the program places behind it reads a copy taken before the edit, or, where what it reads is a view
that does not exist until then, the same view of such a copy.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterator

from ..check import Checked
from ..graph import SAVE
from ..storage import Root

Moment = tuple[int, int]


class Versions:
    """The bases of views, and the edits between a node and what it reads."""

    def __init__(self, checked: Checked) -> None:
        self._nodes, self._timeline = checked.flat.nodes, checked.timeline
        self.base = checked.timeline.bases
        self._edits: dict[Root, list[tuple[Moment, int]]] = defaultdict(list)
        for position, effects in enumerate(self._timeline.effects):
            for root in effects:
                insort(self._edits[root], (self.moment(position), position))

    def moment(self, position: int) -> Moment:
        """When a node runs: nodes of one event in program order."""
        return self._timeline.ready[position], position

    def edit_between(self, reader: int, source: int, *, copied: bool = False) -> int | None:
        """The first edit of a value that runs before its reader and stands behind it in the program.

        A save shows the last version, and a view goes with what it is a view of; ``copied``: this one turns
        out to be a copy.
        """
        if self._nodes[reader].op == SAVE or (self.base[reader] == source and not copied):
            return None
        born = self.moment(self._root(source))
        found = [
            (when, edit)
            for root in self._timeline.roots[source]
            for when, edit in self._edits[root]
            if edit > reader and born < when < self.moment(reader)
        ]
        return min(found)[1] if found else None

    def edited_apart(self, position: int) -> bool:
        """Whether the value a ``site.set`` writes is edited later, and not by way of the site."""
        when, site = self._timeline.ready[position], self._timeline.roots[position]
        for root in self._roots_read(position):
            for (ready, _), edit in self._edits[root]:
                if ready > when and not self._timeline.effects[edit] & site:
                    return True
        return False

    def _roots_read(self, position: int) -> Iterator[Root]:
        for ref in self._nodes[position].refs():
            yield from self._timeline.roots[ref]

    def _root(self, position: int) -> int:
        base = self.base[position]
        return position if base is None else self._root(base)

"""Branches and loops that run on the server: ``tracer.cond``, ``tracer.loop``, ``tracer.while_``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from pellucid_shared.errors import RecordingError
from pellucid_shared.flow import FLAG, INDEX, MAX_TURNS, PICK, UNTIL, WHILE
from pellucid_shared.ops import lookup
from pellucid_shared.regions import Cond, Loop
from pellucid_shared.values import Ref

from ._call import call, graph_value, spelled, value_of
from ._carry import Carry
from ._lines import users_line
from ._recorder import Recorder
from ._turns import Number
from ._value import Value


class Branches:
    """``tracer.cond``: call it with a flag to begin; ``elif_`` and ``else_`` continue the branch just closed.

    A flag is a value of one element, or what Python or a loop's number decides. One branch runs.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, flag: Any) -> Branch:
        """``with tracer.cond(flag):``"""
        return Branch(self._recorder, flag, first=True)

    def elif_(self, flag: Any) -> Branch:
        """``with tracer.cond.elif_(flag):`` runs where no branch before did and the flag holds."""
        return Branch(self._recorder, flag, first=False)

    def else_(self) -> Branch:
        """``with tracer.cond.else_():`` runs where no branch before did."""
        return Branch(self._recorder, None, first=False)


class Branch:
    """One branch, and the block that is written about it.

    Reads and writes inside keep their own sites. Values leave it by edits in place of values from before, by
    ``tracer.select``, by lists, by what a loop carries, and by saves: what a branch saves that did not run
    has no value.
    """

    def __init__(self, recorder: Recorder, flag: Any, *, first: bool) -> None:
        self._recorder, self._flag, self._first = recorder, flag, first

    def __enter__(self) -> None:
        recorder = self._recorder
        parent = recorder.current_region()
        after = None if self._first else recorder.closed_branches.pop(parent, None)
        if not self._first and after is None:
            raise RecordingError(
                "elif_ and else_ continue a branch: open one beside it first, `with tracer.cond(flag):`",
                where=users_line(),
            )
        flag = None if self._flag is None and not self._first else take_flag(recorder, self._flag)
        recorder.open_region(Cond(parent, flag, after))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        closed = self._recorder.close_region()
        region = self._recorder.regions[closed]
        if isinstance(region, Cond) and region.flag is not None:
            self._recorder.closed_branches[region.parent] = closed


class Turns:
    """``tracer.loop(n)`` or ``tracer.loop(values)``: a body that is written once and run turn by turn.

    ``with loop as i:`` gives the number of the turn, or its member of the values. What is saved inside comes
    back as a list with an entry for each turn that ran.
    """

    def __init__(
        self,
        recorder: Recorder,
        count: int,
        members: Any = None,
        *,
        condition: Callable[[], Any] | None = None,
        bounded: bool = False,
    ) -> None:
        self._recorder, self._count, self._members = recorder, count, members
        self._condition, self._bounded = condition, bounded
        self._carries: list[Carry] = []
        self._region: int | None = None
        self._ends = False

    def carry(self, start: Any) -> Carry:
        """What goes from turn to turn: ``start`` in the first, then what ``set`` was given last.

        Args:
            start: a value, a tensor, or a number; its shape and dtype are kept.
        """
        if self._region is not None:
            raise RecordingError(
                "what a loop carries is made before its block: loop = tracer.loop(n); acc = loop.carry(x); "
                "with loop as i: ...",
                where=users_line(),
            )
        made = Carry(self._recorder, start)
        self._carries.append(made)
        return made

    def until(self, flag: Any) -> None:
        """The loop ends here if the flag holds: neither the rest of this turn nor a later one runs."""
        if self._region is None or self._recorder.current_region() != self._region:
            raise RecordingError(
                "until() stands in the body of its loop itself, not in a branch or body inside; put what it "
                "depends on into its flag, (a & b)",
                where=users_line(),
            )
        self._end(UNTIL, flag)

    def _end(self, op: str, flag: Any) -> None:
        self._recorder.add(op, (Ref(take_flag(self._recorder, flag)),))
        self._ends = True

    def __enter__(self) -> Any:
        recorder = self._recorder
        if self._region is not None:
            raise RecordingError("a loop is opened once; make another", where=users_line())
        parent = recorder.loop_parent()
        self._region = recorder.open_region(Loop(parent, self._count, self._bounded))
        try:
            for carry in self._carries:
                carry.begin()
            if self._condition is not None:
                self._end(WHILE, self._condition())
            index = recorder.add(INDEX)
            return Number(recorder, index) if self._members is None else self._member(index)
        except BaseException:
            recorder.close_region()
            raise

    def _member(self, index: int) -> Any:
        recorder, members = self._recorder, self._members
        if isinstance(members, list):
            node = recorder.add(PICK, (graph_value(members, recorder), Ref(index)))
            if isinstance(recorder.spec(node), bool | int | float):
                return Number(recorder, node)
            return value_of(recorder, node)
        return value_of(
            recorder, recorder.add(lookup("getitem").id, (graph_value(members, recorder), Ref(index)))
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.close_region()
        if error is None and self._bounded and not self._ends:
            raise RecordingError(
                "nothing ends this loop: give while_ a condition, while_(lambda: flag, max_turns=n), or call "
                "loop.until(flag) inside",
                where=users_line(),
            )


def loop(recorder: Recorder, over: Any) -> Turns:
    """A loop of so many turns, or over so many members.

    Raises:
        RecordingError: neither a count nor something with a known length.
    """
    recorder.loop_parent()  # from here on a session may have values outside its traces
    if type(over) is int:
        if not 0 <= over <= MAX_TURNS:
            raise RecordingError(f"a loop has 0 to {MAX_TURNS} turns, found {over}", where=users_line())
        return Turns(recorder, over)
    if isinstance(over, Carry):
        over = over.value
    if isinstance(over, Value):
        return Turns(recorder, len(over), over)
    if isinstance(over, str | dict) or (not isinstance(over, Sequence) and not hasattr(over, "shape")):
        raise RecordingError(
            f"a loop takes a number of turns, a list, a range or a tensor, found a {type(over).__name__}; "
            "where the run alone knows how often, write tracer.while_(lambda: flag, max_turns=n)",
            where=users_line(),
        )
    members = list(over) if isinstance(over, Sequence) else over
    wrong = next((m for m in members if isinstance(m, str)), None) if isinstance(members, list) else None
    if wrong is not None:
        raise RecordingError(
            f"a loop over texts ({wrong!r:.40}) has no meaning: a body is written once, and the prompts of "
            "its traces with it; write a Python loop over the traces of a session",
            where=users_line(),
        )
    return Turns(recorder, len(members), members)


def while_(recorder: Recorder, condition: Callable[[], Any] | None, max_turns: Any) -> Turns:
    """A loop that ends itself: its condition is written once, and asked before each turn.

    Raises:
        RecordingError: the condition is no function, or the bound no count.
    """
    if condition is not None and (isinstance(condition, Value) or not callable(condition)):
        raise RecordingError(
            f"the condition of while_ is asked before each turn, so it is a function: "
            f"while_(lambda: flag, max_turns=n); found a {type(condition).__name__}",
            where=users_line(),
        )
    if type(max_turns) is not int or not 0 <= max_turns <= MAX_TURNS:
        raise RecordingError(
            f"max_turns is a number from 0 to {MAX_TURNS}, found {max_turns!r:.60}", where=users_line()
        )
    return Turns(recorder, max_turns, condition=condition, bounded=True)


def select(recorder: Recorder, flag: Any, a: Any, b: Any) -> Any:
    """``a`` where the flag holds, else ``b``, broadcast against each other; both are computed."""
    recorder.current_region()
    if isinstance(flag, Carry):
        flag = flag.value
    take_flag(recorder, flag)  # refuses what is no flag
    if isinstance(flag, Value):
        flag = call(spelled("torch.reshape"), (flag, ()), {})
        if flag.spec.dtype != "bool":
            flag = flag != 0
    else:
        flag = call(spelled("torch.full"), ((), flag), {"dtype": bool})
    return call(spelled("torch.where"), (flag, a, b), {})


def take_flag(recorder: Recorder, flag: Any) -> int:
    """Record the taking of a flag; its node.

    Raises:
        ShapeError: it has not one element.
    """
    return recorder.add(FLAG, (graph_value(flag, recorder),))

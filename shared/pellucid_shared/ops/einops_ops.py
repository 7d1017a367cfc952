"""``einops.rearrange``, ``reduce`` and ``repeat``: their patterns, read in plain Python.

A pattern is that of https://einops.rocks: names, ``1``, numbers, ``...``, and groups of them in brackets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import OpArgumentError, ShapeError
from ..specs import Dim, TensorSpec, same_size
from .registry import Alias, Bound, Cost, Kind, Param
from .rules import Shape, define, is_empty, per_result, shown, take, to_sum

MAX_PATTERN = 512
#: ``...`` by itself stands for any number of axes; in brackets it is merged with what stands beside it.
DOTS, MERGED = "...", "(...)"
_TOKEN = re.compile(r"\s*(\.\.\.|…|[()]|[^\s().…]+)")

#: An axis is a group of names; ``1`` is the empty group, other numbers are names of their own.
Axis = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Both sides of a pattern, and the sizes of the axes that it names by number."""

    left: tuple[Axis, ...]
    right: tuple[Axis, ...]
    numbers: Mapping[str, int]

    def names(self, side: tuple[Axis, ...]) -> set[str]:
        """The names of one side; ``...`` is one."""
        return {DOTS if name == MERGED else name for axis in side for name in axis}


def parse(pattern: str) -> Pattern:
    """Read a pattern.

    Raises:
        OpArgumentError: says what cannot be read.
    """
    if len(pattern) > MAX_PATTERN:
        raise OpArgumentError(f"a pattern has at most {MAX_PATTERN} characters, found {len(pattern)}")
    sides = pattern.split("->")
    if len(sides) != 2:
        raise OpArgumentError(f"{pattern!r} has one '->' between its two sides")
    numbers: dict[str, int] = {}
    left, right = (_side(side, pattern, numbers) for side in sides)
    if any(MERGED in axis for axis in left):
        raise OpArgumentError(f"{pattern!r}: ... stands in brackets on the right side only")
    return Pattern(left, right, numbers)


def _side(side: str, pattern: str, numbers: dict[str, int]) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    group: list[str] | None = None
    seen: set[str] = set()
    rest = side.rstrip()
    while rest:
        match = _TOKEN.match(rest)
        if match is None:
            raise OpArgumentError(f"{pattern!r}: cannot read {rest.strip()!r}")
        token, rest = match[1].replace("…", DOTS), rest[match.end() :]
        if token in "()":
            if (token == "(") != (group is None):
                raise OpArgumentError(f"{pattern!r}: brackets do not pair, or stand inside brackets")
            if group is None:
                group = []
            else:
                axes.append(tuple(group))
                group = None
            continue
        names = _names(token, pattern, numbers)
        if seen.intersection(names):
            raise OpArgumentError(f"{pattern!r} names {token} twice on one side")
        seen.update(names)
        if group is None:
            axes.append(names)
        else:
            group.extend(MERGED if name == DOTS else name for name in names)
    if group is not None:
        raise OpArgumentError(f"{pattern!r}: a bracket is not closed")
    return tuple(axes)


def _names(token: str, pattern: str, numbers: dict[str, int]) -> Axis:
    """No name for ``1``, a fresh one for another number, else the token."""
    if token == DOTS:
        return (DOTS,)
    if token.isdecimal():
        if token == "1":
            return ()
        if int(token) == 0:
            raise OpArgumentError(f"{pattern!r}: an axis has at least one element")
        name = f"{token}#{len(numbers)}"
        numbers[name] = int(token)
        return (name,)
    if not token.isidentifier() or token[0] == "_" or token[-1] == "_":
        raise OpArgumentError(f"{pattern!r}: {token!r} is no name of an axis")
    return (token,)


def resolved(pattern: Pattern, shape: Shape, lengths: Mapping[str, int]) -> tuple[dict[str, int], Shape]:
    """The size of every name of the left side and of ``lengths``, and the shape ``...`` stands for.

    Raises:
        ShapeError: the pattern does not fit the shape; names the axis.
        OpArgumentError: a size that is needed and not given.
    """
    has_dots = (DOTS,) in pattern.left
    plain = len(pattern.left) - has_dots
    if len(shape) < plain or (not has_dots and len(shape) != plain):
        least = "at least " if has_dots else ""
        raise ShapeError(f"the pattern is for {least}{plain} axes, found shape {shown(shape)}")
    start = pattern.left.index((DOTS,)) if has_dots else len(shape)
    covered = shape[start : len(shape) - plain + start] if has_dots else ()
    sizes = {**lengths, **pattern.numbers}
    rest = [axis for axis in pattern.left if axis != (DOTS,)]
    for axis, size in zip(rest, shape[:start] + shape[start + len(covered) :], strict=True):
        unknown = [name for name in axis if name not in sizes]
        known = math.prod(int(sizes[name]) for name in axis if name in sizes)
        if len(unknown) > 1:
            raise OpArgumentError(f"the sizes of {', '.join(unknown)} cannot be told apart; give all but one")
        if unknown:
            if known == 0 or (size % known and not isinstance(size, Dim)):
                raise ShapeError(
                    f"an axis of {size} elements does not part into ({' '.join(axis)}) by {known}"
                )
            found = int(size) // known
            sizes[unknown[0]] = Dim(found) if isinstance(size, Dim) else found
        elif not same_size(known, size):
            raise ShapeError(f"({' '.join(axis)}) has {known} elements, the axis {size}, in {shown(shape)}")
    return sizes, covered


def _result(pattern: Pattern, sizes: Mapping[str, int], covered: Shape) -> Shape:
    shape: list[int] = []
    for axis in pattern.right:
        if axis == (DOTS,):
            shape.extend(covered)
            continue
        total: int = 1
        for name in axis:
            total = total * (TensorSpec(covered).numel if name == MERGED else sizes[name])
        shape.append(total)
    return tuple(shape)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(name.partition("#")[0] for name in names))


def _read(bound: Bound) -> tuple[Pattern, set[str], set[str]]:
    """The pattern, and the names that stand on its left side only and on its right side only."""
    pattern = parse(bound["pattern"])
    left, right = pattern.names(pattern.left), pattern.names(pattern.right)
    if DOTS in right - left:
        raise OpArgumentError("the pattern has ... on its right side and not on its left")
    if unused := set(bound["axes_lengths"]) - left - right:
        raise OpArgumentError(f"the pattern has no axis {_listed(unused)}")
    return pattern, left - right, right - left


def _rearrange(bound: Bound) -> TensorSpec:
    pattern, gone, new = _read(bound)
    if pattern.numbers:
        raise OpArgumentError("an axis of rearrange is named, or 1")
    if gone or new:
        raise OpArgumentError(
            f"{_listed(gone | new)} stands on one side of the pattern; rearrange needs both"
        )
    sizes, covered = resolved(pattern, bound["tensor"].shape, bound["axes_lengths"])
    return TensorSpec(_result(pattern, sizes, covered), bound["tensor"].dtype)


def _repeat(bound: Bound) -> TensorSpec:
    pattern, gone, new = _read(bound)
    if gone:
        raise OpArgumentError(f"repeat keeps every axis, and {_listed(gone)} is gone from the right side")
    if unknown := new - set(bound["axes_lengths"]) - set(pattern.numbers):
        raise OpArgumentError(f"repeat makes {_listed(unknown)}: give its size")
    sizes, covered = resolved(pattern, bound["tensor"].shape, bound["axes_lengths"])
    return TensorSpec(_result(pattern, sizes, covered), bound["tensor"].dtype)


def _reduce(bound: Bound) -> TensorSpec:
    pattern, gone, new = _read(bound)
    x: TensorSpec = bound["tensor"]
    if new:
        raise OpArgumentError(f"reduce makes no axes, and {_listed(new)} is new on the right side")
    sizes, covered = resolved(pattern, x.shape, bound["axes_lengths"])
    shape, how = _result(pattern, sizes, covered), bound["reduction"]
    if not gone:
        return TensorSpec(shape, x.dtype)
    lost = [sizes[name] for name in gone if name != DOTS] + [*(covered if DOTS in gone else ())]
    if how in ("max", "min") and any(map(is_empty, lost)):
        raise ShapeError(f"{how} needs elements, found shape {shown(x.shape)}")
    if how == "mean":
        return TensorSpec(shape, take(x.dtype, "fc"))
    if how in ("max", "min"):
        return TensorSpec(shape, take(x.dtype, "bif"))
    return TensorSpec(shape, "bool" if how in ("any", "all") else to_sum(x.dtype))


def _reduce_cost(bound: Bound, result: TensorSpec) -> Cost:
    return Cost(int(bound["tensor"].numel), result.nbytes)


_TENSOR = Param("tensor", Kind.TENSOR)
_PATTERN = Param("pattern", Kind.STR)
_LENGTHS = Param("axes_lengths", Kind.INT, keywords=True, low=0, high=2**40)
_REDUCTION = Param("reduction", Kind.STR, choices=("mean", "sum", "max", "min", "prod", "any", "all"))

for _name, _params, _rule, _cost in (
    ("rearrange", (_TENSOR, _PATTERN, _LENGTHS), _rearrange, per_result(0)),
    ("repeat", (_TENSOR, _PATTERN, _LENGTHS), _repeat, per_result()),
    ("reduce", (_TENSOR, _PATTERN, _REDUCTION, _LENGTHS), _reduce, _reduce_cost),
):
    define(
        f"einops.{_name}",
        _params,
        _rule,
        _cost,
        alias=Alias.MAYBE_VIEW,
        aliases="tensor",
        spellings=(f"einops.{_name}",),
    )

"""``torch.einsum``: its equation, read in plain Python.

Letters name axes; a letter met twice in one operand takes its diagonal; letters absent from the output are
summed; ``...`` stands for axes that broadcast. https://docs.pytorch.org/docs/stable/generated/torch.einsum.html
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpArgumentError, ShapeError
from ..specs import TensorSpec, broadcast, same_size
from .registry import Alias, Bound, Cost, Kind, Param
from .rules import Shape, define, same_dtype, shown, spelled

MAX_EQUATION = 512


@dataclass(frozen=True, slots=True)
class Term:
    """The letters of one operand or of the output, before and after its ``...`` (None where it has none)."""

    before: str
    after: str | None

    @property
    def letters(self) -> str:
        return self.before + (self.after or "")


@dataclass(frozen=True, slots=True)
class Equation:
    inputs: tuple[Term, ...]
    output: Term


def parse(equation: str) -> Equation:
    """Read an equation; without ``->`` the output is what torch makes of it: ``...``, then the letters met
    once, capitals first.

    Raises:
        OpArgumentError: says what cannot be read.
    """
    if len(equation) > MAX_EQUATION:
        raise OpArgumentError(f"an equation has at most {MAX_EQUATION} characters, found {len(equation)}")
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = tuple(_term(text, equation) for text in left.split(","))
    counts = Counter("".join(term.letters for term in inputs))
    dotted = any(term.after is not None for term in inputs)
    if not arrow:
        once = "".join(sorted(letter for letter, count in counts.items() if count == 1))
        return Equation(inputs, Term("", once) if dotted else Term(once, None))
    output = _term(right, equation)
    for letter in output.letters:
        if letter not in counts:
            raise OpArgumentError(f"{equation!r}: the output's {letter} is an axis of no operand")
        if output.letters.count(letter) > 1:
            raise OpArgumentError(f"{equation!r}: the output names {letter} twice")
    return Equation(inputs, output)


def _term(text: str, equation: str) -> Term:
    before, dots, after = text.partition("...")
    for letter in before + after:
        if letter not in string.ascii_letters:
            raise OpArgumentError(f"{equation!r}: axes are letters, found {letter!r}")
    return Term(before, after if dots else None)


def sizes_of(equation: Equation, shapes: Sequence[Shape]) -> tuple[dict[str, int], Shape]:
    """The size of every letter, and the shape ``...`` stands for.

    Raises:
        ShapeError: axes of one letter that do not agree; names the shapes.
    """
    if len(shapes) != len(equation.inputs):
        raise OpArgumentError(f"the equation is for {len(equation.inputs)} operands, found {len(shapes)}")
    sizes: dict[str, int] = {}
    covered: list[Shape] = []
    for term, shape in zip(equation.inputs, shapes, strict=True):
        named = len(term.letters)
        if len(shape) < named or (term.after is None and len(shape) > named):
            raise ShapeError(f"{named} letters do not name the axes of an operand of shape {shown(shape)}")
        tail = len(shape) - len(term.after or "")
        if term.after is not None:
            covered.append(shape[len(term.before) : tail])
        own: dict[str, int] = {}
        for letter, size in zip(term.letters, shape[: len(term.before)] + shape[tail:], strict=True):
            if letter in own and not same_size(own[letter], size):
                raise ShapeError(f"axis {letter} is both {own[letter]} and {size} in shape {shown(shape)}")
            own[letter] = size
        for letter, size in own.items():
            together = broadcast((sizes.get(letter, 1),), (size,))
            if together is None:
                raise ShapeError(
                    f"axis {letter} is {sizes[letter]} in one operand and {size} in another, "
                    f"of shapes {shown(*shapes)}"
                )
            sizes[letter] = together[0]
    dots = broadcast(*covered)
    if dots is None:
        raise ShapeError(f"what ... stands for does not broadcast: {shown(*covered)}")
    return sizes, dots


def _shapes(bound: Bound) -> list[Shape]:
    return [t.shape for t in bound["operands"]]


def _einsum(bound: Bound) -> TensorSpec:
    equation = parse(bound["equation"])
    sizes, dots = sizes_of(equation, _shapes(bound))
    dtype = same_dtype(*bound["operands"])
    if dtype in ("bool", "uint8", "int8", "int16", "int32"):
        # torch's result is int64 or not, depending on which axes it happens to sum first.
        raise ShapeError(f"takes floating, complex or int64 tensors, found {dtype}; convert with .to()")
    output = equation.output
    middle = dots if output.after is not None else ()
    after = tuple(sizes[letter] for letter in output.after or "")
    return TensorSpec((*(sizes[letter] for letter in output.before), *middle, *after), dtype)


def _einsum_cost(bound: Bound, result: TensorSpec) -> Cost:
    # Each pairwise contraction, in whatever order, costs no more than the product of all sizes.
    sizes, dots = sizes_of(parse(bound["equation"]), _shapes(bound))
    everything = math.prod(map(int, (*sizes.values(), *dots)))
    return Cost(2 * everything * max(len(bound["operands"]) - 1, 1), result.nbytes)


define(
    "torch.einsum",
    (Param("equation", Kind.STR), Param("operands", Kind.TENSORS, variadic=True)),
    _einsum,
    _einsum_cost,
    alias=Alias.MAYBE_VIEW,
    aliases="operands",
    # One operand may come back transposed or as its diagonal; a product is new.
    alias_rule=lambda bound: Alias.MAYBE_VIEW if len(bound["operands"]) == 1 else Alias.FRESH,
    spellings=spelled("einsum", "torch"),
)

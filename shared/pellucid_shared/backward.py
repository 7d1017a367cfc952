"""Backward passes: what their nodes may take, when they run, and in which order gradients come.

A backward pass runs behind the forward passes of its trace. Gradients come in the reverse order in which the
values were made: each has a position of its own on the clock, those of one tensor the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import GradientError, ShapeError
from .flat import Flat
from .graph import BACKWARD, GET, GRAD, SET_GRAD, Node
from .ops import Cost
from .regions import Trace
from .specs import DTYPES, TensorSpec, is_complex, is_floating, same_size
from .values import Value

#: When a tensor was made: position on the clock, and a number that orders those of one position.
Made = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Backward:
    """One backward pass.

    Attributes:
        node: its grad.backward.
        trace: number of the trace it runs behind.
        values: nodes whose gradients are named in it.
    """

    node: int
    trace: int
    values: tuple[int, ...]


def backwards(flat: Flat) -> tuple[Backward, ...]:
    """The backward passes of a job, in order."""
    nodes = [(i, node) for i, node in enumerate(flat.nodes) if node.op == BACKWARD]
    values: list[dict[int, None]] = [{} for _ in nodes]
    for node in flat.nodes:
        if node.op in (GRAD, SET_GRAD):
            values[node.args[1]][node.args[0].node] = None
    return tuple(Backward(i, node.region, tuple(v)) for (i, node), v in zip(nodes, values, strict=True))


class Schedule:
    """Where on the clock the gradients of each backward pass are.

    Args:
        made: per node, when its tensor was made; where that is not known yet, all gradients of a pass are
            given one position.
    """

    def __init__(self, flat: Flat, made: Sequence[Made] | None = None) -> None:
        self.passes = backwards(flat)
        self.number = {each.node: number for number, each in enumerate(self.passes)}
        self._ranks: list[dict[Made, int]] = []
        self._made = made
        if made is not None:
            for each in self.passes:
                latest_first = sorted({made[v] for v in each.values}, reverse=True)
                self._ranks.append({key: rank for rank, key in enumerate(latest_first)})

    def stretches(self) -> list[tuple[int, int]]:
        """Per pass its trace, and how many positions it has."""
        if self._made is None:
            return [(each.trace, 2) for each in self.passes]
        return [(each.trace, 1 + len(r)) for each, r in zip(self.passes, self._ranks, strict=True)]

    def rank(self, number: int, value: int) -> int:
        """The place of a value's gradient among those of a pass."""
        return 0 if self._made is None else self._ranks[number][self._made[value]]


def require_one_pass(trace: Trace) -> None:
    """Raise GradientError where a trace generates."""
    if trace.generation is not None:
        raise GradientError(
            "a generation has no gradients: it chooses tokens step by step. Generate first, and take "
            "gradients in a trace over the ids it gives"
        )


def name_of(flat: Flat, node: int) -> str:
    """A value for people: its site, or the op that makes it."""
    made = flat.nodes[node]
    if made.op == GRAD:
        return f"the gradient of {name_of(flat, made.args[0].node)}"
    return str(made.site) if made.op == GET else f"the value of {made.op}"


def check_gradient(node: Node, args: Sequence[Any], trace: Trace) -> tuple[TensorSpec | None, Cost]:
    """Spec and cost of a node of a backward pass; the pass itself is charged by :func:`pass_cost`.

    Raises:
        GradientError: the trace generates, or the value's dtype has no gradients.
        ShapeError: the loss is not one number, or a gradient does not have its value's shape.
    """
    require_one_pass(trace)
    value = args[0]
    what = "the loss" if node.op == BACKWARD else "the value"
    if not isinstance(value, TensorSpec):
        raise GradientError(f"{what} is a {type(value).__name__}; a gradient is that of one tensor")
    if not (is_floating(value.dtype) or is_complex(value.dtype)):
        raise GradientError(f"{what} is {value}: only floating types have gradients")
    if node.op == GRAD:
        return value, Cost(0, value.nbytes)
    if node.op == SET_GRAD:
        _fits(value, args[2], "a gradient has its value's shape")
        return None, Cost(0, value.nbytes)
    if len(args) > 1 and args[1] is not None:
        if not isinstance(args[1], TensorSpec):
            raise ShapeError("backward(gradient) takes a tensor of the loss's shape")
        _fits(value, args[1], "backward(gradient) takes the loss's shape")
    elif value.numel != 1:
        raise ShapeError(
            f"the loss has shape {list(value.shape)}; backward() starts at one number: reduce it with .sum() "
            "or .mean(), or give backward(gradient) a tensor of its shape"
        )
    return None, Cost(0, value.nbytes)


def pass_cost(costs: Mapping[int, Cost], trace: int) -> Cost:
    """A backward pass costs twice what the trace's own ops cost so far; they keep what they took."""
    before = costs.get(trace, Cost(0, 0))
    return Cost(2 * before.flops, before.bytes)


def _fits(value: TensorSpec, given: Value, rule: str) -> None:
    if isinstance(given, TensorSpec):
        if given.ndim != value.ndim or not all(map(same_size, given.shape, value.shape)):
            raise ShapeError(
                f"{rule}: it is {list(value.shape)}, and it was given {list(given.shape)} "
                "(edit a part with .grad[...] = value)"
            )
        if given.dtype != value.dtype and not (is_floating(given.dtype) and is_floating(value.dtype)):
            raise ShapeError(f"{rule} and dtype: it is {value.dtype}, and it was given {given.dtype}")
    elif not isinstance(given, bool | int | float | complex):
        raise ShapeError(f"{rule}: it takes a tensor or a number, found a {type(given).__name__}")
    elif isinstance(given, complex) and DTYPES[value.dtype].category < 3:
        raise ShapeError(f"{rule} and dtype: it is {value.dtype} and cannot be filled with {given!r}")

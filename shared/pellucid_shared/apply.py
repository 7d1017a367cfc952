"""The shape rule of a module applied out of order, read off the module's own call in the card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .card import Call, Fields, ModelCard, PlainLeaf, Structure, TensorLeaf
from .card import Sequence as Items
from .errors import OpArgumentError, ShapeError, SiteError
from .ops import Cost
from .specs import Spec, TensorSpec, same_size


def infer_apply(
    path: str, args: Sequence[Any], kwargs: Mapping[str, Any], card: ModelCard
) -> tuple[Spec, Cost]:
    """Spec and cost of ``module(*args, **kwargs)``.

    The first tensor given stands for the first tensor the module took when it was probed: its last,
    constant axes must agree, and the axes before them (batch, tokens, or whatever the user has there)
    are carried over to the output.

    Raises:
        SiteError: the probe never saw the module run, so nothing is known of its output.
        OpArgumentError: no tensor is given.
        ShapeError: the constant axes do not agree.
    """
    name = path or "the model"
    call = card.call_index.get((path, 0))
    if call is None:
        raise SiteError(f"{name} does not run in a forward pass of {card.id}; what it returns is not known")
    given = _first_tensor([*args, *kwargs.values()])
    if given is None:
        raise OpArgumentError(f"{name} is applied to no tensor; give it the value to work on")
    template = _template(call)
    if template is None or template.shape is None:
        raise SiteError(f"the input of {name} has no known shape, so it cannot be applied out of order")
    constant = _constant_tail(template.shape)
    tail = given.shape[given.ndim - len(constant) :] if given.ndim >= len(constant) else given.shape
    if len(tail) != len(constant) or not all(map(same_size, tail, constant)):
        wanted = ", ".join(("...", *map(str, constant)))
        raise ShapeError(f"{name} takes [{wanted}] and was given {list(given.shape)}")
    leading = given.shape[: given.ndim - len(constant)]
    result = _output(call.output, template, leading, given.dtype)
    weights = sum(
        math.prod(s for s in leaf.shape or () if isinstance(s, int))
        for module in card.modules
        if module.path == path or module.path.startswith(f"{path}.") or not path
        for leaf in module.parameters.values()
    )
    rows = math.prod(leading)
    return result, Cost(2 * weights * rows, _nbytes(result))


def returns_its_input(path: str, card: ModelCard) -> bool:
    """Whether the module gives back the very tensor it takes, as dropout does in evaluation mode."""
    call = card.call_index.get((path, 0))
    if call is None or not isinstance(call.output, TensorLeaf):
        return False
    taken = _template(call)
    return taken is not None and taken.object is not None and taken.object == call.output.object


def _template(call: Call) -> TensorLeaf | None:
    for leaf in (*call.args, *call.kwargs.values()):
        if isinstance(leaf, TensorLeaf):
            return leaf
    return None


def _first_tensor(values: Sequence[Any]) -> TensorSpec | None:
    return next((v for v in values if isinstance(v, TensorSpec)), None)


def _constant_tail(shape: Sequence[int | str]) -> tuple[int, ...]:
    tail: list[int] = []
    for size in reversed(shape):
        if isinstance(size, str):
            break
        tail.insert(0, size)
    return tuple(tail)


def _output(structure: Structure, template: TensorLeaf, leading: tuple[int, ...], dtype: str) -> Spec:
    """The output's structure with the leading axes of the value given in place of batch and tokens."""
    if isinstance(structure, TensorLeaf):
        if structure.shape is None:
            return None
        tail = _constant_tail(structure.shape)
        # A module that keeps its input's dtype keeps the given one's.
        kept = dtype if structure.dtype == template.dtype else structure.dtype
        return TensorSpec((*leading, *tail), kept)
    if isinstance(structure, Items):
        items = [_output(item, template, leading, dtype) for item in structure.items]
        return tuple(items) if structure.leaf == "tuple" else items
    if isinstance(structure, Fields):
        return {k: _output(v, template, leading, dtype) for k, v in structure.items.items()}
    if isinstance(structure, PlainLeaf):
        return None
    return None


def _nbytes(spec: Spec) -> int:
    if isinstance(spec, TensorSpec):
        return spec.nbytes
    members: list[Any] = []
    if isinstance(spec, tuple | list):
        members = list(spec)
    elif isinstance(spec, dict):
        members = list(spec.values())
    return sum(map(_nbytes, members))

"""Every op under every name users write it by: torch's own function, called on values, records that op."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from client_fixtures import CardModel
from pellucid_shared.errors import PellucidError
from pellucid_shared.ops import Op, all_ops
from pellucid_shared.specs import TensorSpec
from pellucid_shared.values import Device, DType, substitute
from test_ops_rules import STRATEGIES

EXAMPLES = 12


class EndError(Exception):
    """Leaves a block before anything is run."""


def torchs(name: str) -> Callable[..., Any] | None:
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found if callable(found) else None


SPELLINGS = [
    pytest.param(op, function, id=f"{name}")
    for op in all_ops().values()
    for name in op.spellings
    if name.startswith("torch.") and (function := torchs(name)) is not None
]


@pytest.fixture(scope="module")
def model() -> CardModel:
    return CardModel()


@pytest.mark.parametrize(("op", "function"), SPELLINGS)
def test_torchs_function_records_its_op(model: CardModel, op: Op, function: Callable[..., Any]) -> None:
    tried = 0

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[op.id])
    def recorded(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        nonlocal tried
        try:
            spec, _ = op.infer(*arguments)
        except PellucidError:
            assume(False)
        with contextlib.suppress(EndError), model.trace("hello") as tracer:
            args, kwargs = substitute(list(arguments), as_users_write)
            before = len(tracer.graph.nodes)
            call_torch(function, args, kwargs)
            assert tracer.graph.nodes[before].op == op.id
            assert str(tracer._recorder.spec(before)) == str(spec) or op.alias.name == "INPLACE"
            tried += 1
            raise EndError

    recorded()
    assert tried, "no generated arguments were taken"


def call_torch(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*args, **kwargs)
        except TypeError as error:  # torch's own parser: a method of a number, an int where ints belong
            if isinstance(error, PellucidError):
                raise
            assume(False)


def as_users_write(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.zeros(value.shape, dtype=getattr(torch, value.dtype))
    if isinstance(value, DType):
        return getattr(torch, value.name)
    return torch.device(value.name) if isinstance(value, Device) else value

"""Every op's rule, held against torch by generated arguments: structure, shapes, dtypes, errors, aliasing.

Each call is run on meta tensors and on small real ones. Real tensors have the last word on what torch
refuses, save where the CPU lacks a kernel for a half-precision dtype that an accelerator has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import op_strategies
import op_strategies_b
import op_strategies_c
from pellucid_shared.errors import PellucidError, UnknownOpError
from pellucid_shared.ops import Alias, Op, all_ops
from pellucid_shared.ops.rules import specs_in
from pellucid_shared.specs import DTYPES, Dim, TensorSpec
from pellucid_shared.values import Device, DType, substitute
from pellucid_worker.kernels import KERNELS, kernel, takes_device

STRATEGIES = {**op_strategies.STRATEGIES, **op_strategies_b.STRATEGIES, **op_strategies_c.STRATEGIES}
STRICTER = {**op_strategies.STRICTER, **op_strategies_b.STRICTER, **op_strategies_c.STRICTER}
META_ONLY = op_strategies.META_ONLY | op_strategies_b.META_ONLY | op_strategies_c.META_ONLY
REAL_ONLY = op_strategies.REAL_ONLY | op_strategies_b.REAL_ONLY | op_strategies_c.REAL_ONLY
INTEGER_FILL = {**op_strategies.INTEGER_FILL, **op_strategies_b.INTEGER_FILL, **op_strategies_c.INTEGER_FILL}
OPS = tuple(all_ops().values())

HALF = {"float16", "bfloat16"}
EXAMPLES = 40

Make = Callable[[TensorSpec], torch.Tensor]


@dataclass
class Outcome:
    """What torch made of a call: a value, or the error it raised."""

    value: Any = None
    error: Exception | None = None
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def unsupported(self) -> bool:
        """The backend has no kernel for a dtype, or none at all."""
        words = ("not implemented", "Could not run", "not supported for", "not currently supported")
        return self.error is not None and (
            isinstance(self.error, NotImplementedError) or any(word in str(self.error) for word in words)
        )


def real_tensor(spec: TensorSpec, integer: int) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.linspace(0.25, 0.75, max(int(spec.numel), 1))[: int(spec.numel)]
        return values.reshape(spec.shape).to(dtype)
    return torch.full(spec.shape, integer, dtype=dtype)


def meta_tensor(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")


def run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], make: Make) -> Outcome:
    """Call the op's kernel as the engine does."""
    tensors: list[torch.Tensor] = []

    def resolve(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            tensors.append(make(value))
            return tensors[-1]
        return getattr(torch, value.name) if isinstance(value, DType) else value

    given = [substitute(v, resolve) for v in args if not isinstance(v, Device)]
    named = {k: substitute(v, resolve) for k, v in kwargs.items() if not isinstance(v, Device)}
    if takes_device(op.id):
        named["device"] = make(TensorSpec(())).device
    if op.random:
        named["generator"] = torch.Generator()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Outcome(kernel(op.id)(*given, **named), tensors=tuple(tensors))
    except Exception as error:
        return Outcome(error=error)


def reference(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outcome, ...]:
    """What torch makes of a call: on meta tensors, on real tensors, or on both."""
    outcomes = []
    if op.id not in META_ONLY:
        fill = INTEGER_FILL.get(op.id, 1)
        outcomes.append(run(op, args, kwargs, lambda spec: real_tensor(spec, fill)))
    if op.id not in REAL_ONLY and not op.random:
        outcomes.append(run(op, args, kwargs, meta_tensor))
    return tuple(outcomes)


def matches(ours: Any, theirs: Any) -> bool:
    """Whether a spec describes a value: structure, sizes (bounds hold), dtypes; plain values are equal."""
    if isinstance(ours, TensorSpec):
        return (
            isinstance(theirs, torch.Tensor)
            and f"torch.{ours.dtype}" == str(theirs.dtype)
            and ours.ndim == theirs.ndim
            and all(
                b <= a if isinstance(a, Dim) else a == b
                for a, b in zip(ours.shape, theirs.shape, strict=True)
            )
        )
    if isinstance(ours, list | tuple):
        return (
            isinstance(theirs, list if isinstance(ours, list) else tuple)
            and len(ours) == len(theirs)
            and all(map(matches, ours, theirs))
        )
    return type(ours) is type(theirs) and bool(ours == theirs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from tensors_in(member)


def storages(tensors: Iterator[torch.Tensor] | tuple[torch.Tensor, ...]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def check_aliasing(alias: Alias, outcome: Outcome) -> None:
    made, given = storages(tensors_in(outcome.value)), storages(outcome.tensors)
    if alias is Alias.FRESH:
        assert not made & given, "declared fresh, but shares storage"
    elif alias in (Alias.VIEW, Alias.INPLACE):
        assert made <= given, f"declared {alias.value}, but is new storage"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.id)
def test_rule_agrees_with_torch(op: Op) -> None:
    assert op.id in STRATEGIES, "this op has no strategy for its arguments"

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[op.id])
    def agree(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, kwargs = call
        outcomes = reference(op, args, kwargs)
        first = outcomes[0]
        try:
            ours, cost = op.infer(args, kwargs)
        except PellucidError as refusal:
            check_refusal(op, refusal, first)
            return
        assert cost.flops >= 0
        assert cost.bytes >= 0
        lacking = first.unsupported and any(s.dtype in HALF for s in specs_in([*args, *kwargs.values()]))
        assert first.error is None or lacking, f"the rule says {ours}, torch refuses: {first.error!r}"
        for outcome in outcomes:
            if outcome.error is not None:
                continue
            assert matches(ours, outcome.value), f"the rule says {ours}, torch {described(outcome.value)}"
            if isinstance(outcome.value, tuple):
                assert all(hasattr(outcome.value, field) for field in op.fields)
        if first.error is None and op.id not in META_ONLY:
            check_aliasing(op.alias_of(op.bind(args, kwargs)), first)

    agree()


def check_refusal(op: Op, refusal: PellucidError, torchs: Outcome) -> None:
    assert str(refusal).startswith(op.id), "an error names its op"
    made = [*tensors_in(torchs.value), *torchs.tensors]
    allowed = (
        torchs.error is not None
        # float16 beside complex operands gives complex32, a dtype that graphs do not carry
        or "complex32" in str([t.dtype for t in made])
        or "complex32" in str(refusal)
        # torch checks the dtype of an empty tensor only where a kernel would run
        or any(t.numel() == 0 for t in made)
        or op.id in STRICTER
    )
    assert allowed, f"torch takes this, the rule says: {refusal}"


def described(value: Any) -> Any:
    """Shapes and dtypes of a torch value, for a failure's message."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return [described(v) for v in value] if isinstance(value, list | tuple) else value


def test_every_op_has_a_kernel_and_no_kernel_is_without_an_op() -> None:
    assert set(KERNELS) == {op.id for op in OPS}
    assert all(callable(k) for k in KERNELS.values())
    assert len(OPS) >= 150


def test_an_unknown_kernel_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownOpError, match=r"no op 'torch\.sofmax'.*torch\.softmax"):
        kernel("torch.sofmax")
    for name in ("torch.load", "tensor.__class__", "os.system", "einops.einops"):
        with pytest.raises(UnknownOpError):
            kernel(name)


FORBIDDEN = (
    "__",
    "as_strided",
    "set_",
    "resize_",
    "storage",
    "numpy",
    "apply_",
    "map_",
    "data_ptr",
    "stride",
)


def test_nothing_that_reads_memory_or_runs_python_is_registered() -> None:
    for op in OPS:
        for name in (op.id, *op.spellings, op.kernel):
            last = name.rpartition(".")[2]
            found = [word for word in FORBIDDEN if word in name and not last.startswith("masked_")]
            assert not found, f"{name} contains {found}"
        assert not {"out", "layout", "memory_format", "pin_memory"} & {p.name for p in op.params}, op.id


def test_every_spelling_belongs_to_one_op_and_exists_in_torch() -> None:
    owner: dict[str, str] = {}
    for op in OPS:
        for spelling in op.spellings:
            assert owner.setdefault(spelling, op.id) == op.id, spelling
            root, *path = spelling.split(".")
            found: Any = __import__(root)
            for step in path:
                found = getattr(found, step)  # a property (Tensor.real) need not be callable


def test_every_dtype_is_torchs() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)

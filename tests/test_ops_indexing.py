"""Indexing rules against real tensors: each form of ``x[index]`` and ``x[index] = v``, and the errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid_shared.errors import IndexOutOfRangeError, OpArgumentError, PellucidError, ShapeError
from pellucid_shared.ops import Alias, lookup
from pellucid_shared.specs import Dim, TensorSpec
from pellucid_shared.values import substitute
from pellucid_worker.kernels import kernel

SHAPE = (3, 4, 5)
PAIR = torch.tensor([0, 2])
GRID = torch.tensor([[0, 1], [2, 0]])
MASK = torch.tensor([True, False, True])
PLANE = torch.arange(12).reshape(3, 4) % 2 == 0
ALL = slice(None)

FORMS: list[Any] = [
    0,
    -1,
    (0, 1),
    (0, 1, 2),
    (),
    ...,
    None,
    (None, 0, None),
    ALL,
    slice(1, None),
    slice(None, -1),
    slice(-2, None),
    slice(0, 100, 2),
    slice(2, 1),
    (ALL, slice(None, None, 3)),
    (..., 0),
    (0, ..., slice(1, 3)),
    (..., None),
    PAIR,
    PAIR.int(),
    GRID,
    torch.tensor(1),
    (torch.tensor(1), torch.tensor(-1)),
    [0, 2],
    [-1],
    [],
    [True, False, True],
    (ALL, [0, 3]),
    (ALL, [[0, 3], [1, 1]]),
    MASK,
    PLANE,
    torch.ones(SHAPE) > 0,
    torch.tensor(True),
    (ALL, PLANE[0]),
    (..., torch.arange(5) > 2),
    (PAIR, PAIR),
    (PAIR, PAIR, PAIR),
    (PAIR, ALL, PAIR),
    (ALL, PAIR, PAIR),
    (PAIR, 0),
    (0, ALL, PAIR),
    (PAIR, 0, PAIR),
    (PAIR, None, PAIR),
    (ALL, PAIR, None, PAIR),
    (None, PAIR, ALL, GRID),
    (ALL, None, PAIR),
    (GRID, ALL, PAIR),
    (MASK, PAIR),
    (MASK, ALL, [0, 4]),
    (slice(0, 2), PLANE[1]),
    (..., PAIR, slice(1, 3)),
    (PAIR[:1], slice(1, 3), GRID),
]


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def specs(value: Any) -> Any:
    return substitute(value, lambda leaf: spec(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def matches(ours: TensorSpec, theirs: torch.Tensor) -> bool:
    sizes = zip(ours.shape, theirs.shape, strict=True)
    return ours.dtype == spec(theirs).dtype and all(
        theirs <= ours if isinstance(ours, Dim) else ours == theirs for ours, theirs in sizes
    )


@pytest.mark.parametrize("index", FORMS, ids=str)
def test_what_an_index_selects_has_the_shape_the_rule_says(index: Any) -> None:
    x = torch.arange(60.0).reshape(SHAPE)
    result = kernel("getitem")(x, index)
    ours, cost = lookup("getitem").infer((spec(x), specs(index)), {})
    assert matches(ours, result)
    assert torch.equal(result, x[index])
    shares = result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    alias = lookup("getitem").alias_of({"input": spec(x), "index": specs(index)})
    assert alias is (Alias.VIEW if shares else Alias.FRESH)
    assert (cost.bytes == 0) or not shares


@pytest.mark.parametrize("index", FORMS, ids=str)
def test_setting_takes_a_number_and_whatever_broadcasts_into_the_part(index: Any) -> None:
    x = torch.zeros(SHAPE)
    part = x[index]
    # A mask's part is as long as the mask at most: only values that broadcast are known to fit.
    for value in (
        7.0,
        torch.tensor(3.0),
        torch.full((1,) * (part.ndim + 1), 2.0),
        torch.full(part.shape, 5.0),
    ):
        changed = x.clone()
        lookup("setitem").infer((spec(x), specs(index), specs(value)), {})
        assert kernel("setitem")(changed, index, value) is changed
        wanted = x.clone()
        wanted[index] = value
        assert torch.equal(changed, wanted)


WRONG: list[tuple[Any, type[PellucidError], str]] = [
    (3, IndexOutOfRangeError, r"index 3 is out of range for axis 0 of size 3"),
    (-4, IndexOutOfRangeError, r"index -4 is out of range for axis 0 of size 3"),
    ((0, 4), IndexOutOfRangeError, r"index 4 is out of range for axis 1 of size 4"),
    ((..., 5), IndexOutOfRangeError, r"index 5 is out of range for axis 2 of size 5"),
    ((None, 3), IndexOutOfRangeError, r"axis 0 of size 3"),
    ([0, 3], IndexOutOfRangeError, r"index 3 .* axis 0 of size 3, in a tensor of shape \[3, 4, 5\]"),
    ((ALL, [[0, 1], [1, -5]]), IndexOutOfRangeError, r"index -5 .* axis 1 of size 4"),
    ((0, 0, 0, 0), IndexOutOfRangeError, r"4 indices are too many for a tensor of shape \[3, 4, 5\]"),
    ((PLANE, PLANE), IndexOutOfRangeError, r"4 indices are too many"),
    ((..., ...), OpArgumentError, r"one \.\.\. at most"),
    (slice(None, None, -1), OpArgumentError, r"step is at least 1, found -1; use torch.flip"),
    (slice(None, None, 0), OpArgumentError, r"step is at least 1"),
    (1.0, OpArgumentError, r"found float 1.0"),
    ("a", OpArgumentError, r"found str 'a'"),
    (True, OpArgumentError, r"found bool True"),
    ([0, 1.5], OpArgumentError, r"found float 1.5"),
    ((ALL, [[0, 1], [1]]), OpArgumentError, r"one length"),
    ([[0, 1], [1, 2]], OpArgumentError, r"x\[a, b\]"),
    (slice(torch.tensor(1), None), OpArgumentError, r"not values of the run"),
    (torch.tensor([0.0]), ShapeError, r"int64, int32 or bool, found float32"),
    (MASK[:2], ShapeError, r"mask of shape \[2\] does not fit the axes \[3\]"),
    ((ALL, MASK), ShapeError, r"mask of shape \[3\] does not fit the axes \[4\]"),
    ((PAIR, torch.tensor([0, 1, 1])), ShapeError, r"\[2\] and \[3\] do not broadcast"),
]


@pytest.mark.parametrize(("index", "error", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_index_is_named(index: Any, error: type[PellucidError], message: str) -> None:
    for op, rest in (("getitem", ()), ("setitem", (0.0,))):
        with pytest.raises(error, match=f"{op}: .*{message}"):
            lookup(op).infer((TensorSpec(SHAPE), specs(index), *rest), {})


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (
            0,
            TensorSpec((3,)),
            r"value of shape \[3\] does not broadcast into the part set, of shape \[4, 5\]",
        ),
        ((0, 0), TensorSpec((2, 5)), r"\[2, 5\] .* \[5\]"),
        (PAIR, TensorSpec((3, 4, 5)), r"\[3, 4, 5\] .* \[2, 4, 5\]"),
        (PAIR, TensorSpec((), "float64"), r"float32, the value float64; convert it with \.to\(\)"),
        (0, TensorSpec((), "complex64"), r"imaginary"),
        (0, 1j, r"1j cannot be stored"),
        (0, 1e40, r"cannot be stored in a float32"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_both_shapes(index: Any, value: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        lookup("setitem").infer((TensorSpec(SHAPE), specs(index), value), {})


def test_sizes_that_depend_on_data_stay_bounds() -> None:
    picked, _ = lookup("getitem").infer((TensorSpec(SHAPE), TensorSpec(SHAPE, "bool")), {})
    assert repr(picked) == repr(TensorSpec((Dim(60),)))
    for index, bound in ((slice(2, None), 58), (slice(0, 2), 2), (slice(-3, None), 3), (slice(None, -1), 59)):
        part, _ = lookup("getitem").infer((picked, index), {})
        assert isinstance(part.shape[0], Dim)
        assert part.shape == (bound,)
    with pytest.raises(IndexOutOfRangeError, match="size at most 60"):
        lookup("getitem").infer((picked, 60), {})


def test_the_bound_of_a_slice_holds_for_every_length() -> None:
    ends = (None, -7, -3, -1, 0, 1, 3, 7)
    for start in ends:
        for stop in ends:
            for step in (None, 1, 2, 3):
                part = slice(start, stop, step)
                spec_of_part, _ = lookup("getitem").infer((TensorSpec((Dim(6),)), part), {})
                assert all(len(range(n)[part]) <= spec_of_part.shape[0] for n in range(7)), part


def test_members_of_structures_are_indexed_by_place_or_name() -> None:
    a, b = TensorSpec((1,)), TensorSpec((2,))
    getitem = lookup("getitem")
    assert getitem.infer(((a, b), -1), {})[0] == b
    assert getitem.infer(([a, b], slice(1, None)), {})[0] == [b]
    assert getitem.infer(({"logits": a}, "logits"), {})[0] == a
    assert getitem.alias_of({"input": (a, b), "index": 0}) is Alias.VIEW
    with pytest.raises(IndexOutOfRangeError, match="index 2 is out of range for a value of 2 members"):
        getitem.infer(((a, b), 2), {})
    with pytest.raises(OpArgumentError, match="there is no 'loss'; there is 'logits'"):
        getitem.infer(({"logits": a}, "loss"), {})

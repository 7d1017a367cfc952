"""Promotion and broadcasting, held against torch."""

import itertools

import pytest
import torch

from pellucid_shared.specs import DTYPES, Dim, TensorSpec, broadcast, promote, promote_operands

NAMES = tuple(DTYPES)
NUMBERS = (True, 3, 2.5, 1 + 2j)
PAIRS = tuple(itertools.product(NAMES, repeat=2))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def meta(dtype: str, rank: int) -> torch.Tensor:
    return torch.empty((2,) * rank, dtype=getattr(torch, dtype), device="meta")


def test_every_pair_of_dtypes_meets_where_torch_says() -> None:
    for a, b in PAIRS:
        assert promote(a, b) == name(torch.promote_types(getattr(torch, a), getattr(torch, b))), (a, b)


def test_dtype_sizes_are_torchs() -> None:
    assert {n: i.itemsize for n, i in DTYPES.items()} == {n: getattr(torch, n).itemsize for n in NAMES}


@pytest.mark.parametrize("ranks", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_tensors_and_zero_dimensional_tensors_promote_as_in_torch(ranks: tuple[int, int]) -> None:
    for a, b in PAIRS:
        ours = promote_operands([TensorSpec((2,) * ranks[0], a), TensorSpec((2,) * ranks[1], b)])
        assert ours == name(torch.result_type(meta(a, ranks[0]), meta(b, ranks[1]))), (a, b, ranks)


def test_numbers_promote_as_in_torch() -> None:
    for a, rank, number in itertools.product(NAMES, (0, 1), NUMBERS):
        expected = name(torch.result_type(meta(a, rank), number))
        assert promote_operands([TensorSpec((2,) * rank, a), number]) == expected, (a, rank, number)
        assert promote_operands([number, TensorSpec((2,) * rank, a)]) == expected, (a, rank, number)


def test_two_numbers_promote_as_in_torch() -> None:
    for a, b in itertools.product(NUMBERS, repeat=2):
        assert promote_operands([a, b]) == name(torch.result_type(a, b))


SHAPES = [(), (1,), (2,), (3,), (0,), (2, 3), (1, 3), (2, 1), (4, 2, 3), (2, 1, 1), (0, 3)]


def test_broadcasting_is_torchs() -> None:
    for a, b in itertools.product(SHAPES, repeat=2):
        try:
            expected = tuple(torch.broadcast_shapes(a, b))
        except RuntimeError:
            expected = None
        assert broadcast(a, b) == expected, (a, b)


def test_a_bound_fits_any_size_and_stays_a_bound_beside_one() -> None:
    assert broadcast((Dim(5),), (3,)) == (3,)
    found = broadcast((Dim(5),), (1,))
    assert found == (5,)
    assert found is not None
    assert isinstance(found[0], Dim)

"""``x.token[i]``: what it records, and what it refuses. What it computes is in test_experiments.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from client_fixtures import CardModel, refused
from pellucid_shared.errors import (
    IndexOutOfRangeError,
    OpArgumentError,
    PellucidError,
    ShapeError,
    ValueNotReadyError,
)
from pellucid_shared.show import show

RAGGED = [[1, 2, 3, 4, 5], [6, 7]]


def written(body: Any, prompt: Any = "hello", model: Any = None) -> list[str]:
    """The nodes that ``body(h)`` records after the read of ``h``."""
    model = model or CardModel()
    with model.trace(prompt) as tracer:
        body(model.h[0].output)
        lines = show(tracer.graph).splitlines()
        tracer._recorder.saved.clear()
    return [line.strip() for line in lines[3:]]


@pytest.mark.parametrize("spelling", ["t", "token"])
@pytest.mark.parametrize(
    ("index", "shown"),
    [
        (0, "0"),
        (-1, "-1"),
        (np.int64(2), "2"),
        (slice(1, -1), "1:-1"),
        ([0, -1], "[0, -1]"),
        (range(2), "[0, 1]"),
        (torch.tensor([0, 1]), "[0, 1]"),
    ],
)
def test_rows_of_one_length_are_indexed_as_they_are(spelling: str, index: Any, shown: str) -> None:
    model = CardModel()

    def body(h: Any) -> None:
        _ = getattr(h, spelling)[index]

    assert written(body, "hello", model) == [f"v1 = v0[:, {shown}]"]
    assert model.made.trips == [], "the length of one prompt does not matter"
    assert written(body, [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]) == [f"v1 = v0[:, {shown}]"]


def test_writes_are_ordinary_writes() -> None:
    def body(h: Any) -> None:
        h.t[0] = 1
        h.token[-1] += 2
        h.t[0:2] = h.t[1:3]

    assert written(body) == [
        "v0[:, 0] = 1; v1 = v0",
        "v2 = v0[:, -1]",
        "v3 = v2.add_(2)",
        "v4 = v0[:, 1:3]",
        "v0[:, 0:2] = v4; v5 = v0",
    ]


def test_rows_of_different_lengths_have_an_index_each() -> None:
    def body(h: Any) -> None:
        _ = h.t[0]
        _ = h.t[[0, 1]]
        _ = h.t[-2:]
        h.t[1] = 0
        h.t[0] *= 2

    assert written(body, RAGGED) == [
        "v1 = v0[[0, 1], [0, 3]]",
        "v2 = v0[[[0], [1]], [[0, 1], [3, 4]]]",
        "v3 = v0[[[0], [1]], [[3, 4], [3, 4]]]",
        "v0[[0, 1], [1, 4]] = 0; v4 = v0",
        "v5 = v0[[0, 1], [0, 3]]",
        "v6 = v5.mul_(2)",
        "v0[[0, 1], [0, 3]] = v5; v7 = v0",
    ]


def test_the_tokenizer_is_asked_only_where_rows_may_differ() -> None:
    model = CardModel()

    def last(h: Any) -> None:
        _ = h.t[-1]

    assert written(last, ["hello", "you"], model) == ["v1 = v0[:, -1]"]
    assert model.made.trips == []

    def first(h: Any) -> None:
        _ = h.t[0]

    assert written(first, ["hello", "you"], model) == ["v1 = v0[[0, 1], [0, 2]]"]
    assert model.made.trips == [["hello", "you"]]


def test_a_mask_says_where_the_prompt_begins_and_ends() -> None:
    one = {"input_ids": [[0, 1, 2, 3, 0]], "attention_mask": [[0, 1, 1, 1, 0]]}

    def body(h: Any) -> None:
        _ = h.t[0]
        _ = h.t[-1]
        _ = h.t[[0, 2]]
        h.t[1:] *= 2

    assert written(body, one) == [
        "v1 = v0[:, 1]",
        "v2 = v0[:, 3]",
        "v3 = v0[:, [1, 3]]",
        "v4 = v0[:, 2:4:1]",
        "v5 = v4.mul_(2)",
    ]


def test_where_the_tokens_are_is_followed_through_what_is_computed() -> None:
    def body(h: Any) -> None:
        _ = h.transpose(1, 2).t[0]
        _ = h.unsqueeze(1).t[0]
        _ = (h @ torch.ones(8, 3)).mean(-1).t[0]
        _ = h.view(h.shape[0], h.shape[1], 2, 4).t[0]
        _ = h[0, :].t[0]

    lines = [line for line in written(body) if "[" in line and "torch" not in line]
    assert [line.partition("= ")[2] for line in lines if ".view" not in line] == [
        "v1[:, :, 0]",
        "v3[:, :, 0]",
        "v7[:, 0]",
        "v9[:, 0]",
        "v0[0, :]",
        "v11[0]",
    ]


@pytest.mark.parametrize("parts", [(2, 4), (2, -1), (-1, 4)])
def test_shapes_may_be_written_with_the_prompts_own_numbers(parts: tuple[int, int]) -> None:
    def body(h: Any) -> None:
        assert h.view(2, 6, *parts).t[1].shape == (2, 2, 4)
        assert h.reshape(2, 6, *parts).t[[0, 1]].shape == (2, 2, 2, 4)

    written(body, [[1, 2, 3, 4, 5, 6], [1, 2, 3]])


def test_an_axis_that_has_the_size_of_the_prompt_by_chance_is_not_its_tokens() -> None:
    model: Any = CardModel()  # of hidden size 8

    def body() -> None:
        h = model.h[0].output
        assert h.mean(1).shape == (1, 8)
        _ = h.mean(1).t[0]

    refused(model, ShapeError, "has no token axis", body, [1, 2, 3, 4, 5, 6, 7, 8])


def test_rows_that_are_moved_are_taken_apart() -> None:
    def body(h: Any) -> None:
        assert h.transpose(1, 2).t[0].shape == (2, 8)
        assert h.transpose(1, 2).t[[0, 1]].shape == (2, 8, 2)
        assert h.transpose(0, 1).t[0].shape == (2, 8)
        assert h.transpose(0, 1).t[0:2].shape == (2, 2, 8)

    written(body, RAGGED)


def test_t_called_is_torchs_transpose() -> None:
    def body(h: Any) -> None:
        assert h[0].t().shape == (8, 5)
        assert torch.t(h[0, :]).shape == (8, 5)

    with pytest.warns(UserWarning, match="first row of the batch"):
        written(body)


@pytest.mark.parametrize(
    ("prompt", "use", "error", "message"),
    [
        ("hello", lambda m: m.h[0].output[:, -1].t[0], ShapeError, r"getitem \[1, 8\].* has no token axis"),
        ("hello", lambda m: m.h[0].output[:, 1:].t[0], ShapeError, "has no token axis"),
        ("hello", lambda m: torch.zeros(3).t[0], ShapeError, "comes from no site of the model"),
        (
            "hello",
            lambda m: (m.h[0].output @ m.h[0].output.mT).t[0],
            ShapeError,
            r"several axes that count tokens, \[1, 2\]; index the axis you mean",
        ),
        ("hello", lambda m: m.h[0].output.t[:, 0], OpArgumentError, "takes a whole number, a slice, or a"),
        ("hello", lambda m: m.h[0].output.t[[True]], OpArgumentError, "found \\[True\\]"),
        ("hello", lambda m: m.h[0].output.t[1.5], OpArgumentError, "found 1.5"),
        ("hello", lambda m: m.h[0].output.t[[]], OpArgumentError, "found \\[\\]"),
        ("hello", lambda m: m.h[0].output.t[::-1], OpArgumentError, "step is at least 1"),
        ([1, 2, 3, 4, 5], lambda m: m.h[0].output.t[5], IndexOutOfRangeError, "index 5 is out of range"),
        (RAGGED, lambda m: m.h[0].output.t[2], IndexOutOfRangeError, "row 1 of the prompt has 2 tokens"),
        (RAGGED, lambda m: m.h[0].output.t[-3], IndexOutOfRangeError, "row 1 of the prompt has 2 tokens"),
        (
            RAGGED,
            lambda m: m.h[0].output.t[1:],
            ShapeError,
            r"rows of \[5, 2\] tokens have different numbers of them in .token\[1:\]",
        ),
        (RAGGED, lambda m: m.h[0].output[0, :].t[0], ShapeError, "before the rows are picked out or moved"),
        (
            RAGGED,
            lambda m: m.h[0].output.transpose(1, 2).t.__setitem__(0, 1),
            ShapeError,
            "rows of this prompt begin at different tokens",
        ),
    ],
)
def test_what_has_no_answer_says_why_at_the_users_line(
    prompt: Any, use: Any, error: type[PellucidError], message: str
) -> None:
    model = CardModel()
    caught = refused(model, error, message, lambda: use(model), prompt)
    assert str(caught).startswith(f"{__file__}:")


def test_values_of_two_invokes_have_no_tokens_of_one_prompt() -> None:
    model: Any = CardModel()

    def body() -> None:
        with tracer.invoke([1, 2]):
            h = model.h[0].output
        with tracer.invoke([3, 4]):
            _ = (model.h[0].output + h).t[0]

    with pytest.raises(ShapeError, match=r"is made from 2 prompts"), model.trace() as tracer:
        body()


def test_a_value_of_a_trace_that_ended_says_so() -> None:
    model: Any = CardModel()
    with model.trace("hello"):
        h = model.h[0].output
    with pytest.raises(ValueNotReadyError, match="was not saved"):
        _ = h.t[0]

"""What a user may give to ``trace`` and ``invoke``, made into the one form a graph holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid_shared.errors import EmptyPromptError, InputError
from pellucid_shared.graph import Invoke

_FORMS = "a str, a list of str, token ids (a list, a list of lists, a tensor), or a dict with input_ids"


@dataclass(slots=True)
class Prompt:
    """One invoke's input and its size as its body sees it.

    Attributes:
        invoke: what goes into the graph.
        rows: size of the batch axis.
        tokens: size of the token axis: the longest row; None until the tokenizer was asked.
        ids: the token ids by row, once they are known.
    """

    invoke: Invoke
    rows: int
    tokens: int | None = None
    ids: list[list[int]] | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of an input that is text."""
        value = self.invoke.input
        return [value] if isinstance(value, str) else [v for v in value if isinstance(v, str)]

    def tokenized(self, ids: list[list[int]]) -> None:
        """Take the ids of the texts; from here on they are what is sent, so that counts cannot change."""
        if not all(ids):
            raise EmptyPromptError("the tokenizer makes no token of this prompt; give it text or token ids")
        self.ids, self.tokens = ids, max(map(len, ids))


def prompt(value: Any) -> Prompt:
    """Read one input.

    Raises:
        EmptyPromptError: no text and no ids.
        InputError: not one of the forms taken.
    """
    if isinstance(value, str):
        if not value:
            raise EmptyPromptError("the prompt is empty; give it text or at least one token id")
        return Prompt(Invoke(value), 1)
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        return _from_mapping(value)
    value = _plain(value)
    if isinstance(value, tuple | list) and value and all(isinstance(v, str) for v in value):
        if not all(value):
            raise EmptyPromptError(f"prompt {list(value).index('')} of the batch is empty; give it text")
        return Prompt(Invoke(list(value)), len(value))
    rows, batched = _rows(value)
    return Prompt(Invoke(rows if batched else rows[0]), len(rows), max(map(len, rows)), rows)


def _from_mapping(value: Any) -> Prompt:
    keys = list(value.keys())
    if unknown := [k for k in keys if k not in ("input_ids", "attention_mask")]:
        names = ", ".join(map(repr, unknown))
        raise InputError(f"an input has no {names}; a dict holds input_ids and, if any, attention_mask")
    if "input_ids" not in keys:
        raise InputError("an input given as a dict holds input_ids")
    rows, batched = _rows(_plain(value["input_ids"]))
    mask = _plain(value["attention_mask"]) if "attention_mask" in keys else None
    if mask is None:
        return Prompt(Invoke(rows if batched else rows[0]), len(rows), max(map(len, rows)), rows)
    bits, _ = _rows(mask)
    if [len(r) for r in bits] != [len(r) for r in rows]:
        raise InputError(
            f"attention_mask has rows of {[len(r) for r in bits]} and input_ids of {[len(r) for r in rows]}; "
            "they have one shape"
        )
    if any(bit not in (0, 1) for row in bits for bit in row):
        raise InputError("attention_mask holds only 0 and 1")
    return Prompt(Invoke(rows, bits), len(rows), max(map(len, rows)), rows)


def _rows(value: Any) -> tuple[list[list[int]], bool]:
    """Rows of ids, and whether the user gave a batch."""
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise InputError(f"a model takes {_FORMS}; found {type(value).__name__}")
    if not value or (isinstance(value[0], Sequence) and not all(value)):
        raise EmptyPromptError("the prompt is empty; give it text or at least one token id")
    batched = isinstance(value[0], Sequence) and not isinstance(value[0], str)
    if batched and not all(isinstance(row, Sequence) for row in value):
        raise InputError(f"a batch of token ids is a list of lists, found {value!r:.60}")
    return [[_id(v) for v in row] for row in (value if batched else [value])], batched


def _id(token: Any) -> int:
    try:
        number = operator.index(token)
    except TypeError:
        number = -1
    if number < 0 or isinstance(token, bool):
        raise InputError(f"a model takes {_FORMS}; found {token!r:.60} where a token id stands")
    return number


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value

"""What a user may give to ``trace`` and ``invoke``, made into the one form a graph holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import EmptyPromptError, InputError
from pellucid_shared.graph import Invoke

_FORMS = (
    "a str, a list of str, token ids (a list, a list of lists, a tensor), a dict with input_ids, or chat "
    'messages ([{"role": "user", "content": "..."}])'
)

#: The messages of one conversation.
Chat: TypeAlias = "list[dict[str, Any]]"


@dataclass(slots=True)
class Prompt:
    """One invoke's input and its size as its body sees it.

    Attributes:
        invoke: what goes into the graph.
        rows: size of the batch axis.
        tokens: size of the token axis: the longest row; None until the tokenizer was asked.
        ids: the token ids by row, once they are known.
        chats: the messages of each row, where the input is chats; ``rendered`` makes them ids.
    """

    invoke: Invoke
    rows: int
    tokens: int | None = None
    ids: list[list[int]] | None = None
    chats: list[Chat] | None = None

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

    def rendered(self, ids: list[list[int]]) -> None:
        """Take the ids of the chats: a graph holds text or ids."""
        self.tokenized(ids)
        self.invoke = Invoke(ids if isinstance(self.invoke.input, list) else ids[0])
        self.chats = None

    def windows(self) -> list[tuple[int, int]]:
        """Where each row's own tokens begin and end on the token axis, padding left out; ids are known."""
        assert self.ids is not None
        assert self.tokens is not None
        found = []
        for row, bits in zip(self.ids, self.invoke.mask or [[1] * len(row) for row in self.ids], strict=True):
            pad = self.tokens - len(row)
            found.append((pad + bits.index(1), pad + len(bits) - bits[::-1].index(1)))
        return found


def check_ids(prompt: Prompt, card: ModelCard) -> None:
    """Whether a model can be run on ids that are known.

    Raises:
        InputError: an id its vocabulary does not have, or more tokens than it takes.
    """
    highest = max((max(row) for row in prompt.ids or []), default=0)
    if highest >= card.vocab_size:
        raise InputError(
            f"token id {highest} is not in the vocabulary of {card.id}, which has {card.vocab_size}"
        )
    if prompt.tokens is not None and card.max_tokens is not None and prompt.tokens > card.max_tokens:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens and {card.id} takes at most {card.max_tokens}; shorten it"
        )


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
    if (chats := chats_in(value)) is not None:
        batched = not isinstance(value[0], Mapping)
        return Prompt(Invoke([""] if batched else ""), len(chats), chats=chats)
    if isinstance(value, tuple | list) and value and all(isinstance(v, str) for v in value):
        if not all(value):
            raise EmptyPromptError(f"prompt {list(value).index('')} of the batch is empty; give it text")
        return Prompt(Invoke(list(value)), len(value))
    rows, batched = _rows(value)
    return Prompt(Invoke(rows if batched else rows[0]), len(rows), max(map(len, rows)), rows)


def chats_in(value: Any) -> list[Chat] | None:
    """The chats in one list of messages, or in a list of such lists; None where it is something else.

    Raises:
        InputError: a message without a role.
        EmptyPromptError: a chat without messages.
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    batched = any(
        isinstance(chat, list | tuple) and any(isinstance(m, Mapping) for m in chat) for chat in value
    )
    if not batched and not any(isinstance(message, Mapping) for message in value):
        return None
    chats: list[Chat] = []
    for chat in value if batched else [value]:
        if not isinstance(chat, list | tuple) or not chat:
            raise EmptyPromptError(f"chat {len(chats)} of the batch has no messages")
        for message in chat:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(
                    'a chat is a list of messages, {"role": "user", "content": "..."}; '
                    f"found {message!r:.80}"
                )
        chats.append([dict(message) for message in chat])
    return chats


def awaits_answer(chat: Chat) -> bool:
    """Whether a conversation given as a prompt ends with the beginning of an answer: not where it ends with
    an answer."""
    return bool(chat[-1]["role"] != "assistant")


def _from_mapping(value: Any) -> Prompt:
    keys = list(value.keys())
    if "role" in keys:
        raise InputError(f"a chat is a list of messages: write [{value!r:.60}]")
    if "token_type_ids" in keys and not any(map(any, _rows(_plain(value["token_type_ids"]))[0])):
        keys.remove("token_type_ids")  # some tokenizers add these zeros for models that do not read them
    if unknown := [k for k in keys if k not in ("input_ids", "attention_mask")]:
        names = ", ".join(map(repr, unknown))
        raise InputError(f"an input has no {names}; a dict holds input_ids and, if any, attention_mask")
    if "input_ids" not in keys:
        raise InputError("an input given as a dict holds input_ids")
    rows, batched = _rows(_plain(value["input_ids"]))
    mask = _plain(value["attention_mask"]) if "attention_mask" in keys else None
    if mask is None:
        return Prompt(Invoke(rows if batched else rows[0]), len(rows), max(map(len, rows)), rows)
    bits = _bits(mask)
    if [len(r) for r in bits] != [len(r) for r in rows]:
        raise InputError(
            f"attention_mask has rows of {[len(r) for r in bits]} and input_ids of {[len(r) for r in rows]}; "
            "they have one shape"
        )
    if any(1 not in row for row in bits):
        raise EmptyPromptError("a row of attention_mask is all 0: it leaves no token of the prompt")
    return Prompt(Invoke(rows, bits), len(rows), max(map(len, rows)), rows)


def _bits(mask: Any) -> list[list[int]]:
    """Rows of a mask of numbers or truth values."""
    if not isinstance(mask, Sequence) or isinstance(mask, str) or not mask:
        raise InputError(f"attention_mask is rows of 0 and 1, found {mask!r:.60}")
    rows = mask if isinstance(mask[0], Sequence) else [mask]
    if any(not isinstance(row, Sequence) or any(bit not in (0, 1) for bit in row) for row in rows):
        raise InputError("attention_mask holds only 0 and 1")
    return [[int(bit) for bit in row] for row in rows]


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
    """Tensors and arrays, and lists of them, as lists."""
    if isinstance(value, list | tuple):
        return [_plain(v) if hasattr(v, "tolist") else v for v in value]
    return value.tolist() if hasattr(value, "tolist") else value

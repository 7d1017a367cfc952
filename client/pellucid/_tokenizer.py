"""The tokenizer of a served model, asked over HTTP: no transformers is needed here.

Its methods are those of a transformers tokenizer that users call most, with the same arguments and defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellucid_shared.errors import InputError, MissingExtraError
from pellucid_shared.wire import TokenizerInfo

from ._http import Connection
from ._inputs import Chat, chats_in
from ._lines import at_users_line, users_line

#: How many answers are remembered of each kind.
_KEPT = 10_000
#: How many are asked for in one request.
_ASKED = 1_000

_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class Encoding(dict[str, Any]):
    """What a tokenizer gives: ``input_ids`` and ``attention_mask``, by key or by attribute."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"an encoding has {', '.join(self)}, found {name!r}")

    def to(self, device: Any) -> Encoding:
        """Its torch tensors on a device."""
        return Encoding((k, v.to(device) if hasattr(v, "to") else v) for k, v in self.items())


class RemoteTokenizer:
    """The tokenizer of a served model.

        ids = model.tokenizer("The Eiffel Tower")["input_ids"]
        text = model.tokenizer.decode(ids)

    Answers are kept: the same text is asked for once.

    Attributes:
        padding_side: ``"left"`` or ``"right"``; may be set.
        pad_token: the token that fills a batch up, or None; may be set.
    """

    def __init__(self, connection: Connection, path: str, model: str) -> None:
        self._connection, self._path, self._model = connection, path, model
        self._known: TokenizerInfo | None = None
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._texts: dict[tuple[tuple[int, ...], bool], tuple[str, list[str | None]]] = {}
        self._chats: dict[str, tuple[str, list[int]]] = {}
        self._pad: str | None = None
        self._side: str | None = None

    # --- text to ids ---------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """``input_ids`` and ``attention_mask`` of a text, or of each of a list of texts.

        Args:
            padding: True or ``"longest"`` fills the shorter rows up; ``"max_length"`` up to ``max_length``.
            truncation: True cuts rows to ``max_length`` tokens, at their end.
            return_tensors: ``"np"`` or ``"pt"`` for arrays or tensors ``[rows, tokens]``.

        Raises:
            InputError: rows of different lengths that cannot be one tensor, padding without a pad token, or
                an argument that is none of these.
        """
        if isinstance(text, str):
            rows = self.ids([text], add_special_tokens)
        elif isinstance(text, list | tuple) and all(isinstance(t, str) for t in text):
            rows = self.ids(list(text), add_special_tokens)
        else:
            raise InputError(
                f"a tokenizer takes a str or a list of str, found {text!r:.60}", where=users_line()
            )
        return self._encoding(rows, isinstance(text, str), padding, truncation, max_length, return_tensors)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        found: list[int] = self(text, add_special_tokens=add_special_tokens)["input_ids"]
        return found

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str | None]:
        """The tokens of a text by the tokenizer's own names."""
        found: list[str | None] = self.convert_ids_to_tokens(self.encode(text, add_special_tokens))
        return found

    def ids(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text."""

        def ask(missing: list[tuple[str, bool]]) -> list[list[int]]:
            body: dict[str, Any] = {"text": [text for text, _ in missing]}
            if not add_special_tokens:
                body["add_special_tokens"] = False
            found: list[list[int]] = self._post("tokenize", body)["ids"]
            return found

        return list(map(list, _remembered(self._ids, [(text, add_special_tokens) for text in texts], ask)))

    # --- ids to text ---------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """The text of ids: of one, of a list, a tensor or an array; a list of texts of rows of ids."""
        rows, batched = _rows(token_ids)
        texts = [text for text, _ in self._decoded(rows, skip_special_tokens)]
        return texts if batched else texts[0]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each of several rows of ids."""
        given = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        return [self.decode(row, skip_special_tokens) for row in given]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The tokenizer's own names of ids; one name for one id."""
        rows, _ = _rows(ids)
        tokens = self._decoded(rows, False)[0][1]
        return tokens[0] if isinstance(_plain(ids), int) else list(tokens)

    def _decoded(self, rows: list[list[int]], skip: bool) -> list[tuple[str, list[str | None]]]:
        def ask(missing: list[tuple[tuple[int, ...], bool]]) -> list[tuple[str, list[str | None]]]:
            body = {"ids": [ids for ids, _ in missing], "skip_special_tokens": skip}
            answer = self._post("detokenize", body)
            return list(zip(answer["text"], answer["tokens"], strict=True))

        return _remembered(self._texts, [(tuple(row), skip) for row in rows], ask)

    # --- chats ---------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """A list of messages, or a list of such lists, as the model's chat template writes them.

        Args:
            add_generation_prompt: end with the beginning of an answer.
            tokenize: False gives the text.
            return_dict: False gives the ids alone.
            options: further variables of the template, plain JSON values (``tools``, ``enable_thinking``).

        Raises:
            InputError: the model has no template, or it refuses these messages.
        """
        with at_users_line():
            chats = chats_in(conversation)
            if chats is None:
                raise InputError(
                    'a chat is a list of messages, [{"role": "user", "content": "..."}]; '
                    f"found {conversation!r:.60}"
                )
        rendered = self.chats(chats, add_generation_prompt, options)
        single = isinstance(conversation[0], Mapping)
        if not tokenize:
            texts = [text for text, _ in rendered]
            return texts[0] if single else texts
        rows = [list(ids) for _, ids in rendered]
        found = self._encoding(rows, single, padding, truncation, max_length, return_tensors)
        return found if return_dict else found["input_ids"]

    def chats(
        self, chats: Sequence[Chat], add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> list[tuple[str, list[int]]]:
        """Text and ids of each conversation."""

        def ask(missing: list[str]) -> list[tuple[str, list[int]]]:
            body = {
                "chats": [json.loads(key)[0] for key in missing],
                "add_generation_prompt": add_generation_prompt,
                "options": options,
            }
            answer = self._post("chat", body)
            return list(zip(answer["text"], answer["ids"], strict=True))

        try:
            keys = [json.dumps([chat, add_generation_prompt, options]) for chat in chats]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"messages and options hold plain JSON values only: {error}", where=users_line()
            ) from None
        return _remembered(self._chats, keys, ask)

    # --- what it is ----------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, without those that were added."""
        return self._info.vocab_size

    def __len__(self) -> int:
        return self._info.length

    @property
    def padding_side(self) -> str:
        return self._side or self._info.padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        if side not in ("left", "right"):
            raise InputError(f"padding_side is 'left' or 'right', found {side!r:.60}", where=users_line())
        self._side = side

    @property
    def pad_token(self) -> str | None:
        return self._pad or self._info.special_tokens.get("pad_token")

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        if len(self.encode(token, add_special_tokens=False)) != 1:
            raise InputError(
                f"pad_token is one token of the vocabulary, found {token!r:.60}", where=users_line()
            )
        self._pad = token

    @property
    def pad_token_id(self) -> int | None:
        if self._pad is not None:
            return self.encode(self._pad, add_special_tokens=False)[0]
        return self._info.special_ids.get("pad_token")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Names of the special tokens there are -> the tokens."""
        pad = {"pad_token": self._pad} if self._pad else {}
        return {**self._info.special_tokens, **pad}

    @property
    def all_special_ids(self) -> list[int]:
        return list(dict.fromkeys(i for i in self._info.special_ids.values() if i is not None))

    def __getattr__(self, name: str) -> Any:
        short = name.removesuffix("_id").removesuffix("_token")
        if short in _SPECIAL and name == f"{short}_token":
            return self._info.special_tokens.get(name)
        if short in _SPECIAL and name == f"{short}_token_id":
            return self._info.special_ids.get(f"{short}_token")
        raise AttributeError(
            f"the tokenizer of a served model has no {name!r}; it has encode, decode, batch_decode, "
            "tokenize, convert_ids_to_tokens, apply_chat_template and the special tokens. For all of it: "
            "transformers.AutoTokenizer"
        )

    def __repr__(self) -> str:
        return f"<the tokenizer of {self._model} at {self._connection.url}>"

    @property
    def _info(self) -> TokenizerInfo:
        if self._known is None:
            with at_users_line():
                answer = self._connection.get_json(f"{self._path}/tokenizer")
            self._known = TokenizerInfo.model_validate(answer)
        return self._known

    def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        with at_users_line():
            return self._connection.post_json(f"{self._path}/{route}", body)

    # --- batches -------------------------------------------------------------------------------------------

    def _encoding(
        self,
        rows: list[list[int]],
        single: bool,
        padding: bool | str,
        truncation: bool,
        max_length: int | None,
        return_tensors: str | None,
    ) -> Encoding:
        if truncation and max_length is None:
            raise InputError("truncation=True goes with max_length=", where=users_line())
        if truncation:
            rows = [row[:max_length] for row in rows]
        width = self._width(rows, padding, max_length)
        masks = [[1] * len(row) for row in rows]
        if any(len(row) < width for row in rows):
            filler = self.pad_token_id
            if filler is None:
                raise InputError(
                    f"the tokenizer of {self._model} has no pad token; set one: "
                    "tokenizer.pad_token = tokenizer.eos_token",
                    where=users_line(),
                )
            rows = [self._filled(row, filler, width) for row in rows]
            masks = [self._filled(mask, 0, width) for mask in masks]
        if return_tensors is not None:
            return Encoding(
                input_ids=_tensor(rows, return_tensors), attention_mask=_tensor(masks, return_tensors)
            )
        if single:
            return Encoding(input_ids=rows[0], attention_mask=masks[0])
        return Encoding(input_ids=rows, attention_mask=masks)

    def _width(self, rows: list[list[int]], padding: bool | str, max_length: int | None) -> int:
        if padding in (False, "do_not_pad"):
            return 0
        if padding in (True, "longest"):
            return max(map(len, rows), default=0)
        if padding == "max_length" and max_length is not None:
            return max_length
        raise InputError(
            f"padding is True, False, 'longest', or 'max_length' with max_length=; found {padding!r:.60}",
            where=users_line(),
        )

    def _filled(self, row: list[int], filler: int, width: int) -> list[int]:
        rest = [filler] * (width - len(row))
        return rest + row if self.padding_side == "left" else row + rest


def _remembered(
    known: dict[Any, Any], keys: Sequence[Any], ask: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """The answer to each key; ``ask`` is given those that are not known, once each."""
    have = {key: known.get(key) for key in keys}
    missing = [key for key, answer in have.items() if answer is None]
    parts = [missing[i : i + _ASKED] for i in range(0, len(missing), _ASKED)]
    fresh = {k: answer for part in parts for k, answer in zip(part, ask(part), strict=True)}
    have.update(fresh)
    if len(known) + len(fresh) > _KEPT:
        known.clear()
    known.update(fresh)
    return [have[key] for key in keys]


def _plain(ids: Any) -> Any:
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _rows(ids: Any) -> tuple[list[list[int]], bool]:
    """Rows of ids, and whether several were given."""
    given = _plain(ids)
    many = list(given) if isinstance(given, list | tuple) else [given]
    batched = bool(many) and isinstance(_plain(many[0]), list | tuple)
    rows = [[_plain(i) for i in _plain(row)] for row in (many if batched else [many])]
    if any(type(i) is not int for row in rows for i in row):
        raise InputError(
            f"token ids are whole numbers, lists or tensors of them; found {ids!r:.60}", where=users_line()
        )
    return rows, batched


def _tensor(rows: list[list[int]], kind: str) -> Any:
    if kind not in ("np", "pt"):
        raise InputError(f"return_tensors is 'np' or 'pt', found {kind!r:.60}", where=users_line())
    if len({len(row) for row in rows}) > 1:
        raise InputError(
            f"rows of {[len(row) for row in rows]} tokens are not one tensor; give padding=True",
            where=users_line(),
        )
    if kind == "np":
        import numpy

        return numpy.array(rows, dtype=numpy.int64)
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            "return_tensors='pt' needs torch, which is not installed; 'np' gives arrays", where=users_line()
        ) from None
    return torch.tensor(rows, dtype=torch.int64)

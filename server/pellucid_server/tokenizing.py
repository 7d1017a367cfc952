"""What a model's tokenizer does for clients that have none: ids, text, chats. Pure; no Redis, no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, LimitError
from pellucid_shared.wire import TokenizerInfo

#: The longest text a chat template may make.
MAX_RENDERED = 4 * 2**20


class ModelTokenizer:
    """A tokenizer.json, a chat template, and what transformers keeps beside them.

    Args:
        tokenizer: as tokenizers parsed it.
        template: the chat template (Jinja), or empty.
        info: what the worker published: names of special tokens, padding side.
    """

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, template: str, info: TokenizerInfo) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._card, self._tokenizer, self._template = card, tokenizer, template
        self.info = info.model_copy(
            update={
                "vocab_size": tokenizer.get_vocab_size(with_added_tokens=False),
                "length": tokenizer.get_vocab_size(with_added_tokens=True),
                "special_ids": {
                    name: tokenizer.token_to_id(token) for name, token in info.special_tokens.items()
                },
                "has_chat_template": bool(template),
            }
        )

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text; special tokens as the tokenizer adds them.

        Raises:
            InputError: a text that UTF-8 cannot spell.
        """
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(f"text {index} holds a lone surrogate, which UTF-8 cannot spell") from None
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [e.ids for e in encoded]

    def decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids.

        Raises:
            InputError: an id that the tokenizer cannot have.
        """
        self._require_ids(rows)
        return [self._tokenizer.decode(list(r), skip_special_tokens=skip_special_tokens) for r in rows]

    def tokens(self, rows: Sequence[Sequence[int]]) -> list[list[str | None]]:
        """The tokenizer's own name of each id; None for an id of the model without a token."""
        self._require_ids(rows)
        return [[self._tokenizer.id_to_token(i) for i in row] for row in rows]

    def render(self, chats: Sequence[Sequence[Mapping[str, Any]]], options: Mapping[str, Any]) -> list[str]:
        """Each conversation as text, by the model's chat template.

        Args:
            options: further variables of the template, ``add_generation_prompt`` among them.

        Raises:
            InputError: the model has no template, or it refuses these messages.
            LimitError: the text is too long.
        """
        if not self._template:
            raise InputError(f"{self._card.id} has no chat template; give it text instead of messages")
        try:
            template = _compiled(self._template)
            given = {**self.info.special_tokens, **options}
            return [self._rendered(template, [_said(m) for m in chat], given) for chat in chats]
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            RecursionError,
            OverflowError,
        ) as error:
            reason = str(error)[:300] or type(error).__name__
            raise InputError(
                f"the chat template of {self._card.id} refuses these messages: {reason}"
            ) from None

    def _rendered(self, template: jinja2.Template, messages: Any, given: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        for part in template.generate({"tools": None, "documents": None, **given, "messages": messages}):
            parts.append(part)
            size += len(part)
            if size > MAX_RENDERED:
                raise LimitError(
                    f"the chat is over {MAX_RENDERED} characters as the template of {self._card.id} writes it"
                )
        return "".join(parts)

    def _require_ids(self, rows: Sequence[Sequence[int]]) -> None:
        highest = max(self._card.vocab_size, self.info.length)
        wrong = next((i for row in rows for i in row if not 0 <= i < highest), None)
        if wrong is not None:
            raise InputError(
                f"token id {wrong} is not in the vocabulary of {self._card.id}, which has {highest}"
            )


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's part for training; it writes what is inside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    """A template as transformers compiles it: the source of the environment's options and globals is
    ``_cached_compile_jinja_template`` in transformers/utils/chat_template_utils.py."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without members that say nothing, which templates would write as "None"."""
    return {k: v for k, v in message.items() if v is not None}

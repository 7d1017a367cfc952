"""The served models, as their workers registered them in Redis."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from tokenizers import Tokenizer

from pellucid_shared import keyspace
from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, ModelNotFoundError, UnavailableError, did_you_mean
from pellucid_shared.wire import Deployment, TokenizerInfo

from .tokenizing import ModelTokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A deployment that answers: its card, and its tokenizer where it has one."""

    card: ModelCard
    card_json: str
    tokenizer: ModelTokenizer | None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens as the tokenizer adds them.

        Raises:
            InputError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.card.id} has no tokenizer; give it token ids instead of text")
        return self.tokenizer.encode(texts)


class Deployments:
    """Reads deployments; cards and tokenizers are parsed once per fingerprint."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # redis-py types every answer as a union of all it could be
        self._models: dict[str, tuple[str, Model]] = {}

    async def list(self) -> list[Deployment]:
        """Every deployment ever registered here, by id."""
        ids = sorted(await self._redis.smembers(keyspace.MODELS))
        return [found for i in ids if (found := await self.show(i)) is not None]

    async def show(self, model_id: str) -> Deployment | None:
        """One deployment as it stands, or None."""
        fields = await self._redis.hmget(
            keyspace.model(model_id), ["source", "state", "progress", "error", "fingerprint"]
        )
        if fields[1] is None:
            return None
        source, state, progress, error = (f or "" for f in fields[:4])
        since = time.time() - keyspace.LEASE_SECONDS
        workers = await self._redis.zcount(keyspace.model_workers(model_id), since, "+inf")
        card = (await self._model(model_id, fields[4])).card if fields[4] else None
        return Deployment(
            id=model_id,
            source=source,
            state="stopped" if state == "ready" and not workers else state,  # type: ignore[arg-type]
            progress=float(progress or 0),
            error=error or None,
            workers=workers,
            queued=await self._redis.zcard(keyspace.model_waiting(model_id)),
            class_name=card.class_name if card else None,
            parameters=card.parameters if card else None,
            dtype=card.dtype if card else None,
        )

    async def get(self, model_id: str) -> Model:
        """A deployment that can take jobs.

        Raises:
            ModelNotFoundError: not served here; lists what is.
            UnavailableError: loading, failed, or without a living worker.
        """
        shown = await self.show(model_id)
        if shown is None:
            served = [d.id for d in await self.list()]
            has = f"it serves {', '.join(served)}" if served else "it serves no model yet"
            raise ModelNotFoundError(
                f"this server does not serve {model_id!r}; {has}.{did_you_mean(model_id, served)}",
                served=served,
            )
        if shown.state == "loading":
            raise UnavailableError(
                f"{model_id} is loading, {shown.progress:.0%} done; try again soon", retry_after=2
            )
        if shown.state != "ready":
            reason = f": {shown.error}" if shown.error else " (no worker of it is alive)"
            raise UnavailableError(f"{model_id} is {shown.state}{reason}", retry_after=5)
        return await self._model(model_id, await self._redis.hget(keyspace.model(model_id), "fingerprint"))

    async def _model(self, model_id: str, fingerprint: str) -> Model:
        known = self._models.get(model_id)
        if known and known[0] == fingerprint:
            return known[1]
        names = ["fingerprint", "card", "tokenizer", "chat_template", "tokenizer_info"]
        fingerprint, *published = await self._redis.hmget(keyspace.model(model_id), names)
        model = await asyncio.to_thread(_parsed, *published)
        self._models[model_id] = (fingerprint, model)
        return model


def _parsed(card_json: str, tokenizer: str, template: str | None, info: str | None) -> Model:
    """What a worker published: ``tokenizer`` is a tokenizer.json, or empty."""
    card = ModelCard.model_validate_json(card_json)
    if not tokenizer:
        return Model(card, card_json, None)
    about = TokenizerInfo.model_validate_json(info) if info else TokenizerInfo()
    return Model(card, card_json, ModelTokenizer(card, Tokenizer.from_str(tokenizer), template or "", about))

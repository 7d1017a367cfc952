"""The served models, as their workers registered them in Redis."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from tokenizers import Tokenizer

from pellucid_shared import keyspace
from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, ModelNotFoundError, UnavailableError, did_you_mean
from pellucid_shared.wire import Deployment


@dataclass(frozen=True, slots=True)
class Model:
    """A deployment that answers: its card, and its tokenizer where it has one."""

    card: ModelCard
    card_json: str
    tokenizer: Tokenizer | None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens as the tokenizer adds them.

        Raises:
            InputError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.card.id} has no tokenizer; give it token ids instead of text")
        return [e.ids for e in self.tokenizer.encode_batch(texts)]


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
            keyspace.model(model_id), ["source", "state", "progress", "error", "fingerprint", "card"]
        )
        if fields[1] is None:
            return None
        source, state, progress, error = (f or "" for f in fields[:4])
        since = time.time() - keyspace.LEASE_SECONDS
        workers = await self._redis.zcount(keyspace.model_workers(model_id), since, "+inf")
        card = self._parsed(model_id, fields[4], fields[5], "").card if fields[5] else None
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
        fields = await self._redis.hmget(keyspace.model(model_id), ["fingerprint", "card", "tokenizer"])
        return self._parsed(model_id, fields[0], fields[1], fields[2] or "")

    def _parsed(self, model_id: str, fingerprint: Any, card: Any, tokenizer: str) -> Model:
        known = self._models.get(model_id)
        if known and known[0] == fingerprint and (known[1].tokenizer is not None or not tokenizer):
            return known[1]
        model = Model(
            ModelCard.model_validate_json(card),
            card,
            Tokenizer.from_str(tokenizer) if tokenizer else None,
        )
        if model.tokenizer is not None:
            model.tokenizer.no_padding()
            model.tokenizer.no_truncation()
        self._models[model_id] = (fingerprint, model)
        return model

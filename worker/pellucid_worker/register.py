"""Telling the gateway about this worker's model: loading, ready, failed, and alive."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Any

import redis

from pellucid_shared import keyspace
from pellucid_shared.errors import InputError
from pellucid_shared.wire import TokenizerInfo

from .engine import Engine


class Registration:
    """This process's entry under its model. A worker that stops beating is taken for dead in 15 s."""

    def __init__(self, client: redis.Redis, model: str, source: str) -> None:
        self._redis, self._model, self._source = client, model, source
        self._key, self._workers = keyspace.model(model), keyspace.model_workers(model)
        self._published: dict[str, Any] = {}
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def loading(self, progress: float) -> None:
        """Say how far loading is, unless another worker of the model serves already."""
        self._redis.sadd(keyspace.MODELS, self._model)
        if not self._others_alive():
            fields = {"source": self._source, "state": "loading", "progress": progress, "error": ""}
            self._set(fields)

    def ready(self, engine: Engine) -> None:
        """Publish the card and the tokenizer, and count as alive.

        Raises:
            InputError: another worker serves a different model under this name.
        """
        if self._others_alive():
            fingerprint: Any = self._redis.hget(self._key, "fingerprint")
            if fingerprint != engine.card.fingerprint.encode():
                raise InputError(
                    f"another worker serves something else as {self._model!r}; give this one its own name"
                )
        self._published = {
            "source": self._source,
            "state": "ready",
            "progress": 1.0,
            "error": "",
            "card": engine.card.model_dump_json(),
            "fingerprint": engine.card.fingerprint,
            "tokenizer": engine.tokenizer_json or "",
            "chat_template": _chat_template(engine.tokenizer),
            "tokenizer_info": _tokenizer_info(engine.tokenizer).model_dump_json(),
        }
        self.beat()

    def failed(self, reason: str) -> None:
        """Say why the model cannot be served."""
        if not self._others_alive():
            self._set({"state": "failed", "error": reason})

    def beat(self) -> None:
        """Be alive for another while; forget workers that are long dead; publish again what is not there,
        as in a Redis that came back empty."""
        now = time.time()
        self._redis.zadd(self._workers, {self.worker: now})
        self._redis.zremrangebyscore(self._workers, 0, now - 10 * keyspace.LEASE_SECONDS)
        if self._redis.hget(self._key, "state") != b"ready":
            self._set(self._published)
            self._redis.sadd(keyspace.MODELS, self._model)

    def stopped(self) -> None:
        """Be gone. A failure stays on record."""
        self._redis.zrem(self._workers, self.worker)
        if not self._others_alive() and self._redis.hget(self._key, "state") != b"failed":
            self._set({"state": "stopped"})

    def _set(self, fields: dict[Any, Any]) -> None:
        self._redis.hset(self._key, mapping=fields)

    def _others_alive(self) -> bool:
        since = time.time() - keyspace.LEASE_SECONDS
        alive: Any = self._redis.zrangebyscore(self._workers, since, "+inf")
        return any(worker != self.worker.encode() for worker in alive)


def _chat_template(tokenizer: Any) -> str:
    """The template chats are written by; of several by name, the default one."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def _tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """What transformers knows of a tokenizer and its tokenizer.json does not say."""
    if tokenizer is None:
        return TokenizerInfo()
    named = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if not isinstance(v, list)}
    return TokenizerInfo(special_tokens=named, padding_side=tokenizer.padding_side)

"""Telling the gateway about this worker's model: loading, ready, failed, and alive."""

from __future__ import annotations

import os
import socket
import time
import uuid

import redis

from pellucid_shared import keyspace
from pellucid_shared.errors import InputError

from .engine import Engine


class Registration:
    """This process's entry under its model. A worker that stops beating is taken for dead in 15 s."""

    def __init__(self, client: redis.Redis, model: str, source: str) -> None:
        self._redis, self._model, self._source = client, model, source
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def loading(self, progress: float) -> None:
        """Say how far loading is, unless another worker of the model serves already."""
        self._redis.sadd(keyspace.MODELS, self._model)
        if not self._others_alive():
            state = {"source": self._source, "state": "loading", "progress": progress, "error": ""}
            self._redis.hset(keyspace.model(self._model), mapping=state)  # type: ignore[arg-type]

    def ready(self, engine: Engine) -> None:
        """Publish the card and the tokenizer, and count as alive.

        Raises:
            InputError: another worker serves a different model under this name.
        """
        key = keyspace.model(self._model)
        if self._others_alive():
            fingerprint = self._redis.hget(key, "fingerprint")
            if fingerprint != engine.card.fingerprint.encode():
                raise InputError(
                    f"another worker serves something else as {self._model!r}; give this one its own name"
                )
        template = getattr(engine.tokenizer, "chat_template", None)
        self._redis.hset(
            key,
            mapping={
                "source": self._source,
                "state": "ready",
                "progress": 1.0,
                "error": "",
                "card": engine.card.model_dump_json(),
                "fingerprint": engine.card.fingerprint,
                "tokenizer": engine.tokenizer_json or "",
                "chat_template": template if isinstance(template, str) else "",
            },
        )
        self.beat()

    def failed(self, reason: str) -> None:
        """Say why the model cannot be served."""
        if not self._others_alive():
            self._redis.hset(keyspace.model(self._model), mapping={"state": "failed", "error": reason})

    def beat(self) -> None:
        """Be alive for another while, and forget workers that are long dead."""
        now = time.time()
        key = keyspace.model_workers(self._model)
        self._redis.zadd(key, {self.worker: now})
        self._redis.zremrangebyscore(key, 0, now - 10 * keyspace.LEASE_SECONDS)

    def stopped(self) -> None:
        """Be gone."""
        self._redis.zrem(keyspace.model_workers(self._model), self.worker)
        if not self._others_alive():
            self._redis.hset(keyspace.model(self._model), "state", "stopped")

    def _others_alive(self) -> bool:
        since = time.time() - keyspace.LEASE_SECONDS
        alive = self._redis.zrangebyscore(keyspace.model_workers(self._model), since, "+inf")
        return any(worker != self.worker.encode() for worker in alive)

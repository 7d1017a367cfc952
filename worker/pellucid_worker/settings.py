"""Where the worker's Redis and store are: read from the environment, once, by the command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import redis

from pellucid_shared.errors import InputError, UnavailableError


@dataclass(frozen=True, slots=True)
class Settings:
    """PELLUCID_REDIS_URL (``redis://`` or ``unix://``) and PELLUCID_STORE_URL (``file:///`` or ``s3://``)."""

    redis_url: str
    store_url: str

    @staticmethod
    def from_env(env: Mapping[str, str] = os.environ) -> Settings:
        """Raises InputError naming the variable that is missing."""
        found = {name: env.get(name, "") for name in ("PELLUCID_REDIS_URL", "PELLUCID_STORE_URL")}
        for name, value in found.items():
            if not value:
                raise InputError(f"{name} is not set; `pellucid up` sets it, a worker on its own needs it")
        return Settings(*found.values())

    def connect(self) -> redis.Redis:
        """A client of the worker's Redis that has answered once.

        Raises:
            UnavailableError: it does not answer.
            InputError: the URL is not Redis's.
        """
        try:
            client = redis.Redis.from_url(self.redis_url, socket_timeout=10.0)
            client.ping()
        except redis.RedisError as error:
            raise UnavailableError(
                f"Redis does not answer ({error}); is it running where PELLUCID_REDIS_URL says?"
            ) from None
        except ValueError as error:
            raise InputError(f"PELLUCID_REDIS_URL cannot be used: {error}") from None
        return client

    @property
    def broker_url(self) -> str:
        """The same Redis as Celery spells it."""
        if self.redis_url.startswith("unix://"):
            return "redis+socket://" + self.redis_url.removeprefix("unix://")
        return self.redis_url

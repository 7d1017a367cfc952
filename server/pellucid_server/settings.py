"""The gateway's settings, read from the environment once, by the command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pellucid_shared.errors import InputError

MAX_BODY_BYTES = 256 * 2**20
#: How long Redis may take to answer; longer than the gateway ever asks it to wait for an event.
REDIS_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a gateway needs to know.

    Attributes:
        redis_url: PELLUCID_REDIS_URL, ``redis://`` or ``unix://``.
        store_url: PELLUCID_STORE_URL, ``file:///`` or ``s3://``.
        expected: PELLUCID_EXPECT_MODELS, ids that must be ready before /ready says so (comma separated).
        max_body: PELLUCID_MAX_BODY_BYTES, the largest request taken.
    """

    redis_url: str
    store_url: str
    expected: tuple[str, ...] = ()
    max_body: int = MAX_BODY_BYTES

    @staticmethod
    def from_env(env: Mapping[str, str] = os.environ) -> Settings:
        """Raises InputError naming the variable that is missing or wrong."""
        for name in ("PELLUCID_REDIS_URL", "PELLUCID_STORE_URL"):
            if not env.get(name):
                raise InputError(f"{name} is not set; `pellucid up` sets it, a gateway on its own needs it")
        limit = env.get("PELLUCID_MAX_BODY_BYTES", str(MAX_BODY_BYTES))
        if not limit.isdigit():
            raise InputError(f"PELLUCID_MAX_BODY_BYTES is a number of bytes, found {limit!r}")
        return Settings(
            env["PELLUCID_REDIS_URL"],
            env["PELLUCID_STORE_URL"],
            tuple(filter(None, env.get("PELLUCID_EXPECT_MODELS", "").split(","))),
            int(limit),
        )

    @property
    def broker_url(self) -> str:
        """The same Redis as Celery spells it."""
        if self.redis_url.startswith("unix://"):
            return "redis+socket://" + self.redis_url.removeprefix("unix://")
        return self.redis_url

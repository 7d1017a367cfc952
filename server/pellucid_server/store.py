"""The result store, from the gateway's side: uploads are written, results streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import LocalStore, ObjectStore, from_url

_CHUNK = 2**20


class Store:
    """A local folder (``file:///...``) or an object store (``s3://bucket/prefix``)."""

    def __init__(self, url: str) -> None:
        self._store = _open(url)

    async def put(self, key: str, data: bytes) -> None:
        """Write an object; it is there whole or not at all."""
        await self._store.put_async(key, data)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """An object in chunks; raises FileNotFoundError before the first."""
        found = await self._store.get_async(key)
        chunks = found.stream(min_chunk_size=_CHUNK)

        async def read() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                yield bytes(chunk)

        return read()


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return from_url(url)
    folder = Path(unquote(parts.path))
    folder.mkdir(parents=True, exist_ok=True)
    return LocalStore(folder)

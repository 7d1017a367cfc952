"""The result store, from the worker's side: uploads are read, results written."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import LocalStore, ObjectStore, from_url


class Store:
    """A local folder (``file:///...``) or an object store (``s3://bucket/prefix``)."""

    def __init__(self, url: str) -> None:
        self._store = _open(url)

    def put(self, key: str, data: bytes) -> None:
        """Write an object; it is there whole or not at all."""
        self._store.put(key, data)

    def get(self, key: str) -> bytes:
        """Read an object; raises FileNotFoundError."""
        return bytes(self._store.get(key).bytes())

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._store.delete(key)


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return from_url(url)
    folder = Path(unquote(parts.path))
    folder.mkdir(parents=True, exist_ok=True)
    return LocalStore(folder)

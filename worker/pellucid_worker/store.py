"""The result store, from the worker's side: uploads are read, results written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from pellucid_shared.errors import InputError


class Store:
    """A local folder (``file:///...``) or an object store (``s3://bucket/prefix``).

    Raises:
        InputError: the URL names neither, or the folder cannot be made.
    """

    def __init__(self, url: str) -> None:
        try:
            self._store = _open(url)
        except (OSError, ValueError, BaseError) as error:
            raise InputError(f"PELLUCID_STORE_URL cannot be used: {str(error).splitlines()[0]}") from None

    def put(self, key: str, data: bytes) -> None:
        """Write an object; it is there whole or not at all."""
        self._store.put(key, data)

    def get(self, key: str) -> bytes:
        """Read an object; raises FileNotFoundError."""
        return bytes(self._store.get(key).bytes())

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._store.delete(key)


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return from_url(url)
    folder = Path(unquote(parts.path))
    folder.mkdir(parents=True, exist_ok=True)
    return LocalStore(folder)

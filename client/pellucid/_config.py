"""Where the server is and who is asking. Read when a model is made or a request is sent, never at import."""

from __future__ import annotations

import os


class Config:
    """Settings of this process. The environment wins over what is assigned here.

    Attributes:
        host: full URL of the server (``PELLUCID_HOST``), or None: run locally.
        api_key: key sent as ``Authorization: Bearer`` (``PELLUCID_API_KEY``), or None.
    """

    def __init__(self) -> None:
        self._host: str | None = None
        self._api_key: str | None = None

    @property
    def host(self) -> str | None:
        return os.environ.get("PELLUCID_HOST") or self._host

    @host.setter
    def host(self, value: str | None) -> None:
        self._host = value

    @property
    def api_key(self) -> str | None:
        return os.environ.get("PELLUCID_API_KEY") or self._api_key

    @api_key.setter
    def api_key(self, value: str | None) -> None:
        self._api_key = value


config = Config()

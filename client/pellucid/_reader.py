"""One reader's place in a job's event log, over a line that may break. Threads and asyncio share it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from pellucid_shared.errors import ConnectionFailedError
from pellucid_shared.wire import Event

if TYPE_CHECKING:
    import httpx

#: How often an event stream that breaks is taken up again, within about 9 s, before it counts as lost; a
#: server that is there and says nothing uses up several at once.
_RECONNECTS, _FOR_SILENCE = 8, 4


class Reader:
    """Makes events of the lines of server-sent events, and says how a stream that broke is taken up again.

    Args:
        url: the server's, for errors.
        lost: raises the error that a failure of the line is, once it counts as lost.
    """

    def __init__(self, url: str, lost: Callable[[httpx.TransportError], NoReturn]) -> None:
        self._url, self._lost = url, lost
        self._last = ""
        self._failures = 0
        self._data: list[str] = []
        self._id = ""

    def headers(self) -> dict[str, str]:
        """Of the request for what follows the last event that was read whole."""
        self._data, self._id = [], ""
        return {"Accept": "text/event-stream", **({"Last-Event-ID": self._last} if self._last else {})}

    def line(self, text: str) -> Event | None:
        """Take a line: ``data`` holds an event as JSON, ``id`` its place in the log, and an empty one ends
        it; the event it ends, if any."""
        name, _, value = text.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif name == "id":
            self._id = value.removeprefix(" ")
        elif text.startswith(":"):  # the server says that it is there, and that nothing happened
            self._failures = 0
        elif not text and self._data:
            event = Event.model_validate({**json.loads("\n".join(self._data)), "id": self._id})
            self._data = []
            self._last, self._failures = event.id or self._last, 0
            return event
        return None

    def broke(self, error: httpx.TransportError | None) -> float:
        """Note that the line broke, or that the server ended it (None); seconds until it is tried again.

        Raises:
            ConnectionFailedError: it broke too often.
        """
        import httpx

        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            self._failures += _FOR_SILENCE
        if error is not None and self._failures >= _RECONNECTS:
            self._lost(error)
        self._failures += 1
        if self._failures > _RECONNECTS:
            raise ConnectionFailedError(
                f"{self._url} ends the stream of events without saying how the job ended"
            )
        return min(2.0, 0.05 * 2.0**self._failures)

"""HTTP to one server: requests, the stream of a job's events, and every failure as its error."""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from pellucid_shared import PROTOCOL, __version__
from pellucid_shared.errors import (
    ConnectionFailedError,
    InputError,
    NotFoundError,
    PellucidError,
    RequestError,
    VersionError,
)
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor, pack_tensors
from pellucid_shared.wire import (
    JSON_TYPE,
    PROBLEM_TYPE,
    PROTOCOL_HEADER,
    REQUEST_PART,
    SAFETENSORS_TYPE,
    TENSORS_PART,
    Event,
)

from ._config import config
from ._progress import StatusLine

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
#: How long a stream of events may say nothing; the server pings more often.
_SILENT_SECONDS = 40.0
#: How often an event stream that breaks is taken up again, within about 9 s, before it counts as lost; a
#: server that is there and says nothing uses up several at once.
_RECONNECTS, _FOR_SILENCE = 8, 4
_VERSION_HEADER = "Pellucid-Version"


class Connection:
    """One server. Any thread may use it.

    Attributes:
        url: the server's URL without a slash at the end.
    """

    def __init__(self, url: str) -> None:
        self.url = server_url(url)
        self._client: httpx.Client | None = None
        self._process = 0
        self._lock = threading.Lock()

    def get_json(self, path: str) -> Any:
        return self._send("GET", path).json()

    def post_json(self, path: str, body: Any) -> Any:
        return self._send("POST", path, json=body).json()

    def submit(self, graph: Graph, literals: Mapping[str, WireTensor]) -> str:
        """Send a job; its id. The user's tensors travel beside the JSON, in a safetensors part."""
        body = b'{"graph":' + graph.to_json() + b"}"
        if literals:
            files = {
                REQUEST_PART: ("request.json", body, JSON_TYPE),
                TENSORS_PART: ("tensors.safetensors", pack_tensors(literals), SAFETENSORS_TYPE),
            }
            answer = self._send("POST", "/v1/jobs", files=files)
        else:
            answer = self._send("POST", "/v1/jobs", content=body, headers={"Content-Type": JSON_TYPE})
        return str(answer.json()["id"])

    def events(self, path: str) -> Iterator[Event]:
        """A job's events as they happen; a stream that breaks is taken up where it broke.

        Raises:
            ConnectionFailedError: it broke, and the server cannot be reached again.
        """
        import httpx

        last, failures = "", 0
        while True:
            try:
                headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
                timeout = httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS)
                with self._http().stream("GET", path, headers=headers, timeout=timeout) as answer:
                    self._raise_for(answer)
                    for event in _parsed(answer.iter_lines()):
                        last, failures = event.id or last, 0
                        yield event
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if failures >= _RECONNECTS:
                    self._unreachable(error)
            except httpx.TransportError as error:
                if isinstance(error, httpx.TimeoutException):
                    failures += _FOR_SILENCE
                if failures >= _RECONNECTS:
                    self._broken(error)
            failures += 1
            if failures > _RECONNECTS:
                raise ConnectionFailedError(
                    f"{self.url} ends the stream of events without saying how the job ended"
                )
            time.sleep(min(2.0, 0.05 * 2**failures))

    def download(self, path: str, status: StatusLine) -> bytes:
        """The bytes at a path, following redirects to a store."""
        import httpx

        try:
            with self._http().stream("GET", path, follow_redirects=True) as answer:
                self._raise_for(answer)
                length = answer.headers.get("Content-Length")
                data = bytearray()
                for chunk in answer.iter_bytes():
                    data += chunk
                    status.downloaded(len(data), int(length) if length else None)
                return bytes(data)
        except httpx.ConnectError as error:
            self._unreachable(error)
        except httpx.TransportError as error:
            self._broken(error)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        import httpx

        try:
            answer = self._http().request(method, path, **content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._unreachable(error)
        except httpx.TransportError as error:
            self._broken(error)
        self._raise_for(answer)
        return answer

    def _http(self) -> httpx.Client:
        import httpx

        with self._lock:
            # A forked process must not speak on the connections of its parent.
            if self._client is None or self._process != os.getpid():
                headers = {PROTOCOL_HEADER: str(PROTOCOL), "User-Agent": f"pellucid/{__version__}"}
                timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
                self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
                self._process = os.getpid()
                weakref.finalize(self, self._client.close)
            if key := config.api_key:
                self._client.headers["Authorization"] = f"Bearer {key}"
            else:
                self._client.headers.pop("Authorization", None)
            return self._client

    def _raise_for(self, answer: httpx.Response) -> None:
        protocol = answer.headers.get(PROTOCOL_HEADER)
        if protocol is not None and protocol != str(PROTOCOL):
            theirs = answer.headers.get(_VERSION_HEADER, "unknown")
            raise VersionError(
                f"{self.url} speaks protocol {protocol} (pellucid {theirs}) and this client {PROTOCOL} "
                f"(pellucid {__version__}); install the server's version: pip install pellucid=={theirs}"
            )
        if answer.status_code < 400:
            return
        answer.read()
        if answer.headers.get("Content-Type", "").startswith(PROBLEM_TYPE):
            error = PellucidError.from_problem(answer.json())
            if type(error) is NotFoundError and (prefix := urlsplit(self.url).path):
                error.message += f" The URL of the server is given with the path {prefix}: is that right?"
            raise error
        raise RequestError(
            f"{self.url} answered {answer.request.method} {answer.request.url.path} with "
            f"{answer.status_code} and no reason; is it a Pellucid server?"
        )

    def _unreachable(self, error: Exception) -> NoReturn:
        raise ConnectionFailedError(
            f"no server answers at {self.url} ({error}); start one with `pellucid up NAME=PATH`, or name "
            "another with PELLUCID_HOST or remote="
        ) from None

    def _broken(self, error: Exception) -> NoReturn:
        reason = str(error) or type(error).__name__
        raise ConnectionFailedError(f"the connection to {self.url} broke: {reason}; try again") from None


def server_url(text: str) -> str:
    """The URL of a server, without a slash at its end.

    Raises:
        InputError: it is not a full http or https URL, or has more than scheme, host, port and path.
    """
    url = text.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        plain = not (parts.query or parts.fragment or parts.username or any(c.isspace() for c in url))
    except ValueError:
        whole = plain = False
    if not (whole and plain):
        raise InputError(f"{text!r} is not the URL of a server; write it in full: http://host:8470")
    return url


def _parsed(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events: ``data`` holds the event as JSON, ``id`` its place in the log."""
    data: list[str] = []
    identity = ""
    for line in lines:
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif name == "id":
            identity = value.removeprefix(" ")
        elif not line and data:
            yield Event.model_validate({**json.loads("\n".join(data)), "id": identity})
            data = []

"""HTTP to one server: requests, the stream of a job's events, and every failure as its error."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
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
from ._reader import Reader

if TYPE_CHECKING:
    import ssl

    import httpx

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
#: How long a stream of events may say nothing; the server pings more often.
_SILENT_SECONDS = 40.0
#: How long after its deadline a wait for events may end.
_OVERTIME_SECONDS = 0.25
_VERSION_HEADER = "Pellucid-Version"
_HEADERS = {PROTOCOL_HEADER: str(PROTOCOL), "User-Agent": f"pellucid/{__version__}"}


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

    def events(self, path: str, until: float = math.inf) -> Iterator[Event]:
        """A job's events as they happen; a stream that breaks is taken up where it broke.

        Args:
            until: the time of ``time.monotonic`` at which it ends.

        Raises:
            ConnectionFailedError: it broke, and the server cannot be reached again.
        """
        import httpx

        reader = Reader(self.url, self._lost)
        while (left := until - time.monotonic()) > 0:
            failure = None
            try:
                with self._http().stream(
                    "GET", path, headers=reader.headers(), timeout=_patience(left)
                ) as answer:
                    self._raise_for(answer)
                    begun = time.monotonic()
                    for line in answer.iter_lines():
                        if event := reader.line(line):
                            yield event
                        # The next line may take as long as was left at first: ask anew, with less patience.
                        if not line and until < math.inf and time.monotonic() > begun + _OVERTIME_SECONDS:
                            break
                    else:
                        failure = reader.broke(None)
            except httpx.TransportError as error:
                if time.monotonic() >= until:
                    return
                failure = reader.broke(error)
            if failure is not None:
                time.sleep(max(0.0, min(failure, until - time.monotonic())))

    async def first(self, path: str, wanted: Callable[[Event], bool]) -> Event:
        """The first of a job's events that is wanted; awaited without a thread.

        Raises:
            ConnectionFailedError: as :meth:`events`.
        """
        import asyncio

        import httpx

        reader = Reader(self.url, self._lost)
        headers, timeout = {**_HEADERS, **_authorization()}, _patience(math.inf)
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, verify=_tls()
        ) as client:
            while True:
                try:
                    async with client.stream("GET", path, headers=reader.headers()) as answer:
                        if answer.status_code >= 400:
                            await answer.aread()
                        self._raise_for(answer)
                        async for line in answer.aiter_lines():
                            event = reader.line(line)
                            if event and wanted(event):
                                return event
                    pause = reader.broke(None)
                except httpx.TransportError as error:
                    pause = reader.broke(error)
                await asyncio.sleep(pause)

    def download(self, path: str, status: StatusLine) -> bytearray:
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
                return data
        except httpx.TransportError as error:
            self._lost(error)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        import httpx

        try:
            answer = self._http().request(method, path, **content)
        except httpx.TransportError as error:
            self._lost(error)
        self._raise_for(answer)
        return answer

    def _http(self) -> httpx.Client:
        import httpx

        with self._lock:
            # A forked process must not speak on the connections of its parent.
            if self._client is None or self._process != os.getpid():
                timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
                self._client = httpx.Client(base_url=self.url, headers=_HEADERS, timeout=timeout)
                self._process = os.getpid()
                weakref.finalize(self, self._client.close)
            if authorization := _authorization():
                self._client.headers.update(authorization)
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

    def _lost(self, error: httpx.TransportError) -> NoReturn:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ConnectionFailedError(
                f"no server answers at {self.url} ({error}); start one with `pellucid up NAME=PATH`, or name "
                "another with PELLUCID_HOST or remote="
            ) from None
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


def _patience(seconds: float) -> httpx.Timeout:
    """For a stream of events that is wanted for so long at most."""
    import httpx

    return httpx.Timeout(min(_SILENT_SECONDS, seconds), connect=min(_CONNECT_SECONDS, seconds))


def _authorization() -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if (key := config.api_key) else {}


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()

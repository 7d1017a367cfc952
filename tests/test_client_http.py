"""The client against servers that are not there, not ours, of another version, or that drop the line.

The server here is a few lines of the standard library that answer what a real one could not be made to.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from hand_card import hand_card
from pellucid import LanguageModel
from pellucid_shared import PROTOCOL, __version__
from pellucid_shared.errors import (
    ConnectionFailedError,
    InputError,
    ModelNotFoundError,
    RequestError,
    ShapeError,
    VersionError,
)
from pellucid_shared.graph import Graph
from pellucid_shared.packing import WireTensor, pack, unpack_tensors
from pellucid_shared.wire import PROBLEM_TYPE, PROTOCOL_HEADER
from service import free_port

Answer = tuple[int, str, bytes]
JSON = "application/json"


@dataclass
class Script:
    """What the server answers by (method, path), and what it was asked."""

    answers: dict[tuple[str, str], Callable[[Any], Answer]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=lambda: {PROTOCOL_HEADER: str(PROTOCOL)})
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def json(self, method: str, path: str, body: Any, status: int = 200, kind: str = JSON) -> None:
        self.answers[method, path] = lambda _: (status, kind, json.dumps(body).encode())

    def problem(self, method: str, path: str, **problem: Any) -> None:
        self.json(method, path, problem, int(problem["status"]), PROBLEM_TYPE)

    def asked(self, path: str) -> list[tuple[str, str, dict[str, str], bytes]]:
        return [request for request in self.seen if request[1] == path]


@contextmanager
def serving(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.seen.append((self.command, self.path, dict(self.headers), body))
            found = script.answers.get((self.command, self.path))
            status, kind, data = found(self) if found else (404, "text/plain", b"")
            self.send_response(status)
            for name, value in {**script.headers, "Content-Type": kind}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def stream(*events: dict[str, Any], first: int = 1) -> bytes:
    """Server-sent events as the gateway writes them."""
    lines = [
        f"id: {i}\nevent: {e['type']}\ndata: {json.dumps({'time': 0.0, **e})}\n\n"
        for i, e in enumerate(events, first)
    ]
    return "".join(lines).encode()


def state(name: str, **data: Any) -> dict[str, Any]:
    return {"type": "state", "data": {"state": name, **data}}


@pytest.fixture
def script() -> Script:
    """A server that has the hand-made model and completes every job with one tensor."""
    made = Script()
    made.json("GET", "/v1/models/m", hand_card().model_dump(mode="json"))
    made.json("GET", "/v1/models", [{"id": "m"}, {"id": "other"}])
    made.json("POST", "/v1/jobs", {"id": "j1", "model": "m", "state": "queued"}, 202)
    made.json("GET", "/v1/jobs/j1", {"id": "j1", "model": "m", "state": "completed"})
    events = stream(state("queued", position=1), state("running"), state("completed"))
    made.answers["GET", "/v1/jobs/j1/events"] = lambda _: (200, "text/event-stream", events)
    result = pack({"saved_0": WireTensor("float32", (2,), torch.tensor([1.0, 2.0]).numpy().tobytes())})
    made.answers["GET", "/v1/jobs/j1/result"] = lambda _: (200, "application/vnd.safetensors", result)
    return made


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script) as found:
        yield found


def test_a_job_is_sent_followed_and_fetched(script: Script, url: str) -> None:
    model: Any = LanguageModel("m", remote=url)
    with model.trace("hello") as tracer:
        h = model.h[0].output.save()
    assert type(h) is torch.Tensor
    assert h.tolist() == [1.0, 2.0]
    _, _, headers, body = script.asked("/v1/jobs")[0]
    assert body == b'{"graph":' + tracer.graph.to_json() + b"}"
    assert len(body) < 600
    assert headers[PROTOCOL_HEADER] == str(PROTOCOL)
    assert headers["User-Agent"] == f"pellucid/{__version__}"
    assert tracer.job is not None
    assert tracer.job.record().id == "j1"


def test_the_users_tensors_travel_in_a_safetensors_part(script: Script, url: str) -> None:
    model: Any = LanguageModel("m", remote=url)
    vector = torch.linspace(0, 1, 8, dtype=torch.bfloat16)
    with model.trace("hello") as tracer:
        (model.h[0].output + vector).save()
    _, _, headers, body = script.asked("/v1/jobs")[0]
    boundary = headers["Content-Type"].partition("boundary=")[2].encode()
    parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
    request, tensors = (content.removesuffix(b"\r\n") for _, _, content in parts)
    assert b'name="request"' in parts[0][0]
    assert b'name="tensors"' in parts[1][0]
    assert Graph.from_object(json.loads(request)["graph"]) == tracer.graph
    ((digest, sent),) = unpack_tensors(tensors).items()
    assert digest.encode() in request
    assert (sent.dtype, sent.shape) == ("bfloat16", (8,))


def test_the_environment_is_read_when_a_model_is_made_and_when_a_request_is_sent(
    script: Script, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_HOST", url)
    monkeypatch.delenv("PELLUCID_API_KEY", raising=False)
    model: Any = LanguageModel("m")
    assert "Authorization" not in script.seen[-1][2]
    monkeypatch.setenv("PELLUCID_API_KEY", "secret")
    with model.trace("hello"):
        model.h[0].output.save()
    assert {r[2].get("Authorization") for r in script.seen[1:]} == {"Bearer secret"}


def test_a_stream_that_breaks_is_taken_up_where_it_broke(script: Script, url: str) -> None:
    def events(handler: Any) -> Answer:
        last = handler.headers.get("Last-Event-ID")
        if last is None:
            return 200, "text/event-stream", stream(state("queued"), state("running"))
        assert last == "2"
        return 200, "text/event-stream", stream(state("completed"), first=3)

    script.answers["GET", "/v1/jobs/j1/events"] = events
    model: Any = LanguageModel("m", remote=url)
    with model.trace("hello"):
        h = model.h[0].output.save()
    assert h.tolist() == [1.0, 2.0]
    assert len(script.asked("/v1/jobs/j1/events")) == 2


def test_a_failed_job_raises_its_error_at_the_users_line(script: Script, url: str) -> None:
    problem = {"type": "urn:pellucid:shape-mismatch", "status": 422, "detail": "no fit", "node": 1}
    events = stream(state("failed", error=problem))
    script.answers["GET", "/v1/jobs/j1/events"] = lambda _: (200, "text/event-stream", events)
    model: Any = LanguageModel("m", remote=url)

    def body() -> None:
        h = model.h[0].output
        h.exp().save()

    with pytest.raises(ShapeError, match="no fit") as caught, model.trace("hello"):
        body()
    assert str(caught.value).startswith(f"{__file__}:{body.__code__.co_firstlineno + 2}: no fit")


def test_a_refused_request_raises_its_error(script: Script, url: str) -> None:
    script.problem("POST", "/v1/jobs", type="urn:pellucid:bad-input", status=422, detail="too long", limit=3)
    model: Any = LanguageModel("m", remote=url)
    with pytest.raises(InputError, match="too long") as caught, model.trace("hello"):
        model.h[0].output.save()
    assert caught.value.details == {"limit": 3}


def test_no_server_names_the_host_and_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionFailedError, match=rf"no server answers at {url} .*`pellucid up NAME=PATH`"):
        LanguageModel("m", remote=url)


def test_no_configured_server_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PELLUCID_HOST", raising=False)
    with pytest.raises(ConnectionFailedError, match="set PELLUCID_HOST to its URL"):
        LanguageModel("m", remote=True)


def test_half_a_url_is_refused() -> None:
    with pytest.raises(InputError, match="'localhost:8470' is not the URL of a server; write it in full"):
        LanguageModel("m", remote="localhost:8470")


def test_a_model_that_is_not_served_lists_what_is(script: Script, url: str) -> None:
    script.problem("GET", "/v1/models/mm", type="urn:pellucid:model-not-served", status=404, detail="no")
    with pytest.raises(ModelNotFoundError, match=r"does not serve 'mm'; it serves m, other\. Nearest: m"):
        LanguageModel("mm", remote=url)


def test_another_protocol_names_both_versions(script: Script, url: str) -> None:
    script.headers = {PROTOCOL_HEADER: "7", "Pellucid-Version": "9.9.9"}
    match = rf"speaks protocol 7 \(pellucid 9.9.9\) and this client {PROTOCOL} \(pellucid {__version__}\)"
    with pytest.raises(VersionError, match=match):
        LanguageModel("m", remote=url)


def test_a_server_that_is_not_ours_is_said_to_be(script: Script, url: str) -> None:
    script.headers = {}
    with pytest.raises(RequestError, match=r"with 404 and no reason; is it a Pellucid server\?"):
        LanguageModel("nothing", remote=url)


def test_sizes_ask_the_servers_tokenizer_once_for_each_prompt(script: Script, url: str) -> None:
    script.json("POST", "/v1/models/m/tokenize", {"ids": [[1, 2, 3]]})
    model: Any = LanguageModel("m", remote=url)
    for _ in range(2):
        with model.trace("hello") as tracer:
            assert model.h[0].output.shape == (1, 3, 8)
            model.h[0].output.save()
        assert tracer.graph.regions[0].invokes[0].input == [1, 2, 3]
    assert [json.loads(r[3]) for r in script.asked("/v1/models/m/tokenize")] == [{"text": ["hello"]}]

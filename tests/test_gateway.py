"""The gateway over real HTTP, with a real Redis; the model is a card and a tokenizer that a worker would
have registered."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hand_card import HIDDEN, VOCAB, hand_card
from pellucid_server.app import create_app
from pellucid_server.settings import Settings
from pellucid_shared import keyspace
from pellucid_shared.packing import WireTensor, digest, pack, pack_tensors
from redis_server import running_redis
from service import free_port

MAX_BODY = 200_000


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with running_redis() as url:
        yield url


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def db(redis_url: str) -> Iterator[redis.Redis]:
    """An empty Redis with one model, "m", registered and alive."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        register(client, "m")
        yield client


@pytest.fixture(scope="module")
def url(redis_url: str, store: Path) -> Iterator[str]:
    app = create_app(Settings(redis_url, store.as_uri(), max_body=MAX_BODY))
    port = free_port()
    config = uvicorn.Config(app, port=port, log_level="error", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def http(url: str, db: redis.Redis) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


def register(client: redis.Redis, name: str, **fields: Any) -> None:
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    mapping = {
        "source": "nowhere",
        "state": "ready",
        "progress": 1.0,
        "error": "",
        "card": hand_card(name).model_dump_json(),
        "fingerprint": "0" * 64,
        "tokenizer": tokenizer.to_str(),
        **fields,
    }
    client.sadd(keyspace.MODELS, name)
    client.hset(keyspace.model(name), mapping=mapping)
    client.zadd(keyspace.model_workers(name), {"worker": time.time() + 3600})


def graph(*nodes: dict[str, Any], value: Any = "w1 w2 w3", **top: Any) -> dict[str, Any]:
    invokes = [{"input": value}]
    regions = [{"kind": "trace", "invokes": invokes}]
    return {"version": 1, "model": "m", "regions": regions, "nodes": list(nodes), **top}


def get(module: str, **site: Any) -> dict[str, Any]:
    return {"op": "site.get", "args": [{"site": {"module": module, **site}}]}


SAVE = {"op": "save", "args": [{"ref": 0}]}
GOOD = graph(get("h.0"), SAVE)


def post(http: httpx.Client, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"graph": body}).encode()
    return http.post("/v1/jobs", content=content, headers={"Content-Type": "application/json", **headers})


def problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    found: dict[str, Any] = answer.json()
    assert (answer.status_code, found["type"]) == (status, f"urn:pellucid:{slug}"), found
    assert found["status"] == status
    assert found["title"]
    assert "Traceback" not in answer.text
    return found


# --- jobs --------------------------------------------------------------------------------------------------


def test_a_job_is_recorded_tokenized_and_sent_to_its_models_queue(http: httpx.Client, db: Any) -> None:
    answer = post(http, GOOD)
    assert answer.status_code == 202
    record = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{record['id']}"
    assert (record["state"], record["position"], record["attempt"]) == ("queued", 1, 0)
    inputs = json.loads(db.hget(keyspace.job(record["id"]), "inputs"))
    assert inputs == [{"ids": [[1, 2, 3]]}]
    (message,) = db.lrange(keyspace.queue("m"), 0, -1)
    assert json.loads(message)["headers"]["task"] == keyspace.TASK
    assert post(http, GOOD).json()["position"] == 2
    assert http.get(f"/v1/jobs/{record['id']}").json() == record


def test_the_request_of_one_saved_layer_is_small() -> None:
    body = json.dumps(
        {"graph": graph(get("model.layers.10"), SAVE, value="The Eiffel Tower is in the city of")}
    )
    assert len(body) < 600


def test_literals_travel_beside_the_json(http: httpx.Client, store: Path) -> None:
    tensor = WireTensor("float32", (1, 3, HIDDEN), bytes(4 * 3 * HIDDEN))
    name = digest(tensor)
    body = graph({"op": "site.set", "args": [{"site": {"module": "h.0"}}, {"tensor": name}]}, get("h.0"))
    files = {
        "request": ("r", json.dumps({"graph": body}), "application/json"),
        "tensors": ("t", pack_tensors({name: tensor}), "application/octet-stream"),
    }
    answer = http.post("/v1/jobs", files=files)
    assert answer.status_code == 202, answer.text
    assert (store / keyspace.upload(answer.json()["id"])).read_bytes() == pack_tensors({name: tensor})
    found = problem(post(http, body), 422, "invalid-graph")
    assert found["node"] == 0
    assert "was not sent" in found["detail"]
    corrupt = {**files, "tensors": ("t", pack_tensors({"sha256:" + "0" * 64: tensor}), "x/y")}
    assert (
        "does not have that hash"
        in problem(http.post("/v1/jobs", files=corrupt), 400, "bad-request")["detail"]
    )


def test_the_result_of_a_completed_job_is_streamed(http: httpx.Client, db: Any, store: Path) -> None:
    job = post(http, GOOD).json()["id"]
    assert "queued" in problem(http.get(f"/v1/jobs/{job}/result"), 409, "job-failed")["detail"]
    data = pack({"saved_0": WireTensor("float32", (2**20,), bytes(4 * 2**20))})
    key = keyspace.result(job, 1)
    (store / key).parent.mkdir(exist_ok=True)
    (store / key).write_bytes(data)
    result = json.dumps({"key": key, "bytes": len(data), "names": ["saved_0"]})
    db.hset(keyspace.job(job), mapping={"state": "completed", "attempt": 1, "result": result})
    answer = http.get(f"/v1/jobs/{job}/result")
    assert answer.content == data
    assert answer.headers["Content-Type"] == "application/vnd.safetensors"
    (store / key).unlink()
    assert "no longer kept" in problem(http.get(f"/v1/jobs/{job}/result"), 404, "job-not-found")["detail"]


def test_a_failed_job_answers_with_its_own_problem(http: httpx.Client, db: Any) -> None:
    job = post(http, GOOD).json()["id"]
    error = {
        "type": "urn:pellucid:execution-failed",
        "title": "t",
        "status": 409,
        "detail": "boom",
        "node": 3,
    }
    db.hset(keyspace.job(job), mapping={"state": "failed", "error": json.dumps(error)})
    assert problem(http.get(f"/v1/jobs/{job}/result"), 409, "execution-failed")["node"] == 3


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked(http: httpx.Client, db: Any) -> None:
    job = post(http, GOOD).json()["id"]
    cancelled = http.post(f"/v1/jobs/{job}/cancel").json()
    assert (cancelled["state"], cancelled["error"]["type"]) == ("cancelled", "urn:pellucid:job-cancelled")
    assert db.zcard(keyspace.model_waiting("m")) == 0
    assert http.post(f"/v1/jobs/{job}/cancel").json() == cancelled
    assert [e["data"]["state"] for e in events(http, job)] == ["received", "queued", "cancelled"]
    running = post(http, GOOD).json()["id"]
    db.hset(keyspace.job(running), "state", "running")
    assert http.post(f"/v1/jobs/{running}/cancel").json()["state"] == "running"
    assert db.hget(keyspace.job(running), "cancel") == b"1"


def events(http: httpx.Client, job: str, **headers: str) -> list[dict[str, Any]]:
    answer = http.get(f"/v1/jobs/{job}/events", headers=headers)
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.replace("\r\n", "\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append({"id": lines["id"], "event": lines["event"], **json.loads(lines["data"])})
    return found


def test_events_are_sent_to_the_end_and_resume_where_they_stopped(http: httpx.Client, db: Any) -> None:
    job = post(http, GOOD).json()["id"]

    def finish() -> None:
        time.sleep(0.2)
        for state in ("running", "completed"):
            data = {"type": "state", "attempt": 1, "time": 1.0, "data": json.dumps({"state": state})}
            db.xadd(keyspace.job_events(job), data)

    thread = threading.Thread(target=finish)
    thread.start()
    seen = events(http, job)
    thread.join()
    assert [e["data"]["state"] for e in seen] == ["received", "queued", "running", "completed"]
    assert [e["data"]["state"] for e in events(http, job, **{"Last-Event-ID": seen[1]["id"]})] == [
        "running",
        "completed",
    ]


def test_a_job_that_is_silent_for_long_is_followed_on_one_line(http: httpx.Client, db: Any) -> None:
    """Longer than Redis is asked to wait for an event at a time."""
    job = post(http, GOOD).json()["id"]

    def finish() -> None:
        time.sleep(7)
        data = {"type": "state", "attempt": 1, "time": 1.0, "data": '{"state": "completed"}'}
        db.xadd(keyspace.job_events(job), data)

    thread = threading.Thread(target=finish)
    thread.start()
    seen = events(http, job)
    thread.join()
    assert [e["data"]["state"] for e in seen] == ["received", "queued", "completed"]


def test_a_reader_later_than_the_log_keeps_gets_a_gap_with_the_present_state(
    http: httpx.Client, db: Any
) -> None:
    job = post(http, GOOD).json()["id"]
    db.hset(keyspace.job(job), "state", "completed")
    db.delete(keyspace.job_events(job))
    data = {"type": "state", "attempt": 1, "time": 1.0, "data": '{"state": "completed"}'}
    db.xadd(keyspace.job_events(job), data)
    (gap,) = events(http, job, **{"Last-Event-ID": "5-0"})
    assert (gap["event"], gap["data"]["state"]) == ("gap", "completed")


def test_what_a_dead_worker_took_in_and_never_claimed_is_sent_again(http: httpx.Client, db: Any) -> None:
    job = post(http, GOOD).json()["id"]
    assert db.lpop(keyspace.queue("m")), "taken in by the worker that dies"
    db.zadd(keyspace.model_workers("m"), {"dead": time.time() - 2 * keyspace.LEASE_SECONDS})
    deadline = time.monotonic() + 30
    while not db.llen(keyspace.queue("m")):
        assert time.monotonic() < deadline, "the job is sent again"
        time.sleep(0.1)
    assert job.encode() in base64.b64decode(json.loads(db.lindex(keyspace.queue("m"), 0))["body"])
    assert db.zrange(keyspace.model_workers("m"), 0, -1) == [b"worker"]


def test_the_job_of_a_dead_worker_is_queued_again_and_fails_after_its_last_attempt(
    http: httpx.Client, db: Any
) -> None:
    job = post(http, GOOD).json()["id"]
    for attempt, expected in ((1, "queued"), (keyspace.MAX_ATTEMPTS, "failed")):
        db.hset(keyspace.job(job), mapping={"state": "running", "attempt": attempt})
        db.zadd(keyspace.LEASES, {job: time.time() - 1})
        deadline = time.monotonic() + 20
        while (record := http.get(f"/v1/jobs/{job}").json())["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert record["state"] == expected
    assert record["error"]["type"] == "urn:pellucid:worker-lost"
    assert db.llen(keyspace.queue("m")) == 2  # sent once when it was made, once when it was taken back


# --- refusals ----------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, str, int | None]] = {
    "unknown op": (graph({"op": "torch.ads", "args": [1]}), "no op 'torch.ads'", 0),
    "unknown module": (graph(get("h.9")), "no module 'h.9'. Nearest", 0),
    "never called": (graph(get("unused")), "never called", 0),
    "called once": (graph(get("h.0", call=3)), "called 1 times", 0),
    "no such leaf": (graph(get("h.1")), "it has tensors at [0]", 0),
    "opaque leaf": (graph(get("h.1", path=[1])), "never read or written", 0),
    "unknown kind": (graph(get("h.0", kind="grad")), "kind", 0),
    "negative step": (graph(get("h.0", step=-1)), "step", 0),
    "later step": (graph(get("h.0", step=2)), "one step", 0),
    "other invoke": (graph(get("h.0", invoke=7)), "invoke 7", 0),
    "forward ref": (graph(SAVE), "not before it", 0),
    "ref to a save": (graph(get("h.0"), SAVE, {"op": "torch.abs", "args": [{"ref": 1}]}), "yields none", 2),
    "ref is text": (graph(get("h.0"), {"op": "torch.abs", "args": [{"ref": "0"}]}), "a node's position", 1),
    "unknown tag": (graph({"op": "torch.abs", "args": [{"eval": "1"}]}), "unknown tag", 0),
    "two tags": (graph({"op": "torch.abs", "args": [{"ref": 0, "tensor": 1}]}), "exactly one key", 0),
    "no op": (graph({"args": []}), "lacks op", 0),
    "extra member": (graph({"op": "torch.abs", "args": [1], "code": "x"}), "has no code", 0),
    "missing argument": (
        graph(get("h.0"), {"op": "torch.add", "args": [{"ref": 0}]}),
        "lacks its argument",
        1,
    ),
    "unknown keyword": (
        graph(get("h.0"), {"op": "torch.sum", "args": [{"ref": 0}], "kwargs": {"dimm": 1}}),
        "'dimm'",
        1,
    ),
    "shapes": (
        graph(get("h.0"), get("lm_head"), {"op": "torch.add", "args": [{"ref": 0}, {"ref": 1}]}),
        "[1, 3, 50]",
        2,
    ),
    "index": (graph(get("h.0"), {"op": "getitem", "args": [{"ref": 0}, {"tuple": [0, 3]}]}), "3", 1),
    "too late": (
        graph(get("h.1", path=[0]), {"op": "site.set", "args": [{"site": {"module": "h.0"}}, {"ref": 0}]}),
        "h.1.output",
        1,
    ),
    "twice the name": (
        graph(get("h.0"), *[{"op": "save", "args": [{"ref": 0}, "x"]}] * 2),
        "saved twice",
        2,
    ),
    "no invokes": (graph(regions=[{"kind": "trace", "invokes": []}]), "at least one invoke", None),
    "unknown region": (graph(regions=[{"kind": "spiral", "invokes": []}]), "region kind 'spiral'", None),
    "version": (graph(version=9), "version 9", None),
    "nodes": (graph(nodes={}), "are lists", None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_refused_and_its_node_named(http: httpx.Client, case: str) -> None:
    body, text, node = BROKEN[case]
    answer = post(http, body)
    assert answer.status_code == 422, answer.text
    found = answer.json()
    assert text in found["detail"]
    assert found.get("node") == node
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("value", "status", "slug", "text"),
    [
        ("", 422, "empty-prompt", "invoke 0 is empty"),
        ("   ", 422, "empty-prompt", "has no tokens"),
        ([1, 2, 50], 422, "bad-input", "token id 50 is not in the vocabulary of m, which has 50"),
        ([1] * 65, 422, "bad-input", "65 tokens; m takes at most 64"),
    ],
)
def test_inputs_that_cannot_be_run_are_refused(
    http: httpx.Client, value: Any, status: int, slug: str, text: str
) -> None:
    assert text in problem(post(http, graph(get("h.0"), SAVE, value=value)), status, slug)["detail"]


@pytest.mark.parametrize(
    ("content", "status", "slug", "text"),
    [
        (b"", 422, "invalid-graph", "not JSON"),
        (b"\xff\xfe", 422, "invalid-graph", "not UTF-8"),
        (b'{"graph":{"a":NaN}}', 422, "invalid-graph", "NaN is not JSON"),
        (b"[" * 5000, 413, "over-limit", "nested 5000 deep"),
        (b'{"graf":1}', 400, "bad-request", "found ['graf']"),
        (b"x" * (MAX_BODY + 1), 413, "over-limit", f"at most {MAX_BODY}"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(
    http: httpx.Client, content: bytes, status: int, slug: str, text: str
) -> None:
    assert text in problem(post(http, content), status, slug)["detail"]


def test_a_body_of_another_type_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", content=b"x", headers={"Content-Type": "application/x-pickle"})
    assert "x-pickle" in problem(answer, 400, "bad-request")["detail"]
    long = {"Content-Type": "multipart/form-data; boundary=" + 500 * "b"}
    answer = http.post("/v1/jobs", content=b"x", headers=long)
    assert "multipart body cannot be read" in problem(answer, 400, "bad-request")["detail"]
    answer = http.post("/v1/jobs", files={"other": b"x"})
    assert "found ['other']" in problem(answer, 400, "bad-request")["detail"]


def test_a_model_that_is_not_served_is_answered_with_what_is(http: httpx.Client, db: Any) -> None:
    answer = problem(post(http, graph(get("h.0"), model="mm")), 404, "model-not-served")
    assert answer["detail"] == "this server does not serve 'mm'; it serves m. Nearest: m."
    assert answer["served"] == ["m"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"state": "loading", "progress": 0.41}, "m is loading, 41% done"),
        ({"state": "failed", "error": "no such folder"}, "m is failed: no such folder"),
    ],
)
def test_a_model_that_cannot_take_jobs_says_why(
    http: httpx.Client, db: Any, fields: dict[str, Any], text: str
) -> None:
    register(db, "m", **fields)
    answer = post(http, GOOD)
    assert text in problem(answer, 503, "unavailable")["detail"]
    assert int(answer.headers["Retry-After"]) > 0


def test_a_model_whose_workers_are_dead_cannot_take_jobs(http: httpx.Client, db: Any) -> None:
    db.zadd(keyspace.model_workers("m"), {"worker": time.time() - 60})
    assert "no worker of it is alive" in problem(post(http, GOOD), 503, "unavailable")["detail"]
    assert problem(http.get("/ready"), 503, "unavailable")["detail"] == "m is stopped"


def test_another_protocol_is_refused_naming_both_versions(http: httpx.Client) -> None:
    answer = post(http, GOOD, **{"Pellucid-Protocol": "99"})
    found = problem(answer, 426, "version-mismatch")
    assert "speaks protocol 1" in found["detail"]
    assert "the client protocol 99" in found["detail"]
    assert "pip install pellucid==" in found["detail"]
    assert answer.headers["Pellucid-Protocol"] == "1"


def test_what_is_not_there_is_a_problem_too(http: httpx.Client) -> None:
    assert problem(http.get("/v1/jobs/nope"), 404, "job-not-found")
    assert problem(http.get("/v1/jobs/nope/events"), 404, "job-not-found")
    assert problem(http.get("/nowhere"), 404, "not-found")
    assert http.delete("/v1/jobs").status_code == 405
    job = post(http, GOOD).json()["id"]
    bad = http.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "x"})
    assert problem(bad, 400, "bad-request")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_gets_more_than_a_refusal(http: httpx.Client, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["bytes", "json", "node", "site", "regions"]))
    value = data.draw(st.binary(max_size=60) if kind == "bytes" else JSON)
    body: Any = value
    if kind == "node":
        body = {"graph": {**GOOD, "nodes": [*GOOD["nodes"], value]}}
    elif kind == "site":
        body = {"graph": graph({"op": "site.get", "args": [{"site": value}]}, SAVE)}
    elif kind == "regions":
        body = {"graph": {**GOOD, "regions": [value]}}
    content = value if kind == "bytes" else json.dumps(body).encode()
    answer = post(http, content)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"


# --- models and service ------------------------------------------------------------------------------------


def test_models_cards_and_tokenizing(http: httpx.Client) -> None:
    (shown,) = http.get("/v1/models").json()
    assert (shown["id"], shown["state"], shown["workers"]) == ("m", "ready", 1)
    assert shown["parameters"] == hand_card().parameters
    assert http.get("/v1/models/m").json() == json.loads(hand_card().model_dump_json())
    answer = http.post("/v1/models/m/tokenize", json={"text": ["w1 w2", "w3 zebra"]})
    assert answer.json() == {"ids": [[1, 2], [3, VOCAB - 1]]}
    assert problem(http.post("/v1/models/m/tokenize", json={"text": 7}), 400, "bad-request")


def test_the_service_answers_how_it_is(http: httpx.Client, db: Any) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "models": ["m"]}
    assert http.get("/v1/whoami").json()["anonymous"] is True
    post(http, GOOD)
    metrics = http.get("/metrics").text
    assert 'pellucid_jobs_queued{model="m"} 1.0' in metrics
    assert 'route="/v1/jobs",status="202"' in metrics
    schema = http.get("/openapi.json").json()
    assert "/v1/jobs/{job}/events" in schema["paths"]
    assert http.get("/docs").status_code == 200
    db.flushall()
    assert problem(http.get("/ready"), 503, "unavailable")["detail"] == "no model is served yet"

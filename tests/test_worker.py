"""A real `pellucid worker` with a real Redis and store; the jobs are written as the gateway writes them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from graphs import Program
from pellucid_shared import keyspace
from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, UnavailableError
from pellucid_shared.graph import Graph
from pellucid_shared.packing import digest
from pellucid_shared.values import TensorRef
from pellucid_shared.wire import JobState
from pellucid_worker.settings import Settings
from pellucid_worker.store import Store
from pellucid_worker.tensors import from_wire, to_wire
from redis_server import running_redis
from references import capture, forward
from worker_process import Desk, WorkerProcess, until

pytestmark = pytest.mark.xdist_group("worker")

FIRST, HEAD = "model.layers.0", "lm_head"
IDS = [[5, 9, 31, 7, 2, 40]]
MODEL = "tiny"
#: As many jobs as a worker takes in at once.
TAKEN_IN = 64

Start = Callable[..., WorkerProcess]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running_redis() as url:
        found = Desk(url, tmp_path_factory.mktemp("store").as_uri())
        yield found
        found.close()


@pytest.fixture(scope="module")
def start(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a worker; what a failed test left running is killed in the end."""
    logs, started = tmp_path_factory.mktemp("logs"), []

    def make(name: str, source: Path | str, at: Desk = desk) -> WorkerProcess:
        started.append(WorkerProcess(at, name, source, logs / f"{len(started)}.log"))
        return started[-1]

    yield make
    for process in started:
        process.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def worker(desk: Desk, start: Start, tiny_folders: dict[str, Path]) -> WorkerProcess:
    """The worker that most tests share; it is ready."""
    process = start(MODEL, tiny_folders["llama"])
    ready(desk, process)
    return process


@pytest.fixture
def plain(tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models["llama"]


def ready(desk: Desk, process: WorkerProcess, model: str = MODEL) -> None:
    until(lambda: "is ready" in process.output() or process.process.poll() is not None, "a worker")
    assert process.process.poll() is None, process.output()
    assert desk.deployment(model)["state"] == "ready"


def saving(module: str = FIRST, model: str = MODEL) -> Graph:
    program = Program(model)
    program.save(program.get(module), "h")
    return program.graph()


def slow(passes: int, model: str = MODEL) -> tuple[Graph, list[list[list[int]]]]:
    """A graph of that many passes, each a tenth of a second or so, with a site touched in each."""
    program = Program(model)
    total = program.op("torch.zeros", [])
    for i in range(passes):
        # This site has no batch axis, so each invoke has a pass of its own.
        mean = program.op("torch.mean", program.get("model.rotary_emb", path=(0,), invoke=i))
        large = program.op("torch.full", [1400, 1400], 0.5)
        product = program.op("torch.matmul", program.op("torch.mul", large, mean), large)
        total = program.op("torch.add", total, program.op("torch.mean", product))
    program.save(total, "total")
    return program.graph(passes), [IDS] * passes


def run_slow(desk: Desk, *workers: WorkerProcess, passes: int = 400, model: str = MODEL) -> str:
    """A slow job; one of the workers runs it now."""
    graph, inputs = slow(passes, model)
    job = desk.submit(graph, *inputs)
    until(lambda: runner(job, *workers), "the slow job to run")
    return job


def runner(job: str, *workers: WorkerProcess) -> WorkerProcess | None:
    """The worker that has begun this job."""
    return next((w for w in workers if f"job {job} runs, attempt" in w.output()), None)


def failure(desk: Desk, job: str) -> dict[str, Any]:
    """The problem of a job that fails."""
    assert desk.ended(job) is JobState.FAILED
    problem: dict[str, Any] = desk.field(job, "error")
    assert desk.events(job)[-1][2] == {"state": "failed", "error": problem}
    assert desk.lease(job) is None
    return problem


# --- a job -------------------------------------------------------------------------------------------------


def test_a_job_runs_and_completes(desk: Desk, worker: WorkerProcess, plain: PreTrainedModel) -> None:
    before = time.time()
    job = desk.submit(saving(), IDS)
    assert desk.ended(job) is JobState.COMPLETED
    h = from_wire(desk.result(job)["h"])
    torch.testing.assert_close(h, capture(plain, torch.tensor(IDS), FIRST))
    times = desk.field(job, "times")
    assert before <= times["queued"] <= times["running"] <= times["completed"] <= time.time()
    assert [(kind, attempt) for kind, attempt, _ in desk.events(job)] == [("state", "1"), ("state", "1")]
    assert desk.states(job) == ["running", "completed"]
    result = desk.field(job, "result")
    assert (result["names"], result["bytes"]) == (["h"], len(desk.store.get(result["key"])))
    assert desk.lease(job) is None
    assert job not in desk.redis.zrange(keyspace.model_waiting(MODEL), 0, -1)
    assert 0 < desk.redis.ttl(keyspace.job(job)) <= keyspace.JOB_TTL_SECONDS


def test_a_job_brings_its_own_tensors(desk: Desk, worker: WorkerProcess, plain: PreTrainedModel) -> None:
    vector = torch.linspace(-1, 1, 32)
    wire = to_wire(vector)
    program = Program(MODEL)
    program.set(FIRST, program.op("torch.add", program.get(FIRST), TensorRef(digest(wire))))
    program.save(program.get(HEAD), "logits")
    job = desk.submit(program.graph(), IDS, tensors={digest(wire): wire})
    assert desk.ended(job) is JobState.COMPLETED
    wanted = forward(plain, torch.tensor(IDS), after={FIRST: lambda out: out + vector}).logits
    torch.testing.assert_close(from_wire(desk.result(job)["logits"]), wanted)


def test_a_message_that_comes_twice_runs_its_job_once(desk: Desk, worker: WorkerProcess) -> None:
    job = desk.write(saving(), [IDS])
    desk.send(job, times=3)
    assert desk.ended(job) is JobState.COMPLETED
    until(lambda: worker.output().count(f"job {job} is not to be had") == 2, "the twins")
    assert desk.states(job) == ["running", "completed"]
    assert desk.field(job, "attempt") == "1"


def test_a_message_without_a_record_does_nothing(desk: Desk, worker: WorkerProcess) -> None:
    job = desk.write(saving(), [IDS])
    desk.send(job)
    desk.redis.delete(keyspace.job(job))
    desk.ended(desk.submit(saving(), IDS))
    until(lambda: f"job {job}" in worker.output(), "the message")


# --- failures ----------------------------------------------------------------------------------------------


def test_an_op_that_fails_is_named_with_its_node(desk: Desk, worker: WorkerProcess) -> None:
    program = Program(MODEL)
    zeros = program.op(
        "torch.mul", program.op("getitem", program.get(FIRST), (0, slice(0, 3), slice(0, 3))), 0
    )
    program.save(program.op("torch.linalg.cholesky", zeros), "never")
    problem = failure(desk, desk.submit(program.graph(), IDS))
    assert (problem["type"], problem["node"]) == ("urn:pellucid:execution-failed", 3)
    assert problem["detail"].startswith("torch.linalg.cholesky failed on [3, 3] float32: ")


def test_a_graph_that_does_not_fit_the_model_is_named_with_its_node(
    desk: Desk, worker: WorkerProcess
) -> None:
    program = Program(MODEL)
    program.save(program.op("torch.add", program.get(FIRST), program.op("torch.ones", [33])), "never")
    problem = failure(desk, desk.submit(program.graph(), IDS))
    assert (problem["type"], problem["node"]) == ("urn:pellucid:shape-mismatch", 2)


def broken_graph(desk: Desk, job: str) -> None:
    desk.redis.set(keyspace.job_graph(job), b'{"version": 1}')


def lost_graph(desk: Desk, job: str) -> None:
    desk.redis.delete(keyspace.job_graph(job))


def broken_inputs(desk: Desk, job: str) -> None:
    desk.redis.hset(keyspace.job(job), "inputs", "[")


def lost_upload(desk: Desk, job: str) -> None:
    desk.store.delete(keyspace.upload(job))


def broken_upload(desk: Desk, job: str) -> None:
    desk.store.put(keyspace.upload(job), b"not safetensors")


@pytest.mark.parametrize(
    ("damage", "slug", "detail"),
    [
        (broken_graph, "invalid-graph", "a graph lacks model, nodes, regions"),
        (lost_graph, "job-failed", "lacks its graph or its inputs; send the job again"),
        (
            broken_inputs,
            "execution-failed",
            "the worker failed with JSONDecodeError; its log has more under job",
        ),
        (
            lost_upload,
            "job-failed",
            "the tensors this job came with are not in the store any more; send it again",
        ),
        (broken_upload, "bad-request", "safetensors"),
    ],
)
def test_a_damaged_job_fails_and_says_what_is_wrong(
    desk: Desk, worker: WorkerProcess, damage: Callable[[Desk, str], None], slug: str, detail: str
) -> None:
    wire = to_wire(torch.ones(32))
    program = Program(MODEL)
    program.save(program.op("torch.add", program.get(FIRST), TensorRef(digest(wire))), "h")
    job = desk.write(program.graph(), [IDS], {digest(wire): wire})
    damage(desk, job)
    desk.send(job)
    problem = failure(desk, job)
    assert problem["type"] == f"urn:pellucid:{slug}"
    assert detail in problem["detail"]
    assert desk.ended(desk.submit(saving(), IDS)) is JobState.COMPLETED


# --- cancelling --------------------------------------------------------------------------------------------


def test_a_job_that_was_cancelled_while_queued_is_never_run(desk: Desk, worker: WorkerProcess) -> None:
    job = desk.write(saving(), [IDS])
    desk.cancel(job)
    desk.send(job)
    until(lambda: f"job {job} is not to be had" in worker.output(), "the message")
    assert desk.state(job) is JobState.CANCELLED
    assert desk.states(job) == ["cancelled"]
    assert desk.field(job, "attempt") == "0"


def test_a_running_job_is_cancelled_at_its_next_site(desk: Desk, worker: WorkerProcess) -> None:
    job = run_slow(desk, worker)
    assert desk.lease(job) is not None
    desk.cancel(job)
    assert desk.ended(job) is JobState.CANCELLED
    problem = desk.field(job, "error")
    assert (problem["type"], problem["detail"]) == (
        "urn:pellucid:job-cancelled",
        "the job was cancelled while it ran",
    )
    assert desk.states(job) == ["running", "cancelled"]
    assert desk.lease(job) is None
    assert desk.ended(desk.submit(saving(), IDS)) is JobState.COMPLETED


def test_a_job_that_waits_its_turn_is_cancelled_before_it_comes(desk: Desk, worker: WorkerProcess) -> None:
    ahead = run_slow(desk, worker)
    job = desk.submit(saving(), IDS)
    until(lambda: desk.state(job) is JobState.RUNNING, "the job to be taken in")
    desk.cancel(job)
    assert desk.ended(job) is JobState.CANCELLED
    assert desk.field(job, "error")["detail"] == "the job was cancelled before it ran"
    assert desk.state(ahead) is JobState.RUNNING
    desk.cancel(ahead)
    desk.ended(ahead)


# --- many jobs ---------------------------------------------------------------------------------------------


def test_as_many_jobs_are_taken_in_as_there_are_threads_and_all_complete(
    desk: Desk, worker: WorkerProcess
) -> None:
    ahead = run_slow(desk, worker)
    lease = desk.lease(ahead)
    assert lease is not None
    prompts = [[[i + 1, i + 2, i + 3]] for i in range(TAKEN_IN)]
    jobs = [desk.submit(saving(), prompt) for prompt in prompts]
    taken, rest = jobs[: TAKEN_IN - 1], jobs[TAKEN_IN - 1 :]
    until(lambda: all(desk.state(job) is JobState.RUNNING for job in taken), "the jobs to be taken in")
    assert [desk.state(job) for job in rest] == [JobState.QUEUED]
    until(lambda: (desk.lease(ahead) or 0) > lease, "the lease to be renewed")
    desk.cancel(ahead)
    assert desk.ended(ahead) is JobState.CANCELLED
    assert {desk.ended(job) for job in jobs} == {JobState.COMPLETED}
    shown = {from_wire(desk.result(job)["h"]).sum().item() for job in jobs}
    assert len(shown) == TAKEN_IN


# --- several workers ---------------------------------------------------------------------------------------


def test_two_workers_of_a_model_share_its_queue_and_a_late_twin_changes_nothing(
    desk: Desk, worker: WorkerProcess, start: Start, tiny_folders: dict[str, Path]
) -> None:
    second = start(MODEL, tiny_folders["llama"])
    ready(desk, second)
    assert len(desk.workers(MODEL)) == 2

    def both_have_worked() -> bool:
        job = desk.submit(saving(), IDS)
        assert desk.ended(job) is JobState.COMPLETED
        return all("completed" in each.output()[offset:] for each, offset in offsets.items())

    offsets = {worker: len(worker.output()), second: len(second.output())}
    until(both_have_worked, "both to work")

    # A worker that stands still loses its job to the other one; woken, it leaves it alone.
    job = run_slow(desk, worker, second)
    slept = runner(job, worker, second)
    assert slept is not None
    slept.pause()
    desk.expire(job)

    def again() -> bool:
        desk.send(job)  # as the gateway's reaper does; the one that sleeps may take a message in
        time.sleep(0.1)
        return bool(desk.field(job, "attempt") == "2")

    until(again, "the second attempt")
    assert desk.states(job) == ["running", "running"]
    desk.cancel(job)
    assert desk.ended(job) is JobState.CANCELLED
    events = desk.events(job)
    assert [attempt for _, attempt, _ in events] == ["1", "2", "2"]
    slept.go_on()
    until(lambda: f"job {job} was taken over by another attempt" in slept.output(), "the late twin")
    assert (desk.state(job), desk.field(job, "attempt"), desk.events(job)) == (
        JobState.CANCELLED,
        "2",
        events,
    )

    # The one that stops is gone from the register, and the other goes on.
    assert second.stop() == 0
    assert len(desk.workers(MODEL)) == 1
    assert desk.deployment(MODEL)["state"] == "ready"
    assert desk.ended(desk.submit(saving(), IDS)) is JobState.COMPLETED


def test_another_model_is_not_served_under_a_name_that_is_taken(
    desk: Desk, worker: WorkerProcess, start: Start, tiny_folders: dict[str, Path]
) -> None:
    before = desk.deployment(MODEL)
    other = start(MODEL, tiny_folders["gpt2"])
    assert other.process.wait(timeout=60) == 1
    last = other.output().splitlines()[-1]
    assert last == f"Error: another worker serves something else as '{MODEL}'; give this one its own name"
    assert "Traceback" not in other.output()
    assert desk.deployment(MODEL) == before
    assert len(desk.workers(MODEL)) == 1


# --- starting ----------------------------------------------------------------------------------------------


def test_a_ready_worker_publishes_its_card(
    desk: Desk, worker: WorkerProcess, tiny_folders: dict[str, Path]
) -> None:
    found = desk.deployment(MODEL)
    card = ModelCard.model_validate_json(found["card"])
    assert (card.id, card.class_name, card.fingerprint) == (MODEL, "LlamaForCausalLM", found["fingerprint"])
    assert (found["source"], found["progress"], found["error"]) == (str(tiny_folders["llama"]), "1.0", "")
    assert MODEL in desk.redis.smembers(keyspace.MODELS)
    beat = desk.redis.zscore(keyspace.model_workers(MODEL), desk.workers(MODEL)[0])
    until(lambda: desk.redis.zscore(keyspace.model_workers(MODEL), desk.workers(MODEL)[0]) > beat, "a beat")


def test_a_model_that_cannot_be_loaded_is_registered_as_failed(
    desk: Desk, start: Start, tmp_path: Path
) -> None:
    process = start("broken", tmp_path)
    assert process.process.wait(timeout=60) == 1
    found = desk.deployment("broken")
    assert found["state"] == "failed"
    assert found["error"] == f"{tmp_path} holds no config.json, so it is not a transformers model"
    assert process.output().splitlines()[-1] == f"Error: {found['error']}"
    assert "Traceback" not in process.output()
    assert desk.workers("broken") == []


def refused(*arguments: str, **env: str) -> str:
    """What `pellucid worker` says as it refuses to start: one line, but for the usage above it."""
    command = [sys.executable, "-m", "pellucid", "worker", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_a_missing_variable_is_said_in_one_line(desk: Desk) -> None:
    line = "Error: PELLUCID_REDIS_URL is not set; `pellucid up` sets it, a worker on its own needs it"
    assert refused("tiny=/nowhere") == line
    assert refused("tiny") == "Error: 'tiny' is not NAME=SOURCE, e.g. smollm2=/models/smollm2"
    with pytest.raises(InputError, match=r"^PELLUCID_STORE_URL is not set"):
        Settings.from_env({"PELLUCID_REDIS_URL": desk.redis_url})


def test_a_redis_or_store_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"^Redis does not answer .*; is it running"):
        Settings(f"unix://{tmp_path}/none.sock", tmp_path.as_uri()).connect()
    with pytest.raises(InputError, match=r"^PELLUCID_REDIS_URL cannot be used: "):
        Settings("http://localhost", tmp_path.as_uri()).connect()
    (tmp_path / "file").write_text("")
    for url in (f"{tmp_path.as_uri()}/file", "nonsense://x"):
        with pytest.raises(InputError, match=r"^PELLUCID_STORE_URL cannot be used: "):
            Store(url)


# --- stopping ----------------------------------------------------------------------------------------------


def test_a_worker_that_stops_gives_its_jobs_back_and_one_that_dies_loses_none(
    desk: Desk, start: Start, tiny_folders: dict[str, Path]
) -> None:
    name, folder = "brief", tiny_folders["llama"]
    first = start(name, folder)
    ready(desk, first, name)
    ahead = run_slow(desk, first, model=name)
    jobs = [desk.submit(saving(model=name), IDS) for _ in range(3)]
    until(lambda: all(desk.state(job) is JobState.RUNNING for job in jobs), "the jobs to be taken in")
    cancelled = jobs.pop()

    assert first.stop(signal.SIGTERM) == 0
    assert "Traceback" not in first.output()
    assert desk.deployment(name)["state"] == "stopped"
    assert desk.workers(name) == []
    for job in (ahead, *jobs):
        assert desk.states(job) == ["running", "queued"]
        assert desk.lease(job) is None
    waiting = desk.redis.zrange(keyspace.model_waiting(name), 0, -1)
    assert set(waiting) == {ahead, *jobs, cancelled}
    for job in (ahead, cancelled):
        desk.cancel(job)

    second = start(name, folder)
    ready(desk, second, name)
    for job in jobs:
        assert desk.ended(job) is JobState.COMPLETED
        assert desk.states(job) == ["running", "queued", "running", "completed"]
        assert desk.field(job, "attempt") == "2"
    assert (desk.state(ahead), desk.state(cancelled)) == (JobState.CANCELLED, JobState.CANCELLED)

    # Killed, it says nothing: the record stays as it was until the lease runs out.
    job = run_slow(desk, second, passes=30, model=name)
    assert second.stop(signal.SIGKILL) == -signal.SIGKILL
    assert desk.state(job) is JobState.RUNNING
    third = start(name, folder)
    ready(desk, third, name)
    desk.send(job)
    until(lambda: f"job {job} is not to be had" in third.output(), "the message that comes too early")
    assert desk.field(job, "attempt") == "1"
    desk.expire(job)
    desk.send(job)
    assert desk.ended(job) is JobState.COMPLETED
    assert desk.states(job) == ["running", "running", "completed"]
    assert desk.field(job, "result")["key"] == keyspace.result(job, 2)
    third.stop(signal.SIGKILL)


# --- Redis -------------------------------------------------------------------------------------------------


def test_a_redis_that_comes_back_empty_is_told_everything_again(
    start: Start, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="pellucid-") as folder:
        with running_redis(folder) as url:
            desk = Desk(url, tmp_path.as_uri())
            process = start(MODEL, tiny_folders["llama"], desk)
            ready(desk, process)
            before = desk.deployment(MODEL)
            run_slow(desk, process)
            desk.close()
        with running_redis(folder) as url:
            desk = Desk(url, tmp_path.as_uri())
            until(lambda: desk.deployment(MODEL), "the worker to publish")
            assert desk.deployment(MODEL) == before
            assert MODEL in desk.redis.smembers(keyspace.MODELS)
            assert len(desk.workers(MODEL)) == 1
            # The job that ran has no record any more, so it ends, and new ones run.
            job = desk.submit(saving(), IDS)
            assert desk.ended(job) is JobState.COMPLETED
            assert process.stop() == 0
            desk.close()

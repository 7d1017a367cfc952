"""Jobs followed by hand, against a real gateway, Redis and worker; the reference is plain hooks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pellucid
from pellucid import LanguageModel
from pellucid_shared.errors import (
    ConnectionFailedError,
    ExecutionError,
    InputError,
    JobCancelledError,
    JobNotFoundError,
    JobTimeout,
    PellucidError,
    ValueNotReadyError,
)
from references import capture
from service import free_port, running_service

pytestmark = pytest.mark.xdist_group("service-jobs")

IDS = [[5, 9, 31, 7]]


@pytest.fixture(scope="module")
def url(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"followed": tiny_folders["llama"]}, tmp_path_factory.mktemp("jobs")) as found:
        yield found


@pytest.fixture
def model(url: str) -> Any:
    return LanguageModel("followed", remote=url)


@pytest.fixture(scope="module")
def layer(tiny_models: Any) -> torch.Tensor:
    """What hooks see of layer 0's output."""
    return capture(tiny_models["llama"], torch.tensor(IDS), "model.layers.0")


@contextlib.contextmanager
def held(url: str) -> Iterator[Callable[[], None]]:
    """The worker stands still, so that jobs stay in the queue; yields what lets it go on."""
    (worker,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if {"worker", "pellucid"} <= set(process.cmdline()) and "followed=" in " ".join(process.cmdline())
    )
    worker.suspend()
    try:
        yield worker.resume
    finally:
        worker.resume()


def not_blocking(model: Any) -> tuple[pellucid.Job, Any]:
    with model.trace(IDS, blocking=False) as tracer:
        h = model.model.layers[0].output.save("h")
    return tracer.job, h


# --- waiting -----------------------------------------------------------------------------------------------


def test_the_result_fills_the_saved_names_and_is_a_mapping_by_name(model: Any, layer: torch.Tensor) -> None:
    buffer = torch.zeros(4)
    with model.trace(IDS, blocking=False) as tracer:
        h = model.model.layers[0].output
        twice = (h * 2).save("twice")
        pair = pellucid.save([h, {"n": 3}])
        buffer[0] = h[0, 0, 0]
        unsaved = h + 1
    results = tracer.job.result()
    assert set(results) == {"twice", "saved_1", "saved_2"}
    torch.testing.assert_close(results["twice"], layer * 2)
    assert type(twice) is torch.Tensor
    assert twice.data_ptr() == results["twice"].data_ptr()
    assert torch.equal(pair.value[0], results["saved_1"][0])
    assert results["saved_1"][1] == {"n": 3}
    assert buffer.tolist() == [float(layer[0, 0, 0]), 0, 0, 0]
    assert all(tracer.job.result()[name] is value for name, value in results.items())
    with pytest.raises(ValueNotReadyError, match="was not saved, so it is gone"):
        _ = unsaved.value


def test_the_block_ends_before_the_job_and_values_say_that_it_was_not_waited_for(
    model: Any, url: str, layer: torch.Tensor
) -> None:
    with held(url) as go_on:
        job, h = not_blocking(model)
        assert job.status == "queued"
        with pytest.raises(ValueNotReadyError, match=rf"job {job.id} was not waited for; call .*job\.result"):
            _ = h.value
        with pytest.raises(ValueNotReadyError, match="was not waited for"):
            _ = h + 1
        for ask in (job.wait, job.result):
            with pytest.raises(JobTimeout, match=rf"{job.id} is queued, number 1 in the queue, after 0\.3 s"):
                ask(timeout=0.3)
        with pytest.raises(TimeoutError):
            job.wait(timeout=0)
        go_on()
        assert job.wait() == "completed"
    with pytest.raises(ValueNotReadyError, match="was not waited for"):
        _ = h.value
    torch.testing.assert_close(job.result(timeout=0)["h"], layer)
    torch.testing.assert_close(h, layer)
    assert job.status == "completed"


def test_an_interrupted_wait_leaves_the_job_running(
    model: Any, url: str, layer: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with held(url) as go_on:
            job, h = not_blocking(model)
            with pytest.raises(KeyboardInterrupt), interrupted_while_it_follows(monkeypatch):
                job.result()
            assert job.status == "queued"
            go_on()
            job.result()
    finally:
        signal.signal(signal.SIGINT, before)
    torch.testing.assert_close(h, layer)


def test_an_interrupted_block_that_waits_cancels_its_job(
    model: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            held(url),
            pytest.raises(KeyboardInterrupt),
            interrupted_while_it_follows(monkeypatch),
            model.trace(IDS) as tracer,
        ):
            h = model.lm_head.output.save()
    finally:
        signal.signal(signal.SIGINT, before)
    assert tracer.job.status == "cancelled"
    with pytest.raises(ValueNotReadyError, match="ended by KeyboardInterrupt"):
        _ = h.value


@contextlib.contextmanager
def interrupted_while_it_follows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C in the main thread, once it has seen that the job is queued."""
    main = threading.main_thread().ident
    assert main is not None
    from pellucid._progress import StatusLine

    def event(self: StatusLine, event: Any) -> None:
        if event.data["state"] == "queued":
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()

    with monkeypatch.context() as patch:
        patch.setattr(StatusLine, "event", event)
        yield


def test_a_server_that_pings_does_not_lengthen_a_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n%s\r\n"
        record = b'{"id":"j","model":"m","state":"running"}'

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                if b"/events" not in connection.recv(4096).split(b"\r\n")[0]:
                    length = b"Content-Length: %d\r\n" % len(record)
                    connection.sendall(head % (b"application/json", length) + record)
                    return
                connection.sendall(head % (b"text/event-stream", b""))
                while not stop.wait(0.05):
                    connection.sendall(b": ping\r\n\r\n")

        def accept() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

        server.settimeout(0.1)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            job = pellucid.Job("j", f"http://127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(JobTimeout, match=r"job j is running after 0\.6 s"):
                job.wait(0.6)
        finally:
            stop.set()
            thread.join()


# --- how a job ends ----------------------------------------------------------------------------------------


def test_a_failed_job_raises_at_the_users_line_each_time(model: Any) -> None:
    with model.trace(IDS, blocking=False) as tracer:
        h = model.model.layers[0].output
        index = (h[0, 0, :1] * 0 + 1000).long()
        line = sys._getframe().f_lineno + 1
        picked = h[0, index].save()
    assert tracer.job.wait() == "failed"
    for _ in range(2):
        with pytest.raises(ExecutionError) as caught:
            tracer.job.result()
        assert str(caught.value).startswith(f"{__file__}:{line}: ")
    with pytest.raises(ValueNotReadyError, match=r"its job failed \(.*1000"):
        _ = picked.value
    assert pellucid.Job(tracer.job.id, tracer.job._connection.url).wait() == "failed"


def test_a_queued_job_is_cancelled_at_once_and_its_values_say_so(model: Any, url: str) -> None:
    with held(url):
        job, h = not_blocking(model)
        job.cancel()
        assert job.status == "cancelled"
        with pytest.raises(JobCancelledError, match="cancelled before it ran"):
            job.result()
        with pytest.raises(JobCancelledError):
            asyncio.run(awaited(job))
    assert job.wait() == "cancelled"
    with pytest.raises(ValueNotReadyError, match="was cancelled"):
        _ = h.value


def test_a_running_job_is_cancelled_at_the_next_module_it_touches(model: Any) -> None:
    with model.trace(IDS, blocking=False) as tracer:
        for name in ("self_attn", "mlp"):
            output = getattr(model.model.layers[0], name).output
            h = output[0] if name == "self_attn" else output
            x = torch.randn(1200, 1200) * 0.01 + h.mean()
            for _ in range(40):
                x = x @ x
            x.sum().save()
    job = tracer.job
    for event in job.events():
        if event.data.get("state") == "running":
            job.cancel()
    assert event.data["state"] == "cancelled"
    with pytest.raises(JobCancelledError):
        job.result()


def test_a_job_that_is_over_stays_as_it_is_when_it_is_cancelled(model: Any) -> None:
    job, _ = not_blocking(model)
    job.result()
    job.cancel()
    assert job.status == "completed"


def test_a_trace_that_saves_nothing_is_a_job_without_results(model: Any) -> None:
    with model.trace(IDS, blocking=False) as tracer:
        model.model.layers[0].output[:] = 0
    assert tracer.job.result() == {}


def test_a_graph_the_server_refuses_is_an_error_of_the_block(model: Any, url: str) -> None:
    with held(url), pytest.raises(PellucidError, match="at most"), model.trace([[1] * 129], blocking=False):
        model.lm_head.output.save()


# --- from elsewhere ----------------------------------------------------------------------------------------


def test_a_job_is_taken_up_in_another_process(model: Any, url: str, layer: torch.Tensor) -> None:
    job, _ = not_blocking(model)
    code = (
        f"import pellucid; job = pellucid.Job({job.id!r}); h = job.result()['h']; "
        "print(type(h).__name__, job.status, h.flatten().tolist())"
    )
    environment = {**os.environ, "PELLUCID_HOST": url}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    kind, status, values = done.stdout.split(" ", 2)
    assert (kind, status) == ("Tensor", "completed")
    torch.testing.assert_close(torch.tensor(floats(values)), layer.flatten())


def test_where_torch_is_absent_results_are_arrays_that_can_be_written(url: str, layer: torch.Tensor) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import client_bodies; client_bodies.hide_torch()
import asyncio, numpy, pellucid
model = pellucid.LanguageModel("followed", remote={url!r})
with model.trace({IDS}, blocking=False) as tracer:
    h = model.model.layers[0].output.save("h")
async def main():
    return await tracer.job
result = asyncio.run(main())["h"]
assert type(result) is numpy.ndarray and result is h.value
values = result.flatten().tolist()
h[0, 0] = 7
assert result[0, 0, 5] == 7
print(values)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(floats(done.stdout)), layer.flatten())


def floats(text: str) -> list[float]:
    return [float(word) for word in text.strip().strip("[]").split(",")]


def test_a_job_shows_its_id_and_host_and_asks_nothing() -> None:
    job = pellucid.Job("abc", "http://127.0.0.1:9/")
    assert repr(job) == "Job('abc', host='http://127.0.0.1:9')"
    assert job.id == "abc"


def test_an_unknown_job_is_not_found_whatever_is_asked(url: str) -> None:
    job = pellucid.Job("0" * 32, url)
    asks: list[Callable[[], Any]] = [
        lambda: job.status,
        job.wait,
        lambda: job.wait(timeout=5),
        job.result,
        job.cancel,
        lambda: list(job.events()),
        lambda: asyncio.run(awaited(job)),
    ]
    for ask in asks:
        with pytest.raises(JobNotFoundError, match="there is no job 0000"):
            ask()


def test_a_job_needs_an_id_and_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PELLUCID_HOST", raising=False)
    with pytest.raises(ConnectionFailedError, match="set PELLUCID_HOST to its URL, or give host="):
        pellucid.Job("abc")
    for id in ("", "../models", None):
        with pytest.raises(InputError, match="is not the id of a job"):
            pellucid.Job(id, "http://127.0.0.1:9")  # type: ignore[arg-type]


def test_a_run_in_this_process_has_no_job_to_leave_it_to(tiny_models: Any) -> None:
    model = LanguageModel("tiny", model=tiny_models["llama"])
    with pytest.raises(InputError, match="blocking=False leaves a run to a server's job"):
        model.trace(IDS, blocking=False)


# --- events ------------------------------------------------------------------------------------------------


def test_events_come_live_to_the_end_and_survive_a_line_that_drops(url: str) -> None:
    with dropping(url) as (through, drop), held(url) as go_on:
        job, _ = not_blocking(LanguageModel("followed", remote=through))
        events = job.events()
        seen = [next(events), next(events)]
        assert [event.data["state"] for event in seen] == ["received", "queued"]
        drop()
        go_on()
        seen += events
    assert [event.data["state"] for event in seen] == ["received", "queued", "running", "completed"]
    assert len({event.id for event in seen}) == 4
    assert list(pellucid.Job(job.id, url).events()) == seen, "and the same again, afterwards"


@contextlib.contextmanager
def dropping(url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A line to the gateway, and what cuts every connection over it."""
    port, target = free_port(), int(url.rpartition(":")[2])
    ends: list[socket.socket] = []
    over = threading.Event()

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def drop() -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(server: socket.socket) -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                near = server.accept()[0]
                far = socket.create_connection(("127.0.0.1", target))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=pass_on, args=pair))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.05)
        threads = [threading.Thread(target=accept, args=(server,))]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{port}", drop
        finally:
            over.set()
            threads[0].join()
            drop()
            for thread in threads[1:]:
                thread.join()
            for end in ends:
                end.close()


# --- asyncio -----------------------------------------------------------------------------------------------


async def awaited(job: pellucid.Job) -> dict[str, Any]:
    return await job


def test_awaiting_jobs_leaves_the_loop_free(model: Any, url: str, layer: torch.Tensor) -> None:
    rescued = threading.Event()

    async def main(jobs: list[pellucid.Job], go_on: Callable[[], None]) -> list[dict[str, Any]]:
        async def later() -> None:
            await asyncio.sleep(0.3)
            assert not rescued.is_set(), "the loop stood still"
            go_on()

        *results, _ = await asyncio.gather(*jobs, later())
        return results

    with held(url) as go_on:
        sent = [not_blocking(model) for _ in range(5)]
        rescue = threading.Timer(20, lambda: (rescued.set(), go_on()))
        rescue.start()
        results = asyncio.run(main([job for job, _ in sent], go_on))
        rescue.cancel()
        rescue.join()
    for (_, h), result in zip(sent, results, strict=True):
        torch.testing.assert_close(h, layer)
        assert h.data_ptr() == result["h"].data_ptr()


def test_a_cancelled_await_leaves_the_job_running(model: Any, url: str, layer: torch.Tensor) -> None:
    async def main(job: pellucid.Job, go_on: Callable[[], None]) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(awaited(job), 0.3)
        assert job.status == "queued"
        go_on()
        await job

    with held(url) as go_on:
        job, h = not_blocking(model)
        asyncio.run(main(job, go_on))
    torch.testing.assert_close(h, layer)


def test_threads_that_ask_at_once_get_the_same_tensors(model: Any, url: str, layer: torch.Tensor) -> None:
    results: list[dict[str, Any]] = []
    with held(url) as go_on:
        job, h = not_blocking(model)
        threads = [threading.Thread(target=lambda: results.append(job.result())) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        go_on()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(h, layer)
    assert {id(result["h"]) for result in results} == {id(results[0]["h"])}
    assert len(results) == 4

"""`pellucid up`: it serves, restarts what dies, stops everything, and says in one line what is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pellucid_server.processes import identity
from pellucid_server.supervisor import end_leftovers
from service import free_port

START_SECONDS, STOP_SECONDS = 120, 10
GRAPH = {
    "model": "tiny",
    "nodes": [
        {"op": "site.get", "args": [{"site": {"module": "lm_head"}}]},
        {"op": "save", "args": [{"ref": 0}]},
    ],
    "regions": [{"kind": "trace", "invokes": [{"input": [5, 9, 31]}]}],
    "version": 1,
}


class Up:
    """One `pellucid up` of a tiny model."""

    def __init__(self, model: Path, data: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = data.with_suffix(f".{time.monotonic_ns()}.log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*PELLUCID, "up", f"tiny={model}", "--port", str(port), "--data", str(data)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait_until_ready(self) -> None:
        self.wait_until(lambda: self.get("/ready") == 200, "ready")

    def get(self, path: str) -> int:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + path, trust_env=False).status_code
        return 0

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        until(lambda: true() or self.process.poll() is not None, START_SECONDS, what)
        assert self.process.poll() is None, self.log.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        """The child whose command line has this word."""
        return next(p for p in self.descendants() if word in p.cmdline())

    def runs_a_job(self) -> None:
        """A job posted over plain HTTP completes, and its result is there."""
        made = httpx.post(f"{self.url}/v1/jobs", json={"graph": GRAPH}, trust_env=False)
        assert made.status_code == 202, made.text
        job = f"{self.url}/v1/jobs/{made.json()['id']}"
        final = ("completed", "failed", "cancelled")
        until(lambda: httpx.get(job, trust_env=False).json()["state"] in final, 60, "the job's end")
        assert httpx.get(job, trust_env=False).json()["state"] == "completed"
        assert httpx.get(f"{job}/result", trust_env=False).content

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = self.descendants()
            self.process.terminate()
            code = self.process.wait(STOP_SECONDS)
            gone(everyone)
            assert code == 0, self.log.read_text()


PELLUCID = [sys.executable, "-m", "pellucid"]


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


@pytest.fixture
def model(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["llama"]


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], Up]]:
    """Starts an `up`, each time on the same data folder and port; ends what a failed test left."""
    port, started = free_port(), []

    def make() -> Up:
        started.append(Up(model, tmp_path / "data", port))
        started[-1].wait_until_ready()
        return started[-1]

    yield make
    for up in started:
        up.process.kill()
        up.process.wait()


def test_it_serves_restarts_what_dies_and_stops_everything(start: Callable[[], Up]) -> None:
    up = start()
    up.runs_a_job()
    assert len(up.descendants()) == 3

    for word, name in (("worker", "tiny"), ("serve", "gateway")):
        child = up.child(word)
        child.kill()
        gone([child])
        up.wait_until(lambda n=name: f"{n} was killed by SIGKILL" in up.log.read_text(), "its word")
        up.wait_until_ready()
        up.runs_a_job()

    everyone = up.descendants()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(STOP_SECONDS) == 0
    gone(everyone)
    assert up.get("/health") == 0


def test_killed_with_9_it_leaves_nothing_a_new_one_cannot_clean(
    start: Callable[[], Up], tmp_path: Path
) -> None:
    up = start()
    everyone = up.descendants()
    up.process.kill()
    up.process.wait()
    if sys.platform == "linux":
        gone(everyone)
    up = start()
    up.runs_a_job()
    up.stop()
    assert not (tmp_path / "data" / "pids.json").exists()


def test_leftovers_are_ended_and_strangers_with_their_pids_are_not(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    orphan, stranger = (
        subprocess.Popen(sleeper, stdout=subprocess.PIPE, start_new_session=True) for _ in range(2)
    )
    try:
        for process in (orphan, stranger):
            assert process.stdout is not None
            process.stdout.readline()
        record = [
            {"name": "a", "pid": orphan.pid, "identity": identity(orphan.pid)},
            {"name": "b", "pid": stranger.pid, "identity": "started some other time"},
        ]
        pids = tmp_path / "pids.json"
        pids.write_text(json.dumps(record))
        assert end_leftovers(pids) == ["a"]
        assert orphan.wait(10) == -signal.SIGKILL
        assert stranger.poll() is None
        assert end_leftovers(pids) == []
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.communicate()


SUPERVISED = """
import sys
from pathlib import Path
from pellucid_server.supervisor import Service, Supervisor

sh, pids = sys.argv[1], Path(sys.argv[2])
services = [Service("one", ["sh", "-c", "echo I am one; exec sleep 600"], lambda: True),
            Service("two", ["sh", "-c", sh], pids.with_name("healthy").exists)]
supervisor = Supervisor(services, env={"PATH": "/usr/bin:/bin"}, pids=pids, ready=lambda: True,
                        announce=lambda: supervisor.say("all is well"))
print("ended:", supervisor.run())
"""


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Runs a supervisor of a steady child and of a shell script; it is healthy if the script says so."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SUPERVISED, script, str(tmp_path / "pids.json")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_service_that_cannot_start_ends_it_with_the_reason(
    supervised: Callable[[str], subprocess.Popen[str]],
) -> None:
    out, _ = supervised("echo Error: no such weights; exit 3").communicate(timeout=30)
    assert out.count("two | Error: no such weights") == 3
    assert "up  | two died with exit code 3; starting it again in 0.5 s" in out
    assert out.endswith("ended: two failed to start 3 times: no such weights\n")


def test_a_service_that_will_not_stop_is_killed_with_all_it_started(
    supervised: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = supervised(
        "trap 'echo no' TERM; touch healthy; sleep 601 & echo $! >child; while :; do sleep 1; done"
    )
    lines = process.stdout
    assert lines is not None
    assert any("all is well" in line for line in lines)
    grandchild = psutil.Process(int((tmp_path / "child").read_text()))
    process.send_signal(signal.SIGINT)
    assert any("two | no" in line for line in lines)
    process.send_signal(signal.SIGINT)  # a second one skips the waiting
    assert lines.read().endswith("ended: None\n")
    gone([grandchild])


def failure(*arguments: str) -> str:
    """What `pellucid up` prints when it refuses; one line."""
    done = subprocess.run([*PELLUCID, "up", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(model: Path, tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    good = f"tiny={model}"
    assert "'tiny' is not NAME=PATH_OR_HUB_ID" in failure("tiny", *data)
    assert "there is no folder /no/such (for tiny)" in failure("tiny=/no/such", *data)
    assert "it has no config.json" in failure(f"tiny={tmp_path}", *data)
    assert "two models have the same name" in failure(good, good, *data)
    assert not (tmp_path / "data").exists()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in failure(good, "--port", str(port), *data)

    port = free_port()
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("")
    unwritable = tmp_path / "file" / "data"
    assert f"cannot write to the data folder {unwritable}" in failure(
        good, "--port", str(port), "--data", str(unwritable)
    )
    assert "no.such.host is not an address" in failure(good, "--host", "no.such.host", *data)

    with (tmp_path / "data" / "lock").open("w") as lock:  # as a running `pellucid up` holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = failure(good, "--port", str(port), *data)
    assert f"another `pellucid up` uses the data folder {tmp_path / 'data'}" in said


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    command = [
        *PELLUCID,
        "up",
        f"tiny={broken}",
        "--port",
        str(free_port()),
        "--data",
        str(tmp_path / "data"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)
    assert done.returncode == 1
    assert "Error: tiny failed to start 3 times: " in done.stderr
    assert str(broken) in done.stderr


def test_a_long_data_folder_still_gets_a_socket(model: Path, tmp_path: Path) -> None:
    from pellucid_server.redis_process import PrivateRedis

    for folder in (tmp_path / ("long" * 30), tmp_path / "a space"):
        folder.mkdir()
        private = PrivateRedis(folder)
        path = Path(private.url.removeprefix("unix://"))
        assert len(str(path)) < 100
        assert path.parent.stat().st_mode & 0o077 == 0
        assert PrivateRedis(folder).url == private.url
        path.parent.rmdir()

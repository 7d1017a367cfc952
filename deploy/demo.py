"""`make demo`: gets SmolLM2, serves it on a free port, runs examples/demo.py against it, and stops it."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

import httpx
from smollm2 import CannotGetModelError, folder

from pellucid_server.processes import dying_with_parent

ROOT = Path(__file__).parent.parent
NAME = "smollm2"
START_SECONDS, STOP_SECONDS = 180, 12


class ServiceError(Exception):
    """The service did not start; the message ends with its last lines."""


@contextlib.contextmanager
def service(model: Path) -> Iterator[str]:
    """`pellucid up` with one model on a free port; its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="pellucid-demo-") as data:
        log = Path(data) / "up.log"
        up = [sys.executable, "-m", "pellucid", "up", f"{NAME}={model}", "--port", str(port), "--data", data]
        with log.open("wb") as out:
            process = subprocess.Popen(
                up,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process; it stops the service itself
                preexec_fn=dying_with_parent(signal.SIGTERM),
            )
        try:
            wait_until_ready(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until /ready answers 200, showing how far loading is."""
    deadline = time.monotonic() + START_SECONDS
    shown = ""
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceError("the service did not start:\n" + "\n".join(log.read_text().splitlines()[-12:]))
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
            for model in httpx.get(f"{url}/v1/models", trust_env=False).json():
                stage = f"loading {model['id']}: {model['progress']:.0%}"
                if stage != shown:
                    shown = stage
                    print(f"  {stage}", flush=True)
        time.sleep(0.1)


def experiment() -> ModuleType:
    """examples/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("demo_experiment", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        start = time.monotonic()
        model = folder()
        print("starting the service ...", flush=True)
        with service(model) as url:
            print(f"ready at {url} after {time.monotonic() - start:.1f} s\n", flush=True)
            experiment().run(url, NAME, model / "tokenizer.json")
        print("the service is stopped")
    except (CannotGetModelError, ServiceError) as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", file=sys.stderr)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

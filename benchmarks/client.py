"""The client: what importing it takes, what it weighs, what it sends, and what recording costs."""

from __future__ import annotations

import http.server
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from measure import OWN, Figure, seconds
from subject import PROMPT, ROOT, Measure, Subject, graph_of

if TYPE_CHECKING:
    from pellucid import Graph, LanguageModel

_IMPORTS, _TRACES, _ROUNDS = 12, 16, 100


def _importing(line: str) -> Measure:
    """Seconds of a line in a fresh interpreter, without those of starting it."""
    code = f"from time import perf_counter as now\nstart = now()\n{line}\nprint(now() - start)"

    def measure(subject: Subject) -> Figure:
        taken = []
        for _ in range(subject.repeats(_IMPORTS)):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            taken.append(float(done.stdout))
        return Figure.median(taken, f"least {min(taken):.3f} s")

    return measure


def install(_: Subject) -> Figure:
    """MB that `pip install .` adds to a fresh virtual environment."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "venv", name], check=True)
        python, before = Path(name) / "bin" / "python", _bytes(Path(name))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(ROOT)], check=True)
        return Figure((_bytes(Path(name)) - before) / 1e6, beside="bytecode included; pip itself left out")


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def body(subject: Subject) -> Figure:
    """Bytes of the body of POST /v1/jobs, as a server gets them."""
    from pellucid._http import Connection

    def save_a_layer(model: LanguageModel) -> None:
        model.model.layers[10].output.save()

    graph = graph_of(subject.smollm2.model, PROMPT, save_a_layer)
    with _Counter() as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        Connection(f"http://127.0.0.1:{server.server_port}").submit(graph, {})
        thread.join()
    return Figure(server.counted, beside=f"{len(graph.nodes)} nodes, the prompt as text")


class _Counter(http.server.HTTPServer):
    """A server that counts the bytes of one job's body."""

    counted = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Counting)


class _Counting(http.server.BaseHTTPRequestHandler):
    server: _Counter

    def do_POST(self) -> None:
        self.server.counted = len(self.rfile.read(int(self.headers["Content-Length"])))
        answer = b'{"id": "0"}'
        self.send_response(202)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def record(subject: Subject) -> Figure:
    """Microseconds an operation, from the block's first line to the checked graph. Nothing is saved, so
    nothing is run."""
    count = len(_trace(subject).nodes)
    taken = [1e6 * seconds(lambda: _trace(subject), OWN) / count for _ in range(subject.repeats(_TRACES))]
    return Figure.median(taken, f"{count} operations; least {min(taken):.0f} us")


def _trace(subject: Subject) -> Graph:
    model = subject.smollm2.model
    with model.trace(subject.smollm2.ids) as tracer:
        hidden = model.model.layers[10].output
        for _ in range(_ROUNDS):
            hidden = (hidden * 0.5 + 1).softmax(dim=-1)
            hidden[:, -1] = 0
    return tracer.graph


MEASURES: dict[str, Measure] = {
    "import": _importing("import pellucid"),
    "import-model": _importing("from pellucid import LanguageModel"),
    "install": install,
    "body": body,
    "record": record,
}

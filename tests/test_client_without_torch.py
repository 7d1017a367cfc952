"""Where torch is not installed: the same graphs byte for byte, and saved values that behave as arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from client_bodies import BODIES, graphs

HERE = Path(__file__).parent


def without_torch(code: str) -> str:
    """What a process without torch prints."""
    start = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import client_bodies; client_bodies.hide_torch()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def theirs() -> dict[str, str]:
    script = HERE / "client_bodies.py"
    done = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, str]:
    return graphs(torch)


@pytest.mark.parametrize("name", sorted(BODIES))
def test_graphs_are_the_same_bytes_with_and_without_torch(
    name: str, ours: dict[str, str], theirs: dict[str, str]
) -> None:
    assert theirs[name] == ours[name]


def test_a_saved_value_behaves_as_its_array() -> None:
    without_torch("""
import numpy as np
from client_fixtures import CardModel
from pellucid import save
from pellucid_shared.packing import WireTensor

array = np.arange(6, dtype=np.float32).reshape(2, 3)
half = WireTensor("bfloat16", (2,), np.array([0x3F80, 0xC000], dtype=np.uint16).tobytes())
answers = {"x": WireTensor.from_numpy(array), "half": half, "pair": [WireTensor.from_numpy(array), 3]}
model = CardModel(answer=lambda graph: answers)
with model.trace("hello"):
    x = model.h[0].output.save("x")
    half = (x * 2).save("half")
    y = x + 1
    pair = save([y, 3], "pair")

assert type(x.value) is np.ndarray and np.array_equal(x, array)
assert x.shape == (2, 3) and x.dtype == np.float32 and len(x) == 2
assert np.array_equal(x + 1, array + 1) and np.array_equal(2 - x, 2 - array)
assert np.array_equal(x @ x.T, array @ array.T) and np.array_equal(x[:, 1], array[:, 1])
assert [row.sum() for row in x] == [3, 12] and x.sum() == 15 and float(x[0, 1]) == 1
assert (x > 2).sum() == 3 and np.exp(x).shape == (2, 3) and np.stack([x, x]).shape == (2, 2, 3)
assert repr(x) == repr(array) and f"{x.mean():.1f}" == "2.5"
assert half.value.dtype == np.float32 and half.value.tolist() == [1.0, -2.0]
assert type(pair.value) is list and np.array_equal(pair.value[0], array) and pair[1] == 3
assert np.array_equal(y, array)
import sys
assert "torch" not in sys.modules
""")


def test_caches_and_the_founding_spelling_work_without_torch() -> None:
    without_torch("""
import numpy as np
from client_fixtures import CardModel
from pellucid_shared.packing import WireTensor

def answer(graph):
    def made(part, node):
        if isinstance(part, dict):
            return {k: made(v, node) for k, v in part.items()}
        if isinstance(part, tuple):
            return tuple(made(v, node) for v in part)
        tokens = 2 + 2 * graph.nodes[node].site.invoke
        return None if part is None else WireTensor.from_numpy(np.ones((1, tokens, 3), dtype=np.float32))
    names = graph.save_names()
    site = {n: next(graph.nodes[n].refs()) for n in names}
    return {name: made(graph.nodes[n].args[0], site[n]) for n, name in names.items()}

model = CardModel(answer=answer)
with model.trace([1, 2]) as tracer:
    cache = tracer.cache()
    everything = tracer.save_all()
assert cache.h[0].output.shape == (1, 2, 3) and type(cache["h.0"].output.value) is np.ndarray
assert everything["h.1"][0].sum() == 6 and everything["h.1"][1] is None

with model.forward() as runner:
    with runner.invoke([1, 2]):
        h = model.h[0].output[0].save()
    with runner.invoke([1, 2, 3, 4]):
        pass
assert h.value.shape == (1, 2, 3)
logits = runner.output.logits
assert logits.shape == (2, 4, 3) and logits[0].sum() == 6 and logits[0, :2].sum() == 0
assert model.trace([1, 2], trace=False)["logits"].shape == (1, 2, 3)
import sys
assert "torch" not in sys.modules
""")


def test_errors_are_the_same_without_torch() -> None:
    out = without_torch("""
from client_fixtures import CardModel
from pellucid import torch
from pellucid_shared.errors import PellucidError

def run(body):
    model = CardModel()
    try:
        with model.trace([1, 2, 3]):
            body(model.h[0].output)
    except PellucidError as error:
        print(type(error).__name__, error.message)

run(lambda h: h.softmacks(-1))
run(lambda h: torch.softmacks(h))
run(lambda h: bool(h))
run(lambda h: h + torch.cat([h, h], dim=-1))
run(lambda h: torch.exp(h, dimm=1))
try:
    torch.exp(3)
except PellucidError as error:
    print(type(error).__name__, error.message)
""")
    lines = out.splitlines()
    assert lines[0].startswith("UnknownOpError a value has no 'softmacks'. Nearest: torch.Tensor.")
    assert lines[1].startswith("UnknownOpError torch.softmacks is not an operation a graph may hold. Near")
    assert lines[2].startswith("RecordingError <h.0.output [1, 3, 8] float32, ")
    assert lines[3] == "ShapeError torch.add: shapes [1, 3, 8] and [1, 3, 16] do not broadcast"
    assert lines[4].startswith("OpArgumentError torch.exp has no argument 'dimm'")
    assert lines[5].startswith("RecordingError this is recorded inside a trace")


def test_running_here_without_torch_names_the_extra() -> None:
    out = without_torch("""
from pellucid import LanguageModel
from pellucid_shared.errors import MissingExtraError
try:
    LanguageModel("gpt2", remote=False, dispatch=True)
except MissingExtraError as error:
    print(error)
""")
    assert "pip install 'pellucid[local]'" in out
    assert "needs torch" in out

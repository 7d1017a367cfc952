"""The gallery: every example runs on SmolLM2, and finds what it says it finds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pellucid

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Not of the gallery: what it shares, and the demo, which tests of its own run.
OTHERS = ("gallery", "demo")

pytestmark = pytest.mark.xdist_group("examples")


CHECKS: dict[str, Any] = {
    "logit_lens": lambda said: said[-1] == " Paris" and said[0] != " Paris",
    "activation_patching": lambda restored: (
        max(map(max, restored)) > 0.9 and max(r[0] for r in restored) < 0.1
    ),
    "cross_prompt_patching": lambda said: said[max(said)] == " Paris" and said[0] != " Paris",
    "causal_tracing": lambda table: max(map(max, table)) > 0.3,
    "steering": lambda texts: len(set(texts.values())) == 3,
    "ablating_heads": lambda changes: max(abs(c) for row in changes.values() for c in row) > 0.5,
    "editing_generation": lambda texts: " green" in texts["forced"] and " green" not in texts["plain"],
    "token_indexing": lambda similarity: similarity.shape == (3, 3),
    "probing": lambda accuracy: max(accuracy.values()) >= 0.9,
    "attribution_patching": lambda table: max(map(max, table)) > 1,
    "attention_patterns": lambda first: len(first) == 9 and all(0 <= p <= 1 for p in first),
    "a_session": lambda said: said[0] != said[1],
}


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return pellucid.LanguageModel(smollm2)


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shared = importlib.import_module("gallery")
    monkeypatch.setattr(shared, "OUT", tmp_path)
    yield shared
    for name in (*CHECKS, "gallery"):
        sys.modules.pop(name, None)


def test_every_example_is_run() -> None:
    assert sorted(CHECKS) == sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem not in OTHERS)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_an_example_finds_what_it_says(
    name: str, model: Any, gallery: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = getattr(importlib.import_module(name), name)(model)
    assert CHECKS[name](found)
    assert capsys.readouterr().out

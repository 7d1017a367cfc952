"""Random programs mean the same to the engine, packed and with invokes in turns, to the exported script, and
to an interpreter of plain hooks.

A failure prints the seed and the smallest program that fails alike. ``PELLUCID_SEED`` starts elsewhere.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import oracle
from pellucid_shared.errors import ExportError, OrderError, PellucidError
from pellucid_shared.export import hooks_script
from pellucid_shared.show import show
from pellucid_shared.wire import TokenizedInvoke
from pellucid_worker.engine import Engine
from pellucid_worker.tensors import from_wire
from programs import LITERALS, SIZES, Program, draw, places, shrink

SEED = int(os.environ.get("PELLUCID_SEED", "0"))
_LITERALS = {name: from_wire(wire) for name, wire in LITERALS.items()}
_SPECS = {name: wire.spec for name, wire in LITERALS.items()}
#: Ends of the paths of modules that are called out of order.
_APPLIED = ("norm", "ln_1", "ln_f", "mlp", "lm_head", "dropout", "drop")


@dataclass
class Trial:
    """A model and the ways to run a program on it.

    Attributes:
        scripts: whether the exported script is one of them.
    """

    engine: Engine
    scripts: bool

    def __post_init__(self) -> None:
        card = self.engine.card
        assert card.packs
        self.turns = Engine(self.engine.model, None, card.model_copy(update={"packs": False}))
        self.sites = places(card)
        self.modules = [c.module for c in card.prefill if c.module.endswith(_APPLIED)]

    def program(self, seed: int) -> Program:
        return draw(self.engine.card, self.sites, self.modules, seed)

    def verdict(self, program: Program) -> str:
        """``agree``, ``refused`` (by all), ``failed`` (an op does, in all), or what is wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of some edits of expanded tensors
            ways = {"packed": self._engine, "turns": self._turns, "oracle": self._oracle}
            if self.scripts:
                ways["script"] = self._script
            found = {name: _answer(way, program) for name, way in ways.items()}
        packed, told = found.pop("packed"), found["oracle"]
        if isinstance(packed, OrderError):
            # In turns, an invoke may write what one before it makes late in its pass.
            rest = [
                found[way] for way in found if way == "script" or (way == "turns" and program.invokes == 1)
            ]
            return "refused" if all(isinstance(e, OrderError) for e in rest) else "refused by some only"
        if isinstance(told, RuntimeError | ValueError):
            return "failed"  # what nothing needs fails in plain hooks and is never run by the engine
        wrong = []
        for way, answer in {"packed": packed, **found}.items():
            in_turns_only = isinstance(packed, dict) and (
                (way == "turns" and isinstance(answer, OrderError))
                or (way == "script" and isinstance(answer, ExportError))
            )
            if not in_turns_only and not _same(answer, told):
                wrong.append(f"{way}: {answer!r:.100}" if isinstance(answer, Exception) else way)
        return f"the oracle disagrees with {', '.join(wrong)}" if wrong else "agree"

    def _engine(self, program: Program) -> Any:
        inputs = [TokenizedInvoke(ids=ids) for ids in program.inputs]
        return self.engine.run(program.graph, inputs, LITERALS)

    def _turns(self, program: Program) -> Any:
        return self.turns.run(program.graph, [TokenizedInvoke(ids=ids) for ids in program.inputs], LITERALS)

    def _oracle(self, program: Program) -> Any:
        return oracle.meaning(self.engine.model, program.nodes, program.inputs, _LITERALS)

    def _script(self, program: Program) -> Any:
        text = hooks_script(
            program.graph, self.engine.card, SIZES[: program.invokes], _SPECS, source="m", literals="x"
        )
        names: dict[str, Any] = {"__name__": "script", "__file__": "script.py"}
        exec(compile(text, "script.py", "exec"), names)
        return names["experiment"](
            self.engine.model, None, {name: tensor.clone() for name, tensor in _LITERALS.items()}
        )


def _answer(way: Any, program: Program) -> Any:
    try:
        return way(program)
    except (PellucidError, RuntimeError, ValueError, oracle.TooLateError) as error:
        return error


def _same(found: Any, wanted: Any) -> bool:
    """Whether two answers are equal, floats within 2e-4 of the largest."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
            return False
        finite = wanted[wanted.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        return torch.allclose(found, wanted, atol=2e-4 * scale, rtol=1e-4, equal_nan=True)
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return type(found) is type(wanted) and all(map(_same, found, wanted))
    return type(found) is type(wanted) and bool(found == wanted)


def hold(trial: Trial, seeds: range) -> Counter[str]:
    """Every program of these seeds agrees; how they ended."""
    ends: Counter[str] = Counter()
    for seed in seeds:
        program = trial.program(seed)
        end = trial.verdict(program)
        ends[end] += 1
        if end not in ("agree", "refused", "failed"):
            smallest = shrink(program, lambda p, end=end: trial.verdict(p)[:30] == end[:30])  # type: ignore[misc]
            pytest.fail(f"seed {seed}: {end}. The smallest program that fails so:\n{show(smallest.graph)}")
    return ends


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("start", "scripts"), [(0, True), (100_000, False)], ids=["with script", "without"])
def test_random_programs(tiny_models: Any, name: str, start: int, scripts: bool) -> None:
    first = SEED + start
    count = 200 if scripts else 800
    with torch.no_grad():
        ends = hold(Trial(Engine.from_model(tiny_models[name], id="m"), scripts), range(first, first + count))
    assert ends["agree"] > 0.7 * count, ends
    assert ends["refused"] > 0.02 * count, ends


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "gpt_neox", "gemma3", "qwen3"),
        pytest.param(
            "mixtral",
            marks=pytest.mark.xfail(
                reason="rows [batch * tokens, ...] that view [batch, tokens, ...] count as another tensor",
                strict=True,
            ),
        ),
    ],
)
def test_many_random_programs(tiny_models: Any, name: str) -> None:
    hold(Trial(Engine.from_model(tiny_models[name], id="m"), True), range(SEED + 200_000, SEED + 203_000))


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_random_programs_on_a_real_model(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    hold(Trial(Engine.from_model(model, id="m"), True), range(SEED + 300_000, SEED + 300_150))

"""Experiments exported as scripts of plain hooks: they compute what the engine does, and need none of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, safe_open

import pellucid
from experiments import EXPERIMENTS, Experiment
from graphs import Program
from pellucid import LanguageModel
from pellucid._cli import main
from pellucid_shared.errors import ExportError, OrderError
from pellucid_shared.export import hooks_script
from pellucid_shared.graph import Invoke, Trace
from pellucid_worker.tensors import from_wire
from references import capture, first, forward, with_first
from test_experiments import ARCHES, PROMPTS, agree
from test_golden import FOLDER, GRAPHS

MODELS = ("llama", "gpt2", "gpt_neox")
IDS = [[5, 9, 31, 7]]


@pytest.fixture(scope="module")
def local(tiny_models: Any) -> dict[str, Any]:
    return {name: LanguageModel(name, model=tiny_models[name]) for name in (*MODELS, "gemma3")}


def script(model: Any, experiment: Any) -> str:
    """The script of a graph whose prompts are ids."""
    sizes = []
    for trace in experiment.graph.traces:
        for invoke in trace.invokes:
            rows = invoke.input if isinstance(invoke.input[0], list) else [invoke.input]
            sizes.append((len(rows), max(map(len, rows))))
    specs = {digest: tensor.spec for digest, tensor in experiment.literals.items()}
    return hooks_script(experiment.graph, model.card, sizes, specs, source="m", literals="m.safetensors")


def computed(text: str, model: Any, literals: Any) -> dict[str, Any]:
    """What a script computes on a model that is loaded already."""
    names: dict[str, Any] = {"__name__": "exported", "__file__": "exported.py"}
    exec(compile(text, "exported.py", "exec"), names)
    found: dict[str, Any] = names["experiment"](
        model, None, {digest: from_wire(tensor) for digest, tensor in literals.items()}
    )
    return found


def same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            same(found[key], value)
    else:
        assert found == wanted


def passes_ruff(text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E4,E7,E9,F,W,I", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + text


@pytest.mark.parametrize("trial", EXPERIMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", MODELS)
def test_a_script_gives_what_the_engine_and_the_reference_give(
    name: str, trial: Experiment, local: Any, tiny_models: Any
) -> None:
    model, plain = local[name], tiny_models[name]
    arch = dataclasses.replace(ARCHES[name], heads=plain.config.num_attention_heads)
    saved = []
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                saved.append(trial.body(model, arch))
    text = script(model, tracer.experiment)
    assert "import pellucid" not in text
    found = computed(text, plain, tracer.experiment.literals)
    same(found, model.run(tracer.experiment))
    for prompt, mine in zip(PROMPTS, saved, strict=True):
        for key, value in trial.reference(plain, arch, torch.tensor(prompt)).items():
            agree(mine[key], value, f"{trial.name}.{key}")


def test_the_scripts_pass_ruff(local: Any, tiny_models: Any) -> None:
    arch = dataclasses.replace(ARCHES["llama"], heads=4)
    for trial in EXPERIMENTS:
        with local["llama"].trace(PROMPTS[0]) as tracer:
            trial.body(local["llama"], arch)
        passes_ruff(script(local["llama"], tracer.experiment))


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "inputs.json"])
def test_golden_graphs_export_and_run(name: str, local: Any, tiny_models: Any) -> None:
    loaded = pellucid.load_experiment(FOLDER / name)
    model = local[loaded.graph.model]
    text = script(model, loaded)
    passes_ruff(text)
    same(computed(text, tiny_models[loaded.graph.model], loaded.literals), model.run(loaded))


def test_values_of_one_invoke_reach_another_whichever_comes_first(local: Any, tiny_models: Any) -> None:
    model, plain = local["llama"], tiny_models["llama"]
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            h = model.model.layers[0].output
            logits = model.lm_head.output.save("logits")
        with tracer.invoke(PROMPTS[1]):
            last = model.model.layers[0].output[:, -1]
        h[:, -1] = last
    found = computed(script(model, tracer.experiment), plain, {})
    vector = capture(plain, torch.tensor(PROMPTS[1]), "model.layers.0")[:, -1]

    def patch(out: torch.Tensor) -> torch.Tensor:
        out[:, -1] = vector
        return out

    wanted = forward(plain, torch.tensor(PROMPTS[0]), after={"model.layers.0": patch}).logits
    agree(found["logits"], wanted, "logits")
    agree(logits, wanted, "the engine's")


def test_invokes_that_write_each_others_values_are_refused(local: Any) -> None:
    program = Program("llama")
    for mine, other in ((0, 1), (1, 0)):
        early = program.get("model.layers.0", invoke=other)
        program.set("model.layers.1", program.op("torch.mul", early, 2), invoke=mine)
        program.save(program.get("lm_head", invoke=mine), f"logits {mine}")
    with pytest.raises(ExportError, match="its invokes write values of each other both ways"):
        hooks_script(program.graph(2), local["llama"].card, [(1, 4), (1, 4)], {}, source="m")


def test_a_generation_is_refused_by_name(local: Any) -> None:
    with local["llama"].generate(IDS, max_new_tokens=2) as tracer:
        tracer.result.save()
    with pytest.raises(ExportError, match=r"generates, which is not exported"):
        script(local["llama"], tracer.experiment)


def test_a_session_runs_its_traces_in_order(local: Any, tiny_models: Any) -> None:
    model, plain = local["llama"], tiny_models["llama"]
    with model.session() as session:
        with model.trace(IDS):
            h = model.model.layers[0].output
            h[:, 0] = 0
        with model.trace(PROMPTS[1]):
            model.model.layers[1].output[:, -1] = h[:, -1]
            model.lm_head.output.save("logits")
    found = computed(script(model, session.experiment), plain, {})
    same(found, model.run(session.experiment))


def test_a_write_that_comes_too_late_is_refused_as_the_engine_does(local: Any) -> None:
    program = Program("llama")
    program.set("model.layers.0", program.get("model.layers.1"))
    program.save(program.get("lm_head"), "logits")
    with pytest.raises(OrderError):
        hooks_script(program.graph(), local["llama"].card, [(1, 4)], {}, source="m")


# --- the command line --------------------------------------------------------------------------------------


def run(*arguments: str | Path, host: str = "") -> Result:
    return CliRunner(env={"PELLUCID_HOST": host}).invoke(main, list(map(str, arguments)))


def test_the_command_writes_a_script_that_runs_without_pellucid(
    tiny_folders: dict[str, Path], tiny_models: Any, local: Any, tmp_path: Path
) -> None:
    model, vector = local["llama"], torch.linspace(-1, 1, 32)
    with model.trace(IDS) as tracer:
        model.model.layers[0].output = model.model.layers[0].output + vector
        pellucid.save([model.lm_head.output, {"n": 3}], "pair")
    pellucid.save_experiment(tracer, tmp_path / "steer.json")
    done = run(
        "export",
        "--hooks",
        tmp_path / "steer.json",
        "--source",
        tiny_folders["llama"],
        "-o",
        tmp_path / "s.py",
    )
    assert done.exit_code == 0, done.output
    alone = subprocess.run(
        [sys.executable, "-P", "s.py", "--out", "found.safetensors"],
        cwd=tmp_path,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert "pair.0 [1, 4, 99] torch.float32" in alone.stdout
    assert "pair.1.n 3" in alone.stdout

    def hook(output: Any) -> Any:
        return with_first(output, first(output) + vector)

    wanted = forward(tiny_models["llama"], torch.tensor(IDS), after={"model.layers.0": hook}).logits
    agree(load_file(tmp_path / "found.safetensors")["pair.0"], wanted, "logits")
    with safe_open(tmp_path / "found.safetensors", "pt") as file:
        assert file.metadata() == {"pair.1.n": "3"}


def test_text_goes_through_the_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    model: Any = LanguageModel(smollm2)
    with model.trace(["The Eiffel Tower", "Rome"]) as tracer:
        model.lm_head.output[:, -1].save("logits")
    graph = dataclasses.replace(
        tracer.graph,
        regions=(Trace((Invoke(["The Eiffel Tower", "Rome"]),)),),
    )
    file = tmp_path / "text.json"
    file.write_bytes(graph.to_json())
    done = run("export", "--hooks", file, "--source", smollm2)
    assert done.exit_code == 0, done.output
    assert 'tokenizer(["The Eiffel Tower", "Rome"])["input_ids"]' in done.output
    names: dict[str, Any] = {"__name__": "exported", "__file__": "exported.py"}
    exec(compile(done.output, "exported.py", "exec"), names)
    engine = model._target(False).engine
    agree(
        names["experiment"](engine.model, engine.tokenizer, {})["logits"],
        model.run(graph)["logits"],
        "logits",
    )


def test_the_command_says_what_it_lacks(local: Any, tmp_path: Path) -> None:
    with local["llama"].generate(IDS, max_new_tokens=2) as tracer:
        tracer.result.save()
    pellucid.save_experiment(tracer, tmp_path / "g.json")
    asked = run("export", "--hooks", tmp_path / "g.json")
    assert asked.exit_code == 1
    assert "give --source" in asked.output
    assert run("export", tmp_path / "g.json").exit_code == 2

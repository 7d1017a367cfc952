"""Experiments as files: written by a trace, run from Python and from the command line, shown, compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, safe_open

import pellucid
from client_fixtures import CardModel
from pellucid import Graph, LanguageModel
from pellucid._cli import main
from pellucid_shared.errors import GraphError, InputError
from pellucid_shared.packing import unpack_tensors
from references import first, forward, with_first
from service import running_service

pytestmark = pytest.mark.xdist_group("service-jobs")

IDS = [[5, 9, 31, 7]]
VECTOR = torch.linspace(-1, 1, 32)


@pytest.fixture(scope="module")
def url(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"tiny": tiny_folders["llama"]}, tmp_path_factory.mktemp("files")) as found:
        yield found


@pytest.fixture(scope="module")
def model(tiny_models: Any) -> Any:
    return LanguageModel("tiny", model=tiny_models["llama"])


def steer(model: Any, vector: torch.Tensor = VECTOR) -> tuple[Any, Any]:
    """A trace that names a tensor of the user's, and the logits it gave."""
    with model.trace(IDS) as tracer:
        model.model.layers[0].output = model.model.layers[0].output + vector
        logits = model.lm_head.output.save("logits")
        pellucid.save([model.model.layers[1].output, {"n": 3, "s": "x"}], "pair")
    return tracer, logits


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    tracer, _ = steer(model)
    pellucid.save_experiment(tracer, tmp_path / "steer.json")
    return tmp_path / "steer.json"


def run(*arguments: str | Path, host: str = "") -> Result:
    return CliRunner(env={"PELLUCID_HOST": host}).invoke(main, list(map(str, arguments)))


# --- Python ------------------------------------------------------------------------------------------------


def test_a_file_is_the_graphs_bytes_with_its_tensors_beside_it(model: Any, file: Path) -> None:
    tracer, _ = steer(model)
    data = file.read_bytes()
    assert data == tracer.graph.to_json()
    assert hashlib.sha256(data).hexdigest() == tracer.graph.sha256
    ((digest, tensor),) = unpack_tensors(file.with_suffix(".safetensors").read_bytes()).items()
    assert digest in data.decode()
    assert torch.equal(torch.frombuffer(bytearray(tensor.data), dtype=torch.float32), VECTOR)


def test_a_graph_without_tensors_is_one_file(model: Any, tmp_path: Path) -> None:
    with model.trace(IDS) as tracer:
        model.lm_head.output.save()
        pellucid.save_experiment(tracer, tmp_path / "inside.json")
    pellucid.save_experiment(tracer, tmp_path / "after.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.json", "inside.json"]
    assert (tmp_path / "inside.json").read_bytes() == (tmp_path / "after.json").read_bytes()


def test_a_loaded_experiment_gives_what_its_trace_gave(
    model: Any, url: str, file: Path, tiny_models: Any
) -> None:
    _, logits = steer(model)

    def hook(output: Any) -> Any:
        return with_first(output, first(output) + VECTOR)

    wanted = forward(tiny_models["llama"], torch.tensor(IDS), after={"model.layers.0": hook}).logits
    loaded = pellucid.load_experiment(file)
    here, there = model.run(loaded), model.run(loaded, remote=url)
    for results in (here, there):
        assert list(results) == ["logits", "pair"]
        assert type(results["logits"]) is torch.Tensor
        torch.testing.assert_close(results["logits"], wanted)
        assert results["pair"][1] == {"n": 3, "s": "x"}
    assert torch.equal(here["logits"], logits), "the same run, bit for bit"


def test_a_bare_graph_runs_where_it_names_no_tensors(model: Any, file: Path) -> None:
    with model.trace(IDS) as tracer:
        h = model.model.layers[0].output.save()
    assert torch.equal(model.run(Graph.from_json(tracer.graph.to_json()))["saved_0"], h)
    with pytest.raises(InputError, match=r"names tensors that are not with it; load it with pellucid\.load"):
        model.run(Graph.from_json(file.read_bytes()))
    with pytest.raises(InputError, match=r"takes a Graph, or what .* found str"):
        model.run(str(file))


def test_an_experiment_runs_on_another_model_of_the_same_modules(
    file: Path, tiny_models: Any, model: Any
) -> None:
    other = LanguageModel("other", model=tiny_models["qwen3"])
    logits = other.run(pellucid.load_experiment(file))["logits"]
    assert torch.equal(logits, steer(other)[1])
    assert not torch.equal(logits, steer(model)[1])
    gpt2 = LanguageModel("gpt2", model=tiny_models["gpt2"])
    with pytest.raises(GraphError, match=r"model\.layers\.0") as caught:
        gpt2.run(pellucid.load_experiment(file))
    assert str(caught.value).startswith(f"{__file__}:")


def test_texts_and_masks_are_given_to_the_model_as_a_trace_would(tiny_models: Any) -> None:
    seen: list[Any] = []

    class Watched(CardModel):
        def _target(self, remote: Any) -> Any:
            made = super()._target(remote)
            made.run = lambda graph, prompts, literals, **_: seen.append(list(prompts)) or {}  # type: ignore
            return made

    model: Any = Watched(distant=False)
    mask = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 1]]}
    with model.trace() as tracer:
        for given in ("ab", ["a", "bcd"], [1, 2], [[1], [2]], mask):
            with tracer.invoke(given):
                model.h[0].output.save()
        graph = tracer.graph
        tracer._recorder.saved.clear()
    model.run(graph)
    assert seen == [tracer._recorder.prompts]


def test_tensors_that_are_not_there_are_named(file: Path) -> None:
    file.with_suffix(".safetensors").unlink()
    with pytest.raises(
        InputError, match=r"names tensors that are not in .*steer\.safetensors, which belongs"
    ):
        pellucid.load_experiment(file)
    with pytest.raises(FileNotFoundError):
        pellucid.load_experiment(file.with_name("nothing.json"))
    with pytest.raises(InputError, match=r"ends in \.json, found 'steer\.safetensors'"):
        pellucid.save_experiment(None, file.with_suffix(".safetensors"))  # type: ignore[arg-type]


def test_an_experiment_prints_as_code_and_is_saved_again_unchanged(file: Path, tmp_path: Path) -> None:
    loaded = pellucid.load_experiment(file)
    assert str(loaded).splitlines()[:3] == [
        'trace "tiny":',
        "    invoke 0: [[5, 9, 31, 7]]",
        "    v0 = model.layers.0.output",
    ]
    pellucid.save_experiment(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    tensors = (tmp_path / "again.safetensors").read_bytes()
    assert tensors == file.with_suffix(".safetensors").read_bytes()


# --- the command line --------------------------------------------------------------------------------------


def test_run_prints_what_came_back_and_saves_it(model: Any, url: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.safetensors"
    done = run("run", file, "--out", out, "--host", url)
    assert done.output.splitlines() == [
        "logits    [1, 4, 99] float32",
        "pair.0    [1, 4, 32] float32",
        "pair.1.n  3",
        "pair.1.s  x",
    ]
    saved = load_file(out)
    assert sorted(saved) == ["logits", "pair.0"]
    torch.testing.assert_close(saved["logits"], steer(model)[1])
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"pair.1.n": "3", "pair.1.s": '"x"'}


def test_run_prints_json_for_programs(url: str, file: Path) -> None:
    said = json.loads(run("run", file, "--json", host=url).output)
    assert said["model"] == "tiny"
    assert said["saved"]["logits"] == {"dtype": "float32", "shape": [1, 4, 99]}
    assert said["saved"]["pair.1.n"] == {"value": 3}
    assert pellucid.Job(said["job"], url).status == "completed"


def test_run_says_in_one_line_what_is_wrong(url: str, file: Path, tmp_path: Path) -> None:
    def says(text: str, *arguments: str | Path, host: str = url) -> None:
        done = run("run", *arguments, host=host)
        assert done.exit_code == 1
        assert text in done.stderr
        assert done.stderr.count("\n") == 1

    says("no server is named", file, host="")
    for part in (file, file.with_suffix(".safetensors")):
        says("is part of the experiment; give --out another name", file, "--out", part)
    says("cannot be written: No such file", file, "--out", tmp_path / "no" / "out")
    wrong = tmp_path / "wrong.json"
    wrong.write_bytes(file.read_bytes().replace(b'"layers.1"', b'"x"').replace(b"model.layers.1", b"nowhere"))
    wrong.with_suffix(".safetensors").write_bytes(file.with_suffix(".safetensors").read_bytes())
    says(f"Error: {wrong}, node 5: ", wrong)
    wrong.write_text("{")
    says(f"Error: {wrong}: the request is not JSON", wrong)
    file.with_suffix(".safetensors").write_bytes(b"broken")
    says("Error: " + str(file.with_suffix(".safetensors")), file)


def test_show_prints_the_graph_and_its_tensors_with_or_without_them(file: Path) -> None:
    code = str(pellucid.load_experiment(file))
    digest = next(iter(pellucid.load_experiment(file).literals)).removeprefix("sha256:")[:8]
    assert run("show", file).output == f"{code}tensor<{digest}>: [32] float32\n"
    file.with_suffix(".safetensors").unlink()
    assert run("show", file).output == f"{code}tensor<{digest}>: not in steer.safetensors\n"


def test_diff_prints_what_differs_and_says_so_by_its_exit_code(model: Any, file: Path) -> None:
    other = file.with_name("other.json")
    other.write_text(json.dumps(json.loads(file.read_bytes()), indent=2))
    same = run("diff", file, other)
    assert (same.exit_code, same.output) == (0, ""), "spacing is no difference"
    pellucid.save_experiment(steer(model, VECTOR.double())[0], other)
    done = run("diff", file, other)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith("- v1 = v0 + tensor<")
    assert lines[1].startswith("+ v1 = v0 + tensor<")
    assert [line.split(": ")[1] for line in lines[2:]] == ["[32] float32", "[32] float64"]
    other.write_text("{}")
    failed = run("diff", file, other)
    assert (failed.exit_code, failed.output.count("\n")) == (2, 1)
    assert failed.stderr.startswith(f"Error: {other}: a graph lacks")


def test_status_and_cancel_say_how_a_job_stands(url: str, file: Path) -> None:
    job = json.loads(run("run", file, "--json", host=url).output)["job"]
    said = run("status", job, host=url).output
    assert said.startswith(f"job {job} on tiny: completed after ")
    assert run("cancel", job, host=url).output == f"job {job} had completed already\n"
    for command in ("status", "cancel"):
        missing = run(command, "0" * 32, host=url)
        assert missing.exit_code == 1
        assert missing.stderr == f"Error: there is no job {'0' * 32}; jobs are kept for a day\n"
        assert run(command, "a/b", host=url).stderr.startswith("Error: 'a/b' is not the id of a job")
        assert "no server is named" in run(command, "abc").stderr

"""Graphs of version 1 as they were written: they go on parsing to the same bytes and meaning the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pellucid
from hand_card import hand_card
from pellucid import Graph, LanguageModel
from pellucid._files import beside
from pellucid_shared.check import check
from pellucid_shared.lint import lint
from pellucid_shared.packing import pack_tensors
from references import capture, first, forward, with_first

FOLDER = Path(__file__).parent / "golden"
#: SHA-256 of each file. A file is added, never changed: graphs like these lie on users' disks.
FILES = {
    "arguments.json": "9af43f4654dd1e8924e188fb4e3b70da21d151f74da43a9335f64631cf9fa40a",
    "inputs.json": "e197e4483c7c8cda9567a435280e74f97df92a8a7a89e8f332ed6cd094032b65",
    "lens.json": "e077f9f0ba74552a172f82e01cdc885c2f5f8e31d06fcae5ea4007331d9703cb",
    "patch.json": "71bafafcfa0404c6fcb94d0653db4dc1fef113ce907f4565b37a3bef4d3b2f8b",
    "read.json": "0b813eab46d5f1690c58ae25e88a6199a7f23693274269c5a6172bae8969b082",
    "steer.json": "03f7e32cbe40e9eff1cff147f5d2727fd94ae20ef83b9a63d2a4cb4e3d738620",
    "steer.safetensors": "eec5d535a4d6ec6b6550fb343b54d6ebd1ee81bace53a98a6dbe03698cbab473",
}
GRAPHS = sorted(name for name in FILES if name.endswith(".json"))
IDS = torch.tensor([[5, 9, 31, 7]])


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, LanguageModel]:
    return {name: LanguageModel(name, model=tiny_models[name]) for name in ("llama", "gpt2")}


def results(models: dict[str, LanguageModel], name: str) -> dict[str, Any]:
    loaded = pellucid.load_experiment(FOLDER / name)
    return models[loaded.graph.model].run(loaded)


def test_the_files_are_as_they_were() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir()}
    assert found == FILES


@pytest.mark.parametrize("name", GRAPHS)
def test_a_golden_graph_parses_to_the_same_bytes_and_hash(name: str) -> None:
    loaded = pellucid.load_experiment(FOLDER / name)
    lint(loaded.graph)
    assert loaded.graph.to_json() == (FOLDER / name).read_bytes()
    assert loaded.graph.sha256 == FILES[name]
    assert bool(loaded.literals) == beside(FOLDER / name).exists()
    if loaded.literals:
        assert pack_tensors(loaded.literals) == beside(FOLDER / name).read_bytes()


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "inputs.json"])
def test_a_golden_graph_still_runs(name: str, models: dict[str, LanguageModel]) -> None:
    graph = Graph.from_json((FOLDER / name).read_bytes())
    assert list(results(models, name)) == list(graph.save_names().values())


def test_every_form_of_input_still_fits_a_model() -> None:
    graph = Graph.from_json((FOLDER / "inputs.json").read_bytes())
    kinds = [invoke.input for region in graph.regions for invoke in region.invokes]
    assert kinds == ["The café", ["a", "b c"], [[1, 2], [3, 4]]]
    check(graph, hand_card(), [(1, 3), (2, 2), (2, 2)], {})


# --- what they mean, in plain hooks ------------------------------------------------------------------------


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


def edited(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda output: with_first(output, edit(first(output).clone()))


def test_reads_mean_what_hooks_see(models: dict[str, LanguageModel], tiny_models: Any) -> None:
    found, model = results(models, "read.json"), tiny_models["llama"]
    h = capture(model, IDS, "model.layers.1")
    close(found["saved_0"], h)
    close(found["input"], capture(model, IDS, "model.layers.0"))
    close(found["cos"], model.model.rotary_emb(h, torch.arange(4)[None])[0])
    close(found["attention"], capture(model, IDS, "model.layers.0.self_attn"))
    close(found["logits"], forward(model, IDS).logits)
    last, (total, rest) = found["structure"]
    close(last, h[:, -1])
    close(total, h.sum())
    assert rest == {"n": 3, "x": 0.5, "on": True, "none": None, "s": "é"}


def test_a_patch_means_what_hooks_do(models: dict[str, LanguageModel], tiny_models: Any) -> None:
    model = tiny_models["llama"]
    source = capture(model, torch.tensor([[5, 9, 31, 7, 2]]), "model.layers.0")[:, -1]

    def patch(h: torch.Tensor) -> torch.Tensor:
        h[:, -1] = source
        return h

    hooks = {"model.layers.0": edited(patch), "model.layers.1.mlp": edited(lambda h: h * 0.5)}
    wanted = forward(model, torch.tensor([[11, 3, 8], [4, 4, 1]]), after=hooks).logits
    close(results(models, "patch.json")["logits"], wanted)


def test_literals_mean_what_hooks_do(models: dict[str, LanguageModel], tiny_models: Any) -> None:
    found, model = results(models, "steer.json"), tiny_models["llama"]
    kept: list[torch.Tensor] = []
    hooks = {
        "model.layers.0": edited(lambda h: h + torch.linspace(-1, 1, 32)),
        "model.layers.1": lambda output: kept.append(first(output).clone()),
    }
    close(found["logits"], forward(model, IDS, after=hooks).logits)
    h = kept[0]
    close(found["probe"], torch.nn.functional.linear(h, torch.arange(96).reshape(3, 32) / 96))
    assert torch.equal(found["half"], h.to(torch.bfloat16) * 2)
    close(found["picked"], h[:, [3, 0]])
    close(found["masked"], h[torch.arange(128).reshape(1, 4, 32) % 3 == 0])
    close(found["complex"], h[0, 0, :2] * torch.tensor([1 + 2j, 3 - 1j]))


def test_modules_out_of_order_mean_what_hooks_see(models: dict[str, LanguageModel], tiny_models: Any) -> None:
    found, model = results(models, "lens.json"), tiny_models["gpt2"]
    for i in range(2):
        h = capture(model, IDS, f"transformer.h.{i}")
        with torch.no_grad():
            logits = model.lm_head(model.transformer.ln_f(h))
        close(found[f"layer {i}"], logits.softmax(-1).topk(3).values)


def test_arguments_of_every_kind_mean_what_they_did(
    models: dict[str, LanguageModel], tiny_models: Any
) -> None:
    found, model = results(models, "arguments.json"), tiny_models["gpt2"]
    ids = torch.tensor([[5, 9, 31, 7], [1, 2, 3, 4]])
    h = capture(model, ids, "transformer.h.0")
    wanted = [
        h.double().mean(dim=(0, 1), keepdim=True),
        h[..., None, 2:6:2],
        h[:, [0, -1]].std(dim=-1, correction=0),
        h.masked_fill(h > 0, float("-inf")),
        (h * (1 + 2j)).abs(),
        h.reshape(2, 4, 4, 8).permute(0, 2, 1, 3),
        h @ h.mT,
        h.clamp(0, 1),
        torch.cat([h, -h], dim=-1),
    ]
    for i, value in enumerate(wanted):
        close(found[f"saved_{i}"], value)
    assert found["made"].tolist() == [[0, 7, 0], [0, 7, 0]]

    def cut(h: torch.Tensor) -> torch.Tensor:
        h[h > 1] = 0
        return h

    hooks = {"transformer.h.0": edited(cut), "transformer.h.1.mlp": edited(torch.zeros_like)}
    assert torch.equal(found["next"], forward(model, ids, after=hooks).logits.argmax(-1))

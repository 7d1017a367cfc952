"""Every experiment, remote and local, one invoke and several of different lengths, against plain hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pellucid
from experiments import EXPERIMENTS, Arch, Experiment, at
from references import capture, first, forward, with_first
from service import running_service

pytestmark = pytest.mark.xdist_group("service")

LLAMA = Arch("model.layers", "mlp", "self_attn", "o_proj", "model.norm", "lm_head", "model.embed_tokens", 0)
GPT2 = Arch("transformer.h", "mlp", "attn", "c_proj", "transformer.ln_f", "lm_head", "transformer.wte", 0)
NEOX = Arch(
    "gpt_neox.layers",
    "mlp",
    "attention",
    "dense",
    "gpt_neox.final_layer_norm",
    "lm_head",
    "gpt_neox.embed_in",
    0,
)
ARCHES = {"smollm2": LLAMA, "llama": LLAMA, "gpt2": GPT2, "gpt_neox": NEOX}
#: Prompts of different lengths, as ids that every vocabulary has; one is a batch of two rows.
PROMPTS: list[list[list[int]]] = [
    [[5, 9, 31, 7, 2, 40]],
    [[11, 3, 8]],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]],
]


@pytest.fixture(scope="module")
def folders(smollm2: Path, tiny_folders: dict[str, Path]) -> dict[str, Path]:
    return {"smollm2": smollm2, **{name: tiny_folders[name] for name in ("llama", "gpt2", "gpt_neox")}}


@pytest.fixture(scope="module")
def service(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(folders, tmp_path_factory.mktemp("service")) as url:
        yield url


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        for name, path in folders.items()
    }


@pytest.fixture(scope="module")
def local(plain: dict[str, torch.nn.Module]) -> dict[str, pellucid.LanguageModel]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in plain.items()}


@pytest.fixture(params=sorted(ARCHES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["local", "remote"])
def model(request: pytest.FixtureRequest, name: str) -> pellucid.LanguageModel:
    if request.param == "local":
        return request.getfixturevalue("local")[name]
    return pellucid.LanguageModel(name, remote=request.getfixturevalue("service"))


@pytest.fixture
def arch(name: str, plain: dict[str, torch.nn.Module]) -> Arch:
    return dataclasses.replace(ARCHES[name], heads=plain[name].config.num_attention_heads)


def agree(found: Any, wanted: torch.Tensor, what: str) -> None:
    """Floats within 1e-4 of the largest value (fp32 promise), everything else equal."""
    assert isinstance(found, torch.Tensor)
    assert type(found) is torch.Tensor, what
    assert found.shape == wanted.shape, what
    assert found.dtype == wanted.dtype, what
    if wanted.is_floating_point():
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=1e-4, msg=lambda m: f"{what}: {m}")
    else:
        assert torch.equal(found, wanted), what


@pytest.mark.parametrize("trial", EXPERIMENTS, ids=lambda e: e.name)
def test_one_invoke(model: Any, arch: Arch, plain: Any, name: str, trial: Experiment) -> None:
    for prompt in (PROMPTS[0], PROMPTS[2]):
        with model.trace(prompt):
            saved = trial.body(model, arch)
        wanted = trial.reference(plain[name], arch, torch.tensor(prompt))
        for key, value in wanted.items():
            agree(saved[key], value, f"{trial.name}.{key}")


@pytest.mark.parametrize("trial", EXPERIMENTS, ids=lambda e: e.name)
def test_several_invokes_each_see_their_own_rows_and_tokens(
    model: Any, arch: Arch, plain: Any, name: str, trial: Experiment
) -> None:
    saved = []
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                saved.append(trial.body(model, arch))
    for prompt, mine in zip(PROMPTS, saved, strict=True):
        wanted = trial.reference(plain[name], arch, torch.tensor(prompt))
        for key, value in wanted.items():
            agree(mine[key], value, f"{trial.name}.{key} of {len(prompt)}x{len(prompt[0])}")


def test_values_cross_invokes(model: Any, arch: Arch, plain: Any, name: str) -> None:
    layer = arch.layer(0)
    for source, target in ((PROMPTS[0], PROMPTS[1]), (PROMPTS[1], PROMPTS[0])):
        with model.trace() as tracer:
            with tracer.invoke(source):
                last = at(model, layer).output[:, -1]
            with tracer.invoke(target):
                at(model, layer).output[:, -1] = last
                logits = at(model, arch.head).output.save()
        vector = capture(plain[name], torch.tensor(source), layer)[:, -1]

        def patch(out: Any, vector: torch.Tensor = vector) -> Any:
            h = first(out).clone()
            h[:, -1] = vector
            return with_first(out, h)

        agree(logits, forward(plain[name], torch.tensor(target), after={layer: patch}).logits, "patched")


def test_rows_of_different_lengths_in_one_invoke_are_seen_left_padded(
    model: Any, arch: Arch, plain: Any, name: str
) -> None:
    long, short = PROMPTS[0][0], PROMPTS[1][0]
    with model.trace([long, short]):
        logits = at(model, arch.head).output.save()
    assert logits.shape[:2] == (2, len(long))
    agree(logits[:1], forward(plain[name], torch.tensor([long])).logits, "the long row")
    agree(logits[1:, -len(short) :], forward(plain[name], torch.tensor([short])).logits, "the short row")


def test_remote_and_local_build_the_same_bytes(local: Any, service: str, name: str, arch: Arch) -> None:
    graphs = []
    for model in (local[name], pellucid.LanguageModel(name, remote=service)):
        with model.trace(PROMPTS[0]) as tracer:
            at(model, arch.layer(1)).output[:, -1] *= 2
            at(model, arch.head).output.save()
        graphs.append(tracer.graph.to_json())
    assert graphs[0] == graphs[1]

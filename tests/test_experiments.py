"""Every experiment, remote and local, one invoke and several of different lengths, against plain hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pellucid
from experiments import EXPERIMENTS, Arch, Experiment, at
from pellucid_shared.errors import InputError
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


RAGGED = [[5, 9, 31, 7, 2, 40], [11, 3, 8]]
#: The same rows as a tokenizer pads them, on either side, with the mask that says so.
PADDED: dict[str, Any] = {
    "left": {
        "input_ids": [RAGGED[0], [0, 0, 0, *RAGGED[1]]],
        "attention_mask": [[1] * 6, [0, 0, 0, 1, 1, 1]],
    },
    "right": {
        "input_ids": [RAGGED[0], [*RAGGED[1], 0, 0, 0]],
        "attention_mask": [[1] * 6, [1, 1, 1, 0, 0, 0]],
    },
    "rows": RAGGED,
}


@pytest.mark.parametrize("padding", PADDED)
def test_tokens_are_counted_from_each_rows_own_first_token(
    model: Any, arch: Arch, plain: Any, name: str, padding: str
) -> None:
    layer = arch.layer(1)
    with model.trace(PADDED[padding]):
        h = at(model, layer).output
        found = {
            "first": h.t[0].save(),
            "last": h.token[-1].save(),
            "two": h.t[0:2].save(),
            "some": h.token[[2, 0]].save(),
            "turned": h.transpose(1, 2).t[1].save(),
            "folded": h.view(h.shape[0], h.shape[1], 2, -1).t[1].save(),
        }
    for row, ids in enumerate(RAGGED):
        alone = capture(plain[name], torch.tensor([ids]), layer)[0]
        wanted = {
            "first": alone[0],
            "last": alone[-1],
            "two": alone[0:2],
            "some": alone[[2, 0]],
            "turned": alone[1],
            "folded": alone[1].view(2, -1),
        }
        for key, value in wanted.items():
            agree(found[key][row], value, f"{key} of row {row}")


@pytest.mark.parametrize("padding", PADDED)
def test_tokens_are_written_at_each_rows_own_place(
    model: Any, arch: Arch, plain: Any, name: str, padding: str
) -> None:
    layer = arch.layer(0)
    with model.trace(PADDED[padding]):
        h = at(model, layer).output
        h.t[0] = 0.5
        h.token[[1, 2]] *= 2
        last = at(model, arch.head).output.token[-1].save()

    def edit(out: Any) -> Any:
        h = first(out).clone()
        h[:, 0] = 0.5
        h[:, 1:3] *= 2
        return with_first(out, h)

    for row, ids in enumerate(RAGGED):
        wanted = forward(plain[name], torch.tensor([ids]), after={layer: edit}).logits[0, -1]
        agree(last[row], wanted, f"row {row}")


def test_a_cache_has_every_module_as_the_model_went_on_with_it(
    model: Any, arch: Arch, plain: Any, name: str
) -> None:
    caches = []
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt) as invoker:
                caches.append(invoker.cache(include_inputs=True))
                layer = at(model, arch.layer(0))
                layer.output = layer.output * 2
                everything = invoker.save_all()
    for prompt, cache in zip(PROMPTS, caches, strict=True):
        ids = torch.tensor(prompt)
        seen: dict[str, torch.Tensor] = {}
        doubled = {arch.layer(0): lambda out: with_first(out, first(out) * 2)}

        def keep(path: str, seen: dict[str, torch.Tensor] = seen) -> Any:
            return lambda out: seen.__setitem__(path, first(out).clone())

        paths = [arch.embed, arch.head, arch.norm, arch.layer(1), f"{arch.layer(1)}.{arch.attention}"]
        logits = forward(plain[name], ids, after={**doubled, **{p: keep(p) for p in paths}}).logits
        for path in paths:
            agree(first(cache[path].output), seen[path], path)
        agree(cache[arch.layer(0)].output, capture(plain[name], ids, arch.layer(0)) * 2, "the edited layer")
        agree(at(cache, arch.layer(1)).input, cache[arch.layer(0)].output, "the input of the next")
        agree(at(cache, arch.layer(1)).inputs[0][0], cache[arch.layer(0)].output, "all arguments of the next")
        agree(cache[""].output.logits, logits, "the whole model")
    agree(everything[""]["logits"], logits, "save_all of the last prompt")
    agree(first(everything[f"{arch.layer(1)}.{arch.attention}"]), seen[paths[-1]], "save_all of a tuple")


def test_a_run_without_a_block_gives_the_models_output(model: Any, plain: Any, name: str) -> None:
    output = model.trace(PROMPTS[2], trace=False)
    wanted = forward(plain[name], torch.tensor(PROMPTS[2])).logits
    agree(output.logits, wanted, "by attribute")
    assert output["logits"] is output[0] is output.logits


CHATS: dict[str, list[dict[str, str]]] = {
    "a question": [{"role": "user", "content": "What is the capital of France?"}],
    "an answer": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, you."}],
}


@pytest.mark.parametrize("where", ["local", "remote"])
def test_chats_go_through_the_models_template(
    where: str, smollm2: Path, plain: Any, request: pytest.FixtureRequest
) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    model: Any = pellucid.LanguageModel(smollm2)
    if where == "remote":
        model = pellucid.LanguageModel("smollm2", remote=request.getfixturevalue("service"))
    question, answer = CHATS.values()
    ids = [
        theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False),
        theirs.apply_chat_template(answer, return_dict=False),
    ]
    with model.trace() as tracer:
        with tracer.invoke(question):
            logits = model.lm_head.output[:, -1].save()
        with tracer.invoke([question, answer]):
            last = model.lm_head.output.token[-1].save()
    assert [invoke.input for invoke in tracer.graph.regions[0].invokes] == [ids[0], ids]
    for row, prompt in enumerate(ids):
        wanted = forward(plain["smollm2"], torch.tensor([prompt])).logits[:, -1]
        agree(last[row : row + 1], wanted, f"chat {row}")
    agree(logits, forward(plain["smollm2"], torch.tensor(ids[:1])).logits[:, -1], "one chat")
    assert model.tokenizer.apply_chat_template(question, tokenize=False) == theirs.apply_chat_template(
        question, tokenize=False
    )


def test_a_chat_for_a_model_without_a_template_is_refused_at_the_users_line(service: str) -> None:
    model = pellucid.LanguageModel("llama", remote=service)
    with pytest.raises(InputError, match="llama has no tokenizer") as caught, model.trace(CHATS["an answer"]):
        pass
    assert str(caught.value).startswith(f"{__file__}:")


def test_a_prompt_that_is_too_long_names_both_numbers(model: Any, name: str) -> None:
    most = model.card.max_tokens
    with (
        pytest.raises(InputError, match=rf"has {most + 1} tokens and {name} takes at most {most}") as caught,
        model.trace([[1] * (most + 1)]),
    ):
        model.input.save()
    assert str(caught.value).startswith(f"{__file__}:")


def test_the_old_names_of_a_config_are_there(model: Any, plain: Any, name: str) -> None:
    for attribute in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(model.config, attribute) == getattr(plain[name].config, attribute)

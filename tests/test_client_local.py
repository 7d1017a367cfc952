"""Traces that run in this process, against plain hooks: how values come back, what they are then."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import pellucid
from client_fixtures import refused
from pellucid import LanguageModel
from pellucid_shared.errors import (
    ExecutionError,
    IndexOutOfRangeError,
    InputError,
    NotYetError,
    OrderError,
    RecordingError,
    ShapeError,
    UnknownModuleError,
    UnknownOpError,
    ValueNotReadyError,
)
from references import capture, forward

IDS = [[5, 9, 31, 7, 2, 40]]


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: PreTrainedModel) -> LanguageModel:
    return LanguageModel("llama", model=plain)


def line_of(mark: str) -> str:
    """``file:line`` of the one line of this file that ends with the comment ``mark``."""
    with open(__file__) as file:
        numbers = [i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {mark}")]
    assert len(numbers) == 1
    return f"{__file__}:{numbers[0]}"


# --- what saved names become -------------------------------------------------------------------------------


def test_a_saved_name_is_a_real_tensor_after_the_block(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        h = model.model.layers[0].output.save()
        mask = (h > 0).save()
        ids = model.input.save("ids")
    assert type(h) is torch.Tensor
    assert torch.equal(h, capture(plain, torch.tensor(IDS), "model.layers.0"))
    assert (mask.dtype, ids.dtype) == (torch.bool, torch.int64)
    assert ids.tolist() == IDS
    assert h.value is not h
    assert h.value.data_ptr() == h.data_ptr()
    assert set(vars(h)) == {"value"}
    # Everything torch does with a tensor works on it.
    assert isinstance(np.asarray(h), np.ndarray)
    assert torch.equal(copy.deepcopy(h), h)
    buffer = io.BytesIO()
    torch.save(h, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), h)
    torch.nn.Parameter(h)
    assert (h @ h.mT).softmax(-1).sum().item() > 0
    h[0, 0] = 0
    assert h[0, 0].abs().sum() == 0


def test_structures_come_back_as_they_were_saved(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        first, second = model.model.layers[0].output, model.model.layers[1].output
        pair = pellucid.save([first, second])
        named = pellucid.save({"first": first, "inside": (second[:, -1], 3, "x", None)}, "named")
        best = second.max(dim=-1).save()
    wanted = [capture(plain, torch.tensor(IDS), f"model.layers.{i}") for i in (0, 1)]
    assert isinstance(pair, list)
    assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))
    assert type(pair.value) is list
    assert torch.equal(first, wanted[0])
    assert torch.equal(named["first"], wanted[0])
    assert torch.equal(named["inside"][0], wanted[1][:, -1])
    assert named["inside"][1:] == (3, "x", None)
    assert type(named.value) is dict
    assert torch.equal(best.values, wanted[1].max(dim=-1).values)
    assert torch.equal(best.value[1], wanted[1].max(dim=-1).indices)
    assert list(tracer.graph.save_names().values()) == ["saved_0", "named", "saved_2"]


def test_the_models_whole_output_can_be_saved(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        output = model.output.save()
    torch.testing.assert_close(output["logits"], forward(plain, torch.tensor(IDS)).logits)


def test_modules_that_return_structures_are_applied_out_of_order(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        embedded = model.model.embed_tokens.output
        rotations = model.model.rotary_emb.output
        attended, weights = model.model.layers[0].self_attn(
            embedded, position_embeddings=rotations, attention_mask=None
        )
        whole = model.model(inputs_embeds=embedded)
        by_name, by_place = whole.last_hidden_state, whole[0]
        assert weights is None
        assert by_name is by_place
        pellucid.save([attended, by_name])
    with torch.no_grad():
        wanted = plain.model(input_ids=torch.tensor(IDS)).last_hidden_state
        embedded = plain.model.embed_tokens(torch.tensor(IDS))
        cosine_and_sine = plain.model.rotary_emb(embedded, torch.arange(len(IDS[0]))[None])
        alone, _ = plain.model.layers[0].self_attn(embedded, cosine_and_sine, None)
    torch.testing.assert_close(by_name, wanted)
    torch.testing.assert_close(attended, alone)


def test_a_buffer_of_the_users_is_filled_by_the_run(model: Any, plain: Any) -> None:
    means = torch.zeros(2)
    with model.trace(IDS):
        for i in range(2):
            means[i] = model.model.layers[i].output.mean()
    wanted = [capture(plain, torch.tensor(IDS), f"model.layers.{i}").mean() for i in (0, 1)]
    assert type(means) is torch.Tensor
    torch.testing.assert_close(means, torch.stack(wanted))


def test_values_that_were_not_saved_say_so(model: Any) -> None:
    with model.trace(IDS):
        h = model.model.layers[0].output
        with pytest.raises(ValueNotReadyError, match=r"does not exist before the block ends; .save\(\) it"):
            _ = h.value
        kept = (h * 2).save()
    for use in (lambda: h + 1, lambda: torch.exp(h), lambda: h.shape, lambda: h.value, lambda: h[0, :]):
        with pytest.raises(ValueNotReadyError, match=r"was not saved, so it is gone: .save\(\) it"):
            use()
    assert "model.layers.0.output" in repr(h)
    assert type(kept) is torch.Tensor


def test_values_of_a_failed_job_say_that_it_failed_and_why(model: Any) -> None:
    late: Any = None

    def body() -> None:
        nonlocal late
        late = model.model.layers[1].output.save()
        model.model.layers[0].output = late

    refused(model, OrderError, r"model.layers.0.output .* needs model.layers.1.output", body, IDS)
    for use in (lambda: late + 1, lambda: torch.exp(late), lambda: late.value, lambda: float(late)):
        with pytest.raises(ValueNotReadyError, match=r"has no value: its job failed .*written with a value"):
            use()


def test_values_of_a_block_that_ended_with_an_exception_say_so(model: Any) -> None:
    h: Any = None

    def body() -> None:
        nonlocal h
        h = model.model.layers[0].output.save()
        raise KeyError

    with pytest.raises(KeyError), model.trace(IDS):
        body()
    with pytest.raises(ValueNotReadyError, match="the block ended with KeyError, so nothing was run"):
        h + 1


# --- errors name the user's line ---------------------------------------------------------------------------


def test_every_mistake_names_what_was_asked_what_was_found_and_the_line(model: Any) -> None:
    def fails(error: type[Exception], match: str, body: Any) -> None:
        assert str(refused(model, error, match, body, IDS)).startswith(f"{__file__}:")

    head, layers = model.lm_head, model.model.layers
    fails(UnknownModuleError, "has no module or parameter 'lm_haed'. Nearest: lm_head", lambda: model.lm_haed)
    fails(UnknownModuleError, "'model.layers.0.mpl'. Nearest: model.layers.0.mlp", lambda: layers[0].mpl)
    fails(
        IndexOutOfRangeError,
        r"model.layers\[9\] is out of range: it has 2 modules, 0 to 1",
        lambda: layers[9],
    )
    fails(
        UnknownOpError, "no 'softmacks'. Nearest: .*torch.Tensor.softmax", lambda: head.output.softmacks(-1)
    )
    fails(UnknownOpError, "torch.fft.fft is not an operation", lambda: torch.fft.fft(head.output))
    fails(ShapeError, r"\[1, 6, 32\].*\[1, 6, 99\]", lambda: layers[0].output + head.output)
    fails(ShapeError, r"lm_head takes \[..., 32\] and was given \[1, 6, 99\]", lambda: head(head.output))
    fails(IndexOutOfRangeError, "99", lambda: head.output[..., 99])
    fails(RecordingError, "write .with tracer.cond.flag.:. and", lambda: bool(head.output.sum() > 0))
    fails(RecordingError, r"float\(\) is known only to the run", lambda: float(head.output.sum()))
    fails(RecordingError, r"use torch.stack\(\[...\]\)", lambda: torch.tensor([head.output.sum()]))
    fails(
        NotYetError,
        ".register_hook of a value is not in .*: functions over gradients",
        lambda: head.output.register_hook(print),
    )
    fails(ShapeError, "tuple cannot be joined", lambda: (1,) + layers[0].output[1:])  # noqa: RUF005


def test_a_shape_mismatch_gives_both_shapes_and_the_users_line(model: Any) -> None:
    def body() -> None:
        h = model.model.layers[0].output
        h @ torch.ones(31, 4)  # mismatch

    error = refused(model, ShapeError, r"\[1, 6, 32\].*\[31, 4\]", body, IDS)
    assert str(error).startswith(line_of("mismatch"))


def test_an_error_of_the_run_names_the_line_of_its_node(model: Any) -> None:
    def body() -> None:
        h = model.model.layers[0].output
        h.transpose(1, 2).view(-1).save()  # cannot be viewed

    error = refused(model, ExecutionError, "view", body, IDS)
    assert str(error).startswith(line_of("cannot be viewed"))


def test_an_order_error_names_the_line_of_the_write(model: Any) -> None:
    def body() -> None:
        late = model.lm_head.output.mean()
        model.model.layers[0].output[:] = late  # too late

    assert str(refused(model, OrderError, "clone", body, IDS)).startswith(line_of("too late"))


def test_values_of_two_traces_do_not_mix(model: Any) -> None:
    with model.trace(IDS):
        old = model.model.layers[0].output
    with pytest.raises(ValueNotReadyError, match="was not saved"), model.trace(IDS):
        model.model.layers[1].output = old


def test_text_for_a_model_without_tokenizer_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="llama has no tokenizer; give it token ids"), model.trace("hello"):
        pass


# --- the tree ----------------------------------------------------------------------------------------------


def test_the_tree_is_walked_by_name_index_and_prefix(model: Any) -> None:
    assert model.layers[-1] == model.model.layers[1]
    assert [m.path for m in model.layers[0:]] == ["model.layers.0", "model.layers.1"]
    assert len(model.layers) == 2
    assert [m.path for m in model.layers] == ["model.layers.0", "model.layers.1"]
    assert set(model.children) == {"model", "lm_head"}
    assert {"layers", "lm_head", "model", "trace", "output"} <= set(dir(model))
    assert hasattr(model, "lm_head")
    assert not hasattr(model, "nothing")
    assert [path for path, _ in model.layers[0].mlp.named_modules()][:2] == [
        "model.layers.0.mlp",
        "model.layers.0.mlp.gate_proj",
    ]
    assert model.config.num_hidden_layers == 2
    with pytest.raises(RecordingError, match="none is open here"):
        _ = model.lm_head.weight
    with pytest.raises(RecordingError, match="cannot be assigned"):
        model.layers[0].mlp.up_proj = 3


def test_the_tree_prints_with_class_names_and_shapes(model: Any) -> None:
    text = repr(model)
    assert text.startswith(
        "llama: LlamaForCausalLM -> CausalLMOutputWithPast(logits=[batch, tokens, 99] float32"
    )
    assert "(0-1): 2 x LlamaDecoderLayer -> [batch, tokens, 32] float32" in text
    assert "      (mlp): LlamaMLP -> [batch, tokens, 32] float32" in repr(model.model)


# --- where a model comes from ------------------------------------------------------------------------------


def test_a_folder_is_loaded_on_first_use_and_named_for_itself(
    tiny_folders: dict[str, Path], tiny_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_HOST", "http://127.0.0.1:1")  # a folder runs here all the same
    model = LanguageModel(tiny_folders["gpt2"])
    assert model.name == "gpt2"
    with model.trace(IDS):
        logits = model.lm_head.output.save()
    wanted = forward(tiny_models["gpt2"], torch.tensor(IDS)).logits
    torch.testing.assert_close(logits, wanted)


def test_a_model_may_be_loaded_inside_a_block(tiny_folders: dict[str, Path], tiny_models: Any) -> None:
    model, other = (LanguageModel(tiny_folders[name]) for name in ("gpt2", "llama"))
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            logits = model.lm_head.output.save()
        assert other.card.id == "llama"
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "save"], "loading is not recorded"
    with other.trace(IDS):
        others = other.lm_head.output.save()
    for found, name in ((logits, "gpt2"), (others, "llama")):
        torch.testing.assert_close(found, forward(tiny_models[name], torch.tensor(IDS)).logits)


def test_a_model_that_is_given_may_be_probed_inside_a_block(tiny_models: Any) -> None:
    model = LanguageModel("gpt2", model=tiny_models["gpt2"])  # its card is first asked for by lm_head
    with model.trace() as tracer, tracer.invoke(IDS):
        logits = model.lm_head.output.save()
    assert len(tracer.graph.nodes) == 2
    torch.testing.assert_close(logits, forward(tiny_models["gpt2"], torch.tensor(IDS)).logits)


def test_a_given_model_is_probed_inside_the_block_of_another(
    model: Any, plain: Any, tiny_models: Any
) -> None:
    with model.trace(IDS) as tracer:
        other = LanguageModel("neox", model=tiny_models["gpt_neox"], dispatch=True)
        h = model.model.layers[0].output.save()
        ones = torch.ones(32)  # the user's own factories are recorded as before
        (h + ones).save()
    assert other.config.num_hidden_layers == 2
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "save", "torch.ones", "torch.add", "save"]
    assert torch.equal(h, capture(plain, torch.tensor(IDS), "model.layers.0"))


def test_a_bfloat16_model_gives_bfloat16_tensors(tiny_folders: dict[str, Path]) -> None:
    model = LanguageModel(tiny_folders["llama"], dtype=torch.bfloat16)
    with model.trace(IDS):
        h = model.model.layers[0].output
        assert h.dtype is torch.bfloat16
        h += torch.ones(32)
        h.save()
    assert h.dtype is torch.bfloat16


def test_real_text_is_tokenized_and_its_shapes_are_exact(smollm2: Path) -> None:
    model = LanguageModel(smollm2)
    text = "The Eiffel Tower is in the city of"
    ids = model.tokenizer(text)["input_ids"]
    with model.trace(text) as tracer:
        assert model.model.layers[3].output.shape == (1, len(ids), 576)
        top = model.lm_head.output[0, -1].argmax().save()
    assert model.tokenizer.decode(top) == " Paris"
    assert tracer.graph.regions[0].invokes[0].input == text

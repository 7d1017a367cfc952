"""Parameters and buffers of modules as values: copies of what the model has, and never the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid
from experiments import at
from pellucid_shared.errors import GraphError, RecordingError, UnknownModuleError
from pellucid_shared.graph import PARAM
from pellucid_shared.lint import lint
from pellucid_shared.show import show
from references import capture, forward
from tiny_models import NAMES

IDS = [[5, 9, 31, 7, 22, 40]]
SHORT = [[7, 8, 9]]


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}


@pytest.fixture
def llama(models: Any) -> Any:
    return models["llama"]


@pytest.fixture
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_buffer_comes_back_as_it_is(models: Any, tiny_models: Any, name: str) -> None:
    model, saved = models[name], {}
    with model.trace(IDS):
        for path, value in model.named_parameters():
            saved[path] = value.save()
            assert value.shape == tiny_models[name].get_parameter(path).shape
        buffers = {}
        for path, buffer in tiny_models[name].named_buffers():
            module, _, own = path.rpartition(".")
            buffers[path] = getattr(at(model, module), own).save(), buffer
    wanted = dict(tiny_models[name].named_parameters(remove_duplicate=False))
    assert saved.keys() == wanted.keys()
    for path, parameter in wanted.items():
        assert type(saved[path]) is torch.Tensor
        assert not saved[path].requires_grad
        assert torch.equal(saved[path], parameter)
        assert saved[path].data_ptr() != parameter.data_ptr()
    for found, buffer in buffers.values():
        assert torch.equal(found, buffer)


def test_a_parameter_is_used_in_ops_and_in_writes(llama: Any, plain: Any) -> None:
    with llama.trace() as tracer:
        saved = []
        for ids in (IDS, SHORT):
            with tracer.invoke(ids):
                h = llama.layers[1].output
                saved.append((h @ llama.layers[0].mlp.up_proj.weight.T).save())
                llama.layers[1].output[:, -1] = llama.embed_tokens.weight[5]
                saved.append(llama.lm_head.output[:, -1].save())
    weight = plain.model.layers[0].mlp.up_proj.weight
    for place, ids in enumerate((IDS, SHORT)):
        found, logits = saved[2 * place : 2 * place + 2]
        torch.testing.assert_close(found, capture(plain, torch.tensor(ids), "model.layers.1") @ weight.T)

        def patched(h: torch.Tensor) -> torch.Tensor:
            h = h.clone()
            h[:, -1] = plain.model.embed_tokens.weight[5]
            return h

        wanted = forward(plain, torch.tensor(ids), after={"model.layers.1": patched}).logits[:, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


def test_edits_reach_neither_the_model_nor_anyone_else(llama: Any, plain: Any) -> None:
    before = {path: p.clone() for path, p in plain.named_parameters()}
    with llama.trace(IDS):
        weight = llama.norm.weight
        other = llama.norm.weight.save()
        weight[:] = 7
        view = llama.lm_head.weight[3]
        view *= 0
        rows = llama.lm_head.weight[3].save()
        logits = llama.lm_head.output.save()
        edited = weight.save()
        llama.norm.output = llama.norm.weight.expand(1, 6, 32).clone()
        llama.norm.output[:] = 3
    assert torch.equal(edited, torch.full((32,), 7.0))
    assert torch.equal(other, before["model.norm.weight"])
    assert torch.equal(rows, before["lm_head.weight"][3])
    assert all(torch.equal(p, before[path]) for path, p in plain.named_parameters())
    head = before["lm_head.weight"]
    torch.testing.assert_close(logits, torch.full((1, 6, 32), 3.0) @ head.T)


def test_a_written_parameter_is_not_the_models(llama: Any, plain: Any) -> None:
    """What edits the value in the model, or by way of the site, edits a copy."""
    before = plain.model.embed_tokens.weight.clone()
    with llama.trace([[1]]):
        llama.layers[0].output = llama.embed_tokens.weight[:1].unsqueeze(0)
        llama.layers[0].output[:] = 0
        llama.lm_head.output.save()
    assert torch.equal(plain.model.embed_tokens.weight, before)


def test_what_the_model_does_to_a_written_parameter_it_does_to_a_copy(llama: Any, plain: Any) -> None:
    _ = llama.card
    before = plain.model.embed_tokens.weight.clone()

    def spoil(module: Any, args: Any) -> None:
        args[0].zero_()

    handle = plain.model.layers[1].register_forward_pre_hook(spoil)
    with llama.trace([[1]]):
        llama.layers[0].output = llama.embed_tokens.weight[:1].unsqueeze(0)
        llama.lm_head.output.save()
    handle.remove()
    assert torch.equal(plain.model.embed_tokens.weight, before)


def test_what_was_saved_is_not_the_models(llama: Any, plain: Any) -> None:
    before = plain.lm_head.weight.clone()
    with llama.trace(IDS):
        whole = llama.lm_head.weight.save()
        view = llama.lm_head.weight.T.save()
    whole.zero_()
    view.zero_()
    assert torch.equal(plain.lm_head.weight, before)


def test_tied_weights_are_read_by_either_name() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    tied = AutoModelForCausalLM.from_config(config).eval()
    model: Any = pellucid.LanguageModel("tied", model=tied)
    with model.trace(IDS[0][:3]):
        one, two = model.lm_head.weight.save(), model.embed_tokens.weight.save()
        edited = model.lm_head.weight
        edited[:] = 0
        logits = model.lm_head.output.save()
        names = [name for name, _ in model.named_parameters()]
    assert torch.equal(one, tied.lm_head.weight)
    assert torch.equal(two, one)
    assert torch.equal(logits, forward(tied, torch.tensor([IDS[0][:3]])).logits)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)


def test_names_are_those_of_torch(llama: Any, plain: Any) -> None:
    with llama.trace(IDS):
        names = [name for name, _ in llama.layers[0].named_parameters()]
        assert len(list(llama.layers[0].parameters())) == len(names)
        llama.layers[0].output.save()
    assert names == [name for name, _ in plain.model.layers[0].named_parameters()]
    assert {"weight", "bias"} & set(dir(llama.lm_head)) == {"weight"}


def test_a_parameter_needs_no_pass(llama: Any, plain: Any) -> None:
    assert llama.card  # probed before the hook is there
    runs: list[int] = []
    handle = plain.register_forward_pre_hook(lambda *_: runs.append(1))
    with llama.trace(IDS):
        norms = llama.lm_head.weight.norm(dim=-1).save()
    handle.remove()
    assert runs == []
    torch.testing.assert_close(norms, plain.lm_head.weight.detach().norm(dim=-1))


def test_mistakes_are_named(llama: Any) -> None:
    with llama.trace(IDS):
        match = r"no module or parameter 'lm_head.wieght'. Nearest: lm_head.weight"
        with pytest.raises(UnknownModuleError, match=match):
            _ = llama.lm_head.wieght
        with pytest.raises(UnknownModuleError, match=r"'model.layers.0.mlp.up_porj'. Nearest: .*mlp.up_proj"):
            _ = llama.layers[0].mlp.up_porj
        with pytest.raises(RecordingError, match=r"lm_head.weight cannot be assigned"):
            llama.lm_head.weight = 3
        llama.lm_head.output.save()
    with pytest.raises(RecordingError, match=r"test_parameters.py:\d+: .* none is open here"):
        _ = llama.lm_head.weight


def test_a_read_prints_and_reads_back_and_is_checked(llama: Any) -> None:
    with llama.trace(IDS) as tracer:
        llama.lm_head.weight.save()
    graph = tracer.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    assert "v0 = lm_head.weight\n" in show(graph)
    [read, saved] = graph.nodes
    engine = llama._target(None).engine
    from dataclasses import replace

    from pellucid_shared.wire import TokenizedInvoke

    assert read.op == PARAM
    wrong = replace(graph, nodes=(replace(read, args=(read.args[0], "bias")), saved))
    with pytest.raises(UnknownModuleError, match=r"lm_head has no parameter 'bias'. It has weight"):
        engine.run(wrong, [TokenizedInvoke(ids=IDS)], {})
    with pytest.raises(GraphError, match="a module and a name"):
        lint(replace(graph, nodes=(replace(read, args=(read.args[0], 3)), saved)))
    with pytest.raises(GraphError, match="takes a module first"):
        lint(replace(graph, nodes=(replace(read, args=("lm_head", "weight")), saved)))

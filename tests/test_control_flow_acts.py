"""Branches and loops around what is no plain read or write: logs, skips, stops, originals, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid
from pellucid_shared.errors import GradientError, GraphError, SiteError
from references import capture, forward

IDS = [[5, 9, 31, 7, 22, 40]]
SHORT = [[7, 8, 9]]


@pytest.fixture(scope="module")
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


def lines(capsys: Any) -> list[str]:
    return [line.split("] ", 1)[-1] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("holds", [True, False])
def test_a_branch_logs_where_it_runs(model: Any, capsys: Any, holds: bool) -> None:
    with model.trace(IDS) as tracer:
        flag = model.model.layers[0].output.abs().sum() > (0 if holds else 1e9)
        with tracer.cond(flag):
            tracer.log("then")
        with tracer.cond.else_():
            tracer.log("else")
    (line,) = lines(capsys)
    assert line.endswith("then" if holds else "else")


def test_a_loop_logs_turn_by_turn_with_its_number(model: Any, capsys: Any) -> None:
    with model.trace(IDS) as tracer, tracer.loop(3) as i:
        tracer.log("turn", i)
    assert [line[-6:] for line in lines(capsys)] == ["turn 0", "turn 1", "turn 2"]


def test_a_loop_of_a_session_logs_between_its_traces(model: Any, capsys: Any) -> None:
    with model.session() as session, session.loop(2) as i:
        with model.trace(IDS):
            model.lm_head.output.save()
        session.log("turn", i)
    assert [line[-6:] for line in lines(capsys)] == ["turn 0", "turn 1"]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("beside", [False, True])
def test_a_layer_is_skipped_where_the_branch_runs(model: Any, plain: Any, holds: bool, beside: bool) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            hidden = model.model.layers[0].output
            with tracer.cond(hidden.abs().sum() > (0 if holds else 1e9)):
                model.model.layers[1].skip(hidden)
            got = model.lm_head.output.save()
        if beside:
            with tracer.invoke(SHORT):
                other = model.lm_head.output.save()
    layer = plain.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, args, _o: args[0]) if holds else None
    want = forward(plain, torch.tensor(IDS)).logits
    if handle is not None:
        handle.remove()
    assert torch.allclose(got, want, atol=1e-5)
    if beside:
        assert torch.allclose(other, forward(plain, torch.tensor(SHORT)).logits, atol=1e-5)


@pytest.mark.parametrize("holds", [True, False])
def test_two_branches_skip_one_layer_each_its_way(model: Any, plain: Any, holds: bool) -> None:
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        with tracer.cond(hidden.abs().sum() > (0 if holds else 1e9)):
            model.model.layers[1].skip(hidden)
        with tracer.cond.else_():
            model.model.layers[1].skip(hidden * 2)
        got = model.model.layers[1].output.save()
    seen = capture(plain, torch.tensor(IDS), "model.layers.0")
    assert torch.allclose(got, seen if holds else seen * 2, atol=1e-5)


def test_nothing_is_read_inside_what_a_branch_skips(model: Any) -> None:
    with pytest.raises(SiteError, match="which is skipped"), model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        with tracer.cond(hidden.sum() > 0):
            model.model.layers[1].skip(hidden)
        model.model.layers[1].mlp.output.save()


def test_an_original_is_read_in_a_branch(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        hidden[:] = 0
        with tracer.cond(hidden.sum() < 1):
            got = hidden.original.save()
    assert torch.equal(got, capture(plain, torch.tensor(IDS), "model.layers.0"))


def test_parameters_in_a_loop(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        loop = tracer.loop(3)
        total = loop.carry(torch.zeros(()))
        with loop:
            total.set(total.value + model.model.norm.weight.sum())
        got = total.value.save()
    assert torch.allclose(got, 3 * plain.model.norm.weight.sum())


def test_a_pass_is_not_stopped_in_a_branch(model: Any) -> None:
    with pytest.raises(GraphError, match="stop stands in no branch"), model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output.save()
        with tracer.cond(hidden.sum() > 0):
            tracer.stop()


def test_gradients_are_taken_behind_branches_and_loops(model: Any, plain: Any) -> None:
    with pytest.raises(GradientError, match="not taken inside a branch"), model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        with tracer.loop(2):
            model.lm_head.output.sum().backward()
            hidden.grad.save()
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        loss = model.lm_head.output.pow(2).sum()
        got = hidden.grad.save()
        loop = tracer.loop(3)
        total = loop.carry(torch.zeros(()))
        with loop as i, tracer.cond(i > 0):
            total.set(total.value + loss)
        chosen = tracer.select(loss > 0, total.value, loss)
        chosen.backward()
    kept: list[torch.Tensor] = []
    handle = plain.model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out) or None)
    with torch.enable_grad():
        embedded = plain.get_input_embeddings()(torch.tensor(IDS)).detach().requires_grad_()
        logits = plain(inputs_embeds=embedded).logits
    handle.remove()
    (want,) = torch.autograd.grad(2 * logits.pow(2).sum(), kept)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("holds", [True, False])
def test_gradients_pass_an_edit_of_a_branch(model: Any, plain: Any, holds: bool) -> None:
    with model.trace(IDS) as tracer:
        first = model.model.layers[0].output
        hidden = model.model.layers[1].output
        with tracer.cond(first.abs().sum() > (0 if holds else 1e9)):
            hidden[:] = hidden * 3
        model.lm_head.output.pow(2).sum().backward()
        got = first.grad.save()
    kept: list[torch.Tensor] = []
    handles = [plain.model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out) or None)]
    if holds:
        handles.append(plain.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 3))
    with torch.enable_grad():
        embedded = plain.get_input_embeddings()(torch.tensor(IDS)).detach().requires_grad_()
        logits = plain(inputs_embeds=embedded).logits
    for handle in handles:
        handle.remove()
    (want,) = torch.autograd.grad(logits.pow(2).sum(), kept)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("holds", [True, False])
def test_a_branch_edits_the_whole_batch(model: Any, plain: Any, holds: bool) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = model.lm_head.output.save()
        with tracer.invoke(SHORT):
            second = model.lm_head.output.save()
        with tracer.invoke():
            hidden = model.model.layers[0].output
            with tracer.cond(hidden.abs().sum() > (0 if holds else 1e9)):
                hidden[:] = hidden * 2
    handle = plain.model.layers[0].register_forward_hook(lambda _m, _a, out: out * 2 if holds else out)
    wants = forward(plain, torch.tensor(IDS)).logits, forward(plain, torch.tensor(SHORT)).logits
    handle.remove()
    assert torch.allclose(first, wants[0], atol=1e-5)
    assert torch.allclose(second, wants[1], atol=1e-5)


def test_branches_in_traces_of_an_edited_model(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        edited.model.layers[0].output[:] = edited.model.layers[0].output * 2
    with edited.trace(IDS) as tracer:
        hidden = edited.model.layers[0].output
        with tracer.cond(hidden.abs().sum() > 0):
            got = (hidden + 1).save()
    assert torch.allclose(got, capture(plain, torch.tensor(IDS), "model.layers.0") * 2 + 1, atol=1e-5)

"""Several traces as one job: values flow between them, and each means what plain hooks mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid
from generating import generate
from pellucid_shared.errors import GraphError, InputError, RecordingError, ValueNotReadyError
from references import capture, first, forward, with_first

A, B = [[5, 9, 31, 7, 22, 40]], [[11, 3, 8, 12]]


@pytest.fixture(scope="module")
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


def test_a_value_of_one_trace_is_written_in_the_next(model: Any, plain: Any) -> None:
    with model.session() as session:
        with session.trace(A):
            hidden = model.layers[0].output[:, -1]
        with model.trace(B):
            model.layers[0].output[:, -1] = hidden
            logits = model.lm_head.output.save()

    other = capture(plain, torch.tensor(A), "model.layers.0")[:, -1]

    def patched(output: Any) -> Any:
        h = first(output).clone()
        h[:, -1] = other
        return with_first(output, h)

    wanted = forward(plain, torch.tensor(B), after={"model.layers.0": patched}).logits
    torch.testing.assert_close(logits, wanted)


def test_an_edit_of_one_trace_is_gone_in_the_next(model: Any, plain: Any) -> None:
    with model.session():
        with model.trace(A):
            model.layers[0].output[:] = 0
            changed = model.lm_head.output.save()
        with model.trace(A):
            logits = model.lm_head.output.save()
    wanted = forward(plain, torch.tensor(A)).logits
    torch.testing.assert_close(logits, wanted)
    assert not torch.equal(changed, wanted)


def test_traces_and_generations_mix(model: Any, plain: Any) -> None:
    with model.session() as session:
        with model.generate(A, max_new_tokens=3, eos_token_id=[]) as tracer:
            ids = tracer.result.save()
        with session.trace() as tracer:
            with tracer.invoke(A):
                one = model.layers[1].output.mean()
            with tracer.invoke(B):
                both = (one + model.layers[1].output.mean()).save()
        total = (both * 2 + ids.sum()).save()
    wanted_ids = generate(plain, torch.tensor(A), max_new_tokens=3, eos_token_id=None)
    means = [capture(plain, torch.tensor(ids), "model.layers.1").mean() for ids in (A, B)]
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(both, means[0] + means[1])
    torch.testing.assert_close(total, 2 * (means[0] + means[1]) + wanted_ids.sum())


def test_a_sum_over_many_traces(model: Any, plain: Any) -> None:
    prompts = [[[i, i + 1, i + 2]] for i in range(3, 40, 4)]
    with model.session():
        total: Any = 0
        for prompt in prompts:
            with model.trace(prompt):
                total = total + model.layers[0].output[:, -1]
        total.save()
    wanted = sum(capture(plain, torch.tensor(p), "model.layers.0")[:, -1] for p in prompts)
    torch.testing.assert_close(total, wanted)


def test_saved_names_are_filled_where_the_session_ends(model: Any) -> None:
    with model.session():
        with model.trace(A):
            hidden = model.layers[0].output.save()
        with pytest.raises(ValueNotReadyError, match="does not exist before the block ends"):
            _ = hidden.value
    assert type(hidden) is torch.Tensor


def test_each_trace_has_its_own_seed(model: Any) -> None:
    with model.session():
        with model.trace(A, seed=1):
            one = torch.randn(3).save()
        with model.trace(A, seed=2):
            two = torch.randn(3).save()
    assert torch.equal(one, torch.randn(3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(two, torch.randn(3, generator=torch.Generator().manual_seed(2)))


def test_mistakes_are_named(model: Any) -> None:
    with model.session():
        with pytest.raises(RecordingError, match="a site belongs to a trace"):
            _ = model.layers[0].output
        with model.trace(A):
            with pytest.raises(RecordingError, match="cannot be opened inside another"), model.trace(B):
                pass
            model.layers[0].output.save()
    with pytest.raises(InputError, match="this trace has no input"), model.session(), model.trace():
        pass
    with pytest.raises(RecordingError, match="a session's first value comes from a trace"), model.session():
        torch.zeros(3).save()
    with pytest.raises(RecordingError, match="this session holds no trace"), model.session():
        pass
    with pytest.raises(ZeroDivisionError), model.session(), model.trace(A):
        hidden = model.layers[0].output.save()
        _ = 1 / 0
    with pytest.raises(ValueNotReadyError, match="the block ended with ZeroDivisionError"):
        _ = hidden.value


def test_the_graph_of_a_session_prints_and_reads_back(model: Any) -> None:
    with model.session() as session:
        with model.generate(A, max_new_tokens=3, seed=5) as tracer, tracer.iter[1:]:
            model.layers[0].output.save("h")
        with model.trace(B):
            model.layers[0].output.save()
    graph = session.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    from pellucid_shared.show import show

    assert show(graph) == (
        'generate(max_new_tokens=3) "llama", seed 5:\n'
        "    invoke 0: [[5, 9, 31, 7, 22, 40]]\n"
        "    for each step of 1::\n"
        "        v0 = model.layers.0.output\n"
        "        save(v0, 'h')\n"
        'trace "llama":\n'
        "    invoke 0: [[11, 3, 8, 12]]\n"
        "    v2 = model.layers.0.output\n"
        "    save(v2, 'saved_1')\n"
    )


def test_a_failing_trace_fails_the_session_and_names_its_line(model: Any) -> None:
    with pytest.raises(GraphError, match=r"test_session.py:\d+"), model.session(), model.trace(A):
        model.layers[0].output = torch.zeros(1, 2, 3)

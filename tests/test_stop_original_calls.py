"""``tracer.stop()``, ``.original``, and single calls of a module, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pellucid
from experiments import at
from pellucid_shared.errors import GraphError, IndexOutOfRangeError, OrderError, RecordingError, SiteError
from pellucid_shared.lint import lint
from pellucid_shared.show import show
from references import capture, first, forward
from tiny_models import NAMES

IDS = [[5, 9, 31, 7, 22, 40]]
BATCH = [[11, 3, 8, 12], [4, 15, 16, 7]]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
NO_EOS: dict[str, Any] = {"eos_token_id": []}


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}


@pytest.fixture
def llama(models: Any) -> Any:
    return models["llama"]


@pytest.fixture
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


def ran(plain: Any, body: Callable[[], None]) -> list[int]:
    """Which layers the model runs while ``body`` does, in order."""
    seen: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
        for i, layer in enumerate(plain.model.layers)
    ]
    try:
        body()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- stop --------------------------------------------------------------------------------------------------


def test_what_was_saved_before_is_returned_and_no_more_runs(llama: Any, plain: Any) -> None:
    _ = llama.card
    found: dict[str, Any] = {}

    def body() -> None:
        with llama.trace(IDS) as tracer:
            h = llama.layers[0].output
            found["h"] = h.save()
            tracer.stop()
            found["twice"] = (h * 2 + llama.layers[0].mlp.output).save()

    assert ran(plain, body) == [0]
    wanted = capture(plain, torch.tensor(IDS), "model.layers.0")
    assert torch.equal(found["h"], wanted)
    mlp = capture(plain, torch.tensor(IDS), "model.layers.0.mlp")
    assert torch.equal(found["twice"], wanted * 2 + mlp)


def test_nothing_after_it_touches_a_later_site(llama: Any) -> None:
    late = "comes after tracer.stop.., which ends the pass after model.layers.0.output; take it before"
    for touch in (
        lambda: llama.layers[1].output.save(),
        lambda: setattr(llama.layers[1], "output", 0),
        lambda: llama.layers[1].skip(0),
        lambda: llama.lm_head.output.original.save(),
    ):
        with pytest.raises(OrderError, match=rf"calls.py:\d+: .*{late}"), llama.trace(IDS) as tracer:
            llama.layers[0].output.save()
            tracer.stop()
            touch()
    with pytest.raises(OrderError, match="ends the pass before it begins"), llama.trace(IDS) as tracer:
        tracer.stop()
        llama.embed_tokens.output.save()


def test_it_ends_the_pass_of_its_own_input_alone(llama: Any, plain: Any) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(IDS):
            one = llama.layers[0].output.save()
            tracer.stop()
        with tracer.invoke(BATCH):
            two = llama.lm_head.output.save()
    assert torch.equal(one, capture(plain, torch.tensor(IDS), "model.layers.0"))
    torch.testing.assert_close(two, forward(plain, torch.tensor(BATCH)).logits, atol=1e-5, rtol=1e-4)


def test_in_a_session_only_its_trace_stops(llama: Any, plain: Any) -> None:
    with llama.session():
        with llama.trace(IDS) as tracer:
            h = llama.layers[0].output
            tracer.stop()
        with llama.trace(IDS):
            llama.layers[0].output = h * 2
            logits = llama.lm_head.output.save()
    wanted = forward(plain, torch.tensor(IDS), after={"model.layers.0": lambda h: first(h) * 2}).logits
    assert torch.equal(logits, wanted)


def test_a_generation_takes_no_further_step(llama: Any, plain: Any) -> None:
    _ = llama.card
    found: list[Any] = []

    def body() -> None:
        with llama.generate(IDS, max_new_tokens=6, **NO_EOS) as tracer:
            for step in tracer.iter[:]:
                found.append(llama.layers[0].output.save())
                if step == 2:
                    tracer.stop()
                    break

    assert ran(plain, body) == [0, 1, 0, 1, 0]
    assert [h.shape[1] for h in found] == [6, 1, 1]
    with pytest.raises(OrderError, match=r"\(step 1\) comes after tracer.stop"):
        with llama.generate(IDS, max_new_tokens=3) as tracer, tracer.all():
            llama.layers[0].output.save()
            tracer.stop()
    with pytest.raises(OrderError, match=r"what a generation ends with comes after .*max_new_tokens="):
        with llama.generate(IDS, max_new_tokens=3) as tracer:
            llama.layers[0].output.save()
            tracer.stop()
            tracer.result.save()


def test_a_stop_stands_in_the_body_of_an_input(llama: Any) -> None:
    with pytest.raises(RecordingError, match="belongs to one input"), llama.trace() as tracer:
        with tracer.invoke(IDS):
            llama.layers[0].output.save()
        tracer.stop()


def test_a_stop_prints_and_reads_back_and_is_checked(llama: Any) -> None:
    with llama.trace(IDS) as tracer:
        llama.layers[0].output.save()
        tracer.stop()
    graph = tracer.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    assert show(graph).endswith("    stop()\n")
    stop = graph.nodes[-1]
    wrong = replace(stop, args=(replace(stop.site, kind="output"),))
    with pytest.raises(GraphError, match="tied to where a pass begins"):
        lint(replace(graph, nodes=(*graph.nodes[:-1], wrong)))


# --- original ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_value_before_every_edit(models: Any, tiny_models: Any, name: str) -> None:
    model, path = models[name], f"{LAYERS.get(name, 'model.layers')}.1"
    saved = []
    with model.trace() as tracer:
        for ids in (IDS, BATCH):
            with tracer.invoke(ids):
                layer = at(model, path)
                h = layer.output
                early = layer.output.original.save()
                h[:, -1] = 0
                layer.output = layer.output * 3
                layer.output += 1
                late = layer.output.original.save()
                by_value = h.original.save()
                now = layer.output.save()
                inside = layer.mlp.input.original.save()
                saved.append((early, late, by_value, now, inside))
    for ids, (early, late, by_value, now, inside) in zip((IDS, BATCH), saved, strict=True):
        wanted = capture(tiny_models[name], torch.tensor(ids), path)
        for found in (early, late, by_value):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        edited = wanted.clone()
        edited[:, -1] = 0
        torch.testing.assert_close(now, edited * 3 + 1, atol=1e-5, rtol=1e-4)
        mlp = capture(tiny_models[name], torch.tensor(ids), f"{path}.mlp", "input")
        torch.testing.assert_close(inside, mlp, atol=1e-5, rtol=1e-4)


def test_an_original_is_a_copy_and_shows_edits_made_upstream(llama: Any, plain: Any) -> None:
    with llama.trace(IDS):
        mine = llama.layers[0].output.original
        mine[:] = 9
        llama.layers[0].output[:] *= 2
        passed_on = llama.layers[1].input.original.save()
        logits = llama.lm_head.output.save()
        mine.save()
    assert torch.equal(mine, torch.full((1, 6, 32), 9.0))
    wanted = capture(plain, torch.tensor(IDS), "model.layers.0") * 2
    assert torch.equal(passed_on, wanted)
    reference = forward(plain, torch.tensor(IDS), after={"model.layers.0": lambda h: first(h) * 2}).logits
    assert torch.equal(logits, reference)


def test_an_original_alone_needs_the_edits_before_it(llama: Any, plain: Any) -> None:
    with llama.trace(IDS):
        llama.layers[0].output = llama.layers[0].output * 2
        later = llama.layers[1].output.original.save()
    twice = {"model.layers.0": lambda h: first(h) * 2}
    assert torch.equal(later, capture(plain, torch.tensor(IDS), "model.layers.1", after=twice))


def test_originals_of_structures_and_of_steps(llama: Any, plain: Any) -> None:
    with llama.generate(IDS, max_new_tokens=3, **NO_EOS) as tracer, tracer.all():
        attention = llama.layers[0].self_attn
        before = attention.output.original.save()
        attention.output[0][:] = 0
        after = attention.output[0].save()
    from generating import generate

    seen: list[torch.Tensor] = []

    def zeroed(step: int, h: torch.Tensor) -> torch.Tensor:
        seen.append(h.clone())
        return torch.zeros_like(h)

    hooks = {"model.layers.0.self_attn": zeroed}
    generate(plain, torch.tensor(IDS), at=hooks, max_new_tokens=3, eos_token_id=None)
    for step, wanted in enumerate(seen):
        assert before[step][1] is None
        torch.testing.assert_close(before[step][0], wanted, atol=1e-5, rtol=1e-4)
        assert not after[step].any()


def test_only_a_sites_own_value_has_an_original(llama: Any) -> None:
    match = r"calls.py:\d+: getitem is no site's own value"
    with pytest.raises(RecordingError, match=match), llama.trace(IDS):
        _ = llama.layers[0].output[:, -1].original
    with pytest.raises(RecordingError, match="result is no site's own value"):
        with llama.generate(IDS, max_new_tokens=2) as tracer:
            _ = tracer.result.original
    with pytest.raises(RecordingError, match="was read in another body"):
        with llama.generate(IDS, max_new_tokens=2) as tracer:
            h = llama.layers[0].output
            with tracer.all():
                _ = h.original


def test_an_original_prints_and_reads_back(llama: Any) -> None:
    with llama.trace(IDS) as tracer:
        llama.layers[0].output.original.save()
    assert pellucid.Graph.from_json(tracer.graph.to_json()) == tracer.graph
    assert "= original(model.layers.0.output)\n" in show(tracer.graph)


# --- calls -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_layer() -> Any:
    """Three layers, the second of which is the first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    found = LlamaForCausalLM(config).eval()
    found.model.layers[1] = found.model.layers[0]
    return found


@pytest.fixture(scope="module")
def twice(shared_layer: Any) -> Any:
    return pellucid.LanguageModel("twice", model=shared_layer)


def on_call(number: int, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], Any]:
    """A hook that acts in one call of its module."""
    count = iter(range(10**6))

    def after(output: Any) -> Any:
        return change(first(output)) if next(count) == number else None

    return after


def in_call(plain: Any, ids: Any, path: str, number: int) -> torch.Tensor:
    """What a module returns in one of its calls."""
    seen: list[torch.Tensor] = []
    forward(plain, torch.tensor(ids), after={path: on_call(number, lambda h: seen.append(h.clone()))})
    return seen[0]


@pytest.mark.parametrize("prompts", [[IDS], [IDS, BATCH]], ids=["one", "two"])
def test_each_call_is_read_and_written(twice: Any, shared_layer: Any, prompts: Any) -> None:
    layer, saved = twice.layers[0], []
    assert len(layer.calls) == len(layer.mlp.calls) == 2
    assert len(twice.lm_head.calls) == 1
    with twice.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                plainly, one, two = layer.output.save(), layer.calls[0].output.save(), layer.calls[-1].input
                layer.calls[1].output[:, -1] = 0
                inner = layer.mlp.calls[1].output.save()
                saved.append((plainly, one, two.save(), inner, twice.lm_head.output.save()))
    for ids, (plainly, one, two, inner, logits) in zip(prompts, saved, strict=True):
        once = in_call(shared_layer, ids, "model.layers.0", 0)
        inside = in_call(shared_layer, ids, "model.layers.0.mlp", 1)
        for found, wanted in (
            (plainly, once),
            (one, once),
            (two, once),
            (inner, inside),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

        def patched(h: torch.Tensor) -> torch.Tensor:
            h = h.clone()
            h[:, -1] = 0
            return h

        reference = forward(shared_layer, torch.tensor(ids), after={"model.layers.0": on_call(1, patched)})
        torch.testing.assert_close(logits, reference.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_one_call_is_skipped_and_the_other_runs(twice: Any, shared_layer: Any, number: int) -> None:
    layer, saved = twice.layers[0], []
    with twice.trace() as tracer:
        for ids in (IDS, BATCH):
            with tracer.invoke(ids):
                layer.calls[number].skip(layer.calls[number].input * 2)
                inner = layer.mlp.calls[1 - number].output.save()
                saved.append((inner, twice.lm_head.output.save()))
    for ids, (inner, logits) in zip((IDS, BATCH), saved, strict=True):
        wanted, mlp = with_one_call_skipped(shared_layer, ids, number)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(inner, mlp, atol=1e-5, rtol=1e-4)


def with_one_call_skipped(plain: Any, ids: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where one call of the shared layer gives twice its input; its MLP's output in the other."""
    taken: list[torch.Tensor] = []
    mlps: list[torch.Tensor] = []
    after = {
        "model.layers.0": on_call(number, lambda h: taken[-1] * 2),
        "model.layers.0.mlp": on_call(1 - number, lambda h: mlps.append(h.clone())),
    }
    before = {"model.layers.0": lambda args, kwargs: taken.append(args[0].clone())}
    logits = forward(plain, torch.tensor(ids), before=before, after=after).logits
    return logits, mlps[0]


def test_what_is_inside_a_skipped_call_is_not_there(twice: Any) -> None:
    layer = twice.layers[0]
    with pytest.raises(SiteError, match=r"mlp.output \(call 1\) is inside model.layers.0"), twice.trace(IDS):
        layer.calls[1].skip(0)
        layer.mlp.calls[1].output.save()


def test_errors_say_how_often_a_module_is_called(twice: Any) -> None:
    with twice.trace(IDS):
        with pytest.raises(IndexOutOfRangeError, match=r"calls.py:\d+: .* called 2 times .* call 2 was"):
            _ = twice.layers[0].calls[2].output
        with pytest.raises(IndexOutOfRangeError, match="lm_head is called once in a pass; call -2 was asked"):
            _ = twice.lm_head.calls[-2]
        with pytest.raises(IndexOutOfRangeError, match=r"model.layers is never called in a pass"):
            _ = twice.model.layers.calls[0]
        twice.lm_head.output.save()
    assert twice.layers[0].calls[1] != twice.layers[0]
    assert twice.layers[0].calls[0] == twice.layers[0]


def test_a_call_prints_and_reads_back(twice: Any) -> None:
    with twice.trace(IDS) as tracer:
        [call.output.save() for call in twice.layers[0].calls]
    assert pellucid.Graph.from_json(tracer.graph.to_json()) == tracer.graph
    assert "v2 = model.layers.0.output (call 1)\n" in show(tracer.graph)

"""cache, save_all, apply, barrier, scan, runs without a block; more of what they compute in
test_experiments.py."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from client_fixtures import CardModel
from pellucid import LanguageModel
from pellucid_shared.errors import (
    IndexOutOfRangeError,
    InputError,
    OrderError,
    PellucidError,
    RecordingError,
    SiteError,
    UnknownModuleError,
    ValueNotReadyError,
)
from pellucid_shared.graph import Graph
from references import capture

IDS = [[5, 9, 31, 7]]


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: PreTrainedModel) -> Any:
    return LanguageModel("llama", model=plain, rename={"model.layers": "blocks"})


# --- cache and save_all ------------------------------------------------------------------------------------


def test_a_cache_is_a_mapping_and_is_walked_as_the_model_is(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache()
    path = "model.layers.1.mlp"
    wanted = capture(plain, torch.tensor(IDS), path)
    for entry in (
        cache[path],
        cache["blocks.1.mlp"],
        cache["layers.1.mlp"],
        cache.model.layers[1].mlp,
        cache.blocks[1].mlp,
        cache.layers["1"].mlp,
    ):
        assert torch.equal(entry.output, wanted)
        assert type(entry.output) is torch.Tensor
    assert path in cache
    assert "blocks.1.mlp" in cache
    assert "nothing" not in cache
    called = {c.module for c in model.card.prefill}
    assert set(cache) == called
    assert len(cache) == len(called) == len(dict(cache))
    assert repr(cache).startswith(f"<cache of {len(called)} modules: the model, ")
    assert repr(cache[path]) == f"<cached {path}: output>"


def test_a_cache_of_some_modules_has_these(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        some = tracer.cache(modules=[model.blocks[0], "model.layers.1.mlp"], include_inputs=True)
        one = tracer.cache(model.lm_head)
    assert list(some) == ["model.layers.0", "model.layers.1.mlp"]
    assert torch.equal(some["blocks.0"].input, capture(plain, torch.tensor(IDS), "model.layers.0", "input"))
    assert torch.equal(some["blocks.0"].inputs[0][0], some["blocks.0"].input)
    assert list(one) == ["lm_head"]
    assert {n.site.module for n in tracer.graph.nodes if n.op == "site.get"} == {
        "model.layers.0",
        "model.layers.1.mlp",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (["h.9"], UnknownModuleError, "m has no module 'h.9'"),
        (["unused"], SiteError, "unused is never called, so there is nothing to cache"),
        ([3], InputError, "modules or their paths, found 3"),
    ],
)
def test_a_cache_of_what_is_not_there_is_refused(
    modules: Any, error: type[PellucidError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught, CardModel().trace("hello") as tracer:
        tracer.cache(modules=modules)
    assert str(caught.value).startswith(f"{__file__}:")


def test_a_cache_says_when_it_is_filled_and_what_it_has(model: Any) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["lm_head"])
        with pytest.raises(ValueNotReadyError, match="filled when the body it was asked for in ends"):
            _ = cache["lm_head"]
    with pytest.raises(UnknownModuleError, match=r"nothing is cached of 'model.norm'; cached are lm_head"):
        _ = cache["model.norm"]
    with pytest.raises(SiteError, match=r"no output of model.norm is cached: cached are lm_head"):
        _ = cache.model.norm.output
    with pytest.raises(SiteError, match=r"no inputs of lm_head is cached: .* include_inputs=True"):
        _ = cache.lm_head.input
    with pytest.raises(UnknownModuleError, match="no module 'nomr' below model") as caught:
        _ = cache.model.nomr
    assert str(caught.value).startswith(f"{__file__}:")
    with pytest.raises(RecordingError, match=r"under `with tracer\.invoke"), model.trace() as tracer:
        tracer.cache()


def test_save_all_gives_values_at_once(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        everything = tracer.save_all()
        norm = (everything["model.layers.0"] - everything["model.embed_tokens"]).norm().save()
    ids = torch.tensor(IDS)
    first, embedded = (capture(plain, ids, path) for path in ("model.layers.0", "model.embed_tokens"))
    torch.testing.assert_close(norm, (first - embedded).norm())
    assert torch.equal(everything["model.layers.0"], first)
    assert everything["model.layers.0.self_attn"][1] is None, "what is no tensor"
    assert torch.equal(everything.value["model.layers.0"], first)


# --- apply and barrier -------------------------------------------------------------------------------------


def test_apply_calls_a_function_once_and_records_what_it_does() -> None:
    model: Any = CardModel(answer=lambda graph: {"x": torch.zeros(1)})
    calls = []

    def scaled(h: Any, factor: float, *, shift: float = 0) -> Any:
        calls.append(factor)
        return h * factor + shift

    with model.trace("hello") as tracer:
        tracer.apply(scaled, model.h[0].output, 2, shift=1).save("x")
    assert calls == [2]
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "torch.mul", "torch.add", "save"]
    with pytest.raises(InputError, match="takes a function and its arguments, found 3") as caught:
        tracer.apply(3)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{__file__}:")


def test_barriers_are_accepted_and_do_nothing() -> None:
    model: Any = CardModel(answer=lambda graph: {"saved_0": torch.zeros(1)})
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke([1, 2]):
            h = model.h[0].output
            barrier()
        with tracer.invoke([3, 4]):
            barrier()
            model.h[0].output = h
            model.lm_head.output.save()
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "site.set", "site.get", "save"]


# --- scan and runs without a block -------------------------------------------------------------------------


def test_a_scan_knows_shapes_and_runs_nothing() -> None:
    model: Any = CardModel()
    mine = torch.zeros(2)
    with model.scan("hello") as tracer:
        h = model.h[0].output.save()
        assert h.shape == (1, 5, 8)
        assert (h @ torch.ones(8, 3)).shape == (1, 5, 3)
        mine[0] = h.mean()
    assert len(tracer.graph.nodes) > 3
    assert model.made.graphs == []
    assert tracer.job is None
    for use in (lambda: h.value, lambda: h + 1, lambda: torch.exp(h)):
        with pytest.raises(ValueNotReadyError, match=r"has no value: model.scan\(\) runs nothing"):
            use()
    assert mine.tolist() == [0, 0]
    assert type(mine) is torch.Tensor


def test_a_scan_finds_what_a_run_would_find() -> None:
    model: Any = CardModel()

    def too_late() -> None:
        model.h[0].output = model.h[1].output[0]  # too late

    def too_far() -> None:
        _ = model.h[0].output[:, 7]

    with (
        pytest.raises(OrderError, match=r"h\.1\.output") as caught,
        model.scan() as tracer,
        tracer.invoke([1, 2]),
    ):
        too_late()
    with open(__file__) as file:
        line = next(i for i, text in enumerate(file, 1) if text.endswith("# too late\n"))
    assert str(caught.value).startswith(f"{__file__}:{line}:")
    with pytest.raises(IndexOutOfRangeError, match="7"), model.scan("hello"):
        too_far()
    with pytest.raises(InputError, match="this trace has no input"), model.scan():
        pass
    assert model.made.graphs == []


def test_keywords_of_old_are_accepted() -> None:
    model: Any = CardModel(answer=lambda graph: {"saved_0": torch.zeros(1)})
    with model.trace("hello", scan=True, validate=True) as tracer:
        model.h[0].output.save()
    with model.trace("hello", scan=False, validate=False) as plain:
        model.h[0].output.save()
    assert plain.graph == tracer.graph


def test_a_run_without_a_block_needs_its_input() -> None:
    with pytest.raises(InputError, match="runs the model at once: give it an input") as caught:
        CardModel().trace(trace=False)
    assert str(caught.value).startswith(f"{__file__}:")


def test_a_cache_works_without_a_name_for_every_value() -> None:
    """One saved structure, so that a user's own names stay free."""

    def answer(graph: Graph) -> dict[str, Any]:
        (structure,) = [n.args[0] for n in graph.nodes if n.op == "save"]
        return {"saved_0": {path: {"output": filled(part["output"])} for path, part in structure.items()}}

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        if isinstance(value, dict):
            return {k: filled(v) for k, v in value.items()}
        return None if value is None else torch.ones(1)

    model: Any = CardModel(answer=answer)
    with model.trace("hello") as tracer:
        cache = tracer.cache()
    assert list(tracer.graph.save_names().values()) == ["saved_0"]
    assert cache.h[1].output[0].tolist() == [1.0]
    assert cache.h[1].output[1] is None


def test_what_a_broken_off_body_wanted_at_its_end_is_not_read_in_the_next() -> None:
    model: Any = CardModel(answer=lambda graph: {"saved_0": torch.zeros(1)})

    def broken_off(invoker: Any) -> None:
        invoker.cache()
        raise KeyError

    with model.trace() as tracer:
        with contextlib.suppress(KeyError), tracer.invoke([1, 2]) as invoker:
            broken_off(invoker)
        with tracer.invoke([3, 4]):
            model.h[0].output.save()
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "save"]

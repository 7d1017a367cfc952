"""Modules that do not run: ``module.skip``, against plain hooks that replace what the module returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pellucid
from experiments import at
from generating import generate
from pellucid_shared.errors import OrderError, PellucidError, ShapeError, SiteError
from pellucid_shared.show import show
from references import first, forward, with_first
from tiny_models import NAMES

N = 5
IDS = [[5, 9, 31, 7, 22, 40]]
BATCH = [[11, 3, 8, 12], [4, 15, 16, 7]]
SHORT = [[7, 8, 9]]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
NO_EOS: dict[str, Any] = {"eos_token_id": []}
HF_NO_EOS: dict[str, Any] = {"eos_token_id": None}


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    found = {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}
    for model in found.values():
        _ = model.card  # probing runs the model, and some tests count its calls
    return found


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(tiny_models: Any, name: str) -> Any:
    return tiny_models[name]


@pytest.fixture
def model(models: Any, name: str) -> Any:
    return models[name]


@pytest.fixture
def llama(models: Any) -> Any:
    return models["llama"]


@pytest.fixture
def plain_llama(tiny_models: Any) -> Any:
    return tiny_models["llama"]


def path(name: str, index: int) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{index}"


def layer(model: Any, name: str, index: int) -> Any:
    return at(model, path(name, index))


@contextmanager
def instead(plain: Any, module: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, the module returns ``make`` of its first argument."""

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        return with_first(output, make(given))

    handle = plain.get_submodule(module).register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted(plain: Any, module: str) -> Iterator[list[int]]:
    """How many elements the first module inside this one returns, call by call."""
    seen: list[int] = []

    def after(_: Any, args: Any, output: Any) -> None:
        seen.append(first(output).numel())

    inside = next(plain.get_submodule(module).children())
    handle = inside.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def logits_of(plain: Any, ids: list[list[int]], module: str | None, make: Any = None) -> torch.Tensor:
    """Logits where ``module`` returns ``make`` of its input; None: of the model as it is."""
    if module is None:
        return forward(plain, torch.tensor(ids)).logits
    with instead(plain, module, make):
        return forward(plain, torch.tensor(ids)).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# --- one pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("ids", [IDS, BATCH], ids=["one row", "two rows"])
def test_a_skipped_layer_passes_its_input_on(
    model: Any, plain: Any, name: str, ids: list[list[int]], index: int
) -> None:
    skipped = path(name, index)
    with counted(plain, skipped) as calls, model.trace(ids):
        layer(model, name, index).skip(layer(model, name, index).input)
        logits = model.lm_head.output.save()
    assert torch.equal(logits, logits_of(plain, ids, skipped, lambda h: h))
    assert not torch.equal(logits, logits_of(plain, ids, None))
    assert calls == []


def test_a_computed_value_stands_in_for_the_output(model: Any, plain: Any, name: str) -> None:
    with model.trace(IDS):
        early = layer(model, name, 0).output
        layer(model, name, 1).skip(early * -2 + early.mean())
        output = layer(model, name, 1).output.save()
        logits = model.lm_head.output.save()

    def made(h: torch.Tensor) -> torch.Tensor:
        return h * -2 + h.mean()

    assert torch.equal(logits, logits_of(plain, IDS, path(name, 1), made))
    assert torch.equal(output, made(_input(plain, path(name, 1))))


def _input(plain: Any, module: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with instead(plain, module, lambda h: seen.append(h.clone()) or h):  # type: ignore[func-returns-value]
        forward(plain, torch.tensor(IDS))
    return seen[0]


def test_a_number_fills_the_output(model: Any, plain: Any, name: str) -> None:
    with counted(plain, f"{path(name, 0)}.mlp") as calls, model.trace(IDS):
        layer(model, name, 0).mlp.skip(0)
        logits = model.lm_head.output.save()
    assert calls == []
    assert torch.equal(logits, logits_of(plain, IDS, f"{path(name, 0)}.mlp", torch.zeros_like))


def test_a_structure_stands_in_for_a_structure(llama: Any, plain_llama: Any) -> None:
    attention = "model.layers.1.self_attn"
    with counted(plain_llama, attention) as calls, llama.trace(IDS):
        llama.layers[1].self_attn.skip((llama.layers[0].output * 3, None))
        logits = llama.lm_head.output.save()
    assert calls == []
    h = _input(plain_llama, "model.layers.1")
    close(logits, logits_of(plain_llama, IDS, attention, lambda _: h * 3))


def test_what_is_given_is_copied(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h = llama.layers[1].input
        mine = h.clone()
        llama.layers[1].skip(mine)
        mine[:] = 0
        llama.layers[1].output[:, -1] = 5
        before = h.save()
        logits = llama.lm_head.output.save()

    def made(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] = 5
        return h

    assert torch.equal(logits, logits_of(plain_llama, IDS, "model.layers.1", made))
    assert torch.equal(before, _input(plain_llama, "model.layers.1"))


def test_a_skip_that_nothing_saved_depends_on_is_left_out(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        llama.layers[1].skip(llama.layers[1].input)
        hidden = llama.layers[0].output.save()
    assert torch.equal(hidden, _input(plain_llama, "model.layers.1"))


def test_the_model_is_as_it_was(llama: Any, plain_llama: Any) -> None:
    before = dict(plain_llama.model.layers[1].__dict__)
    with pytest.raises(PellucidError), llama.trace(IDS):
        llama.layers[1].skip(llama.layers[1].input)
        llama.lm_head.output.flatten()[llama.lm_head.output.argmax() + 10**9].save()
    assert plain_llama.model.layers[1].__dict__.keys() == before.keys()
    assert "forward" not in plain_llama.model.layers[1].__dict__


def test_an_applied_module_runs_where_it_is_skipped(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h = llama.layers[0].mlp.input
        llama.layers[0].mlp.skip(0)
        applied = llama.layers[0].mlp(h).save()
        logits = llama.lm_head.output.save()
    wanted: list[torch.Tensor] = []
    handle = plain_llama.model.layers[0].mlp.register_forward_hook(lambda m, a, o: wanted.append(o.clone()))
    forward(plain_llama, torch.tensor(IDS))
    handle.remove()
    assert torch.equal(applied, wanted[0])
    assert torch.equal(logits, logits_of(plain_llama, IDS, "model.layers.0.mlp", torch.zeros_like))


# --- several invokes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [{0}, {1}, {0, 2}, {0, 1, 2}], ids=str)
def test_each_invoke_skips_for_itself(model: Any, plain: Any, name: str, which: set[int]) -> None:
    prompts = [IDS, BATCH, SHORT]
    saved = []
    with counted(plain, path(name, 0)) as calls, model.trace() as tracer:
        for number, ids in enumerate(prompts):
            with tracer.invoke(ids):
                if number in which:
                    layer(model, name, 0).skip(layer(model, name, 0).input)
                saved.append((layer(model, name, 0).output.save(), model.lm_head.output.save()))
    if which == {0, 1, 2}:
        assert calls == []
    for number, (ids, (output, logits)) in enumerate(zip(prompts, saved, strict=True)):
        skipped = path(name, 0) if number in which else None
        close(logits, logits_of(plain, ids, skipped, lambda h: h))
        assert output.shape[:2] == torch.tensor(ids).shape


def test_a_neighbour_that_skips_changes_nothing_for_the_others(model: Any, name: str) -> None:
    def run(*, skip: bool) -> torch.Tensor:
        with model.trace() as tracer:
            with tracer.invoke(IDS):
                if skip:
                    layer(model, name, 0).skip(0)
                model.lm_head.output.save()
            with tracer.invoke(BATCH):
                inner = layer(model, name, 0).mlp.output.save()
                logits = model.lm_head.output.save()
        return torch.cat([inner.flatten(), logits.flatten()])

    if name == "mixtral":  # its experts work on the tokens of all invokes together
        close(run(skip=True), run(skip=False))
    else:
        assert torch.equal(run(skip=True), run(skip=False))


def test_invokes_take_turns_where_an_output_cannot_be_shared(llama: Any, plain_llama: Any) -> None:
    saved = []
    with llama.trace() as tracer:
        for ids in (IDS, BATCH):
            with tracer.invoke(ids):
                shape = 1, len(ids[0]), 8
                llama.model.rotary_emb.skip((torch.ones(shape), torch.zeros(shape)))
                saved.append(llama.lm_head.output.save())
    for ids, logits in zip((IDS, BATCH), saved, strict=True):
        shape = 1, len(ids[0]), 8
        after = {"model.rotary_emb": lambda _, s=shape: (torch.ones(s), torch.zeros(s))}
        close(logits, forward(plain_llama, torch.tensor(ids), after=after).logits)


def test_a_value_of_one_invoke_stands_in_in_another(llama: Any, plain_llama: Any) -> None:
    other = [[3, 1, 4, 1, 5, 9]]
    with llama.trace() as tracer:
        with tracer.invoke(IDS):
            hidden = llama.layers[1].input
        with tracer.invoke(other):
            llama.layers[1].skip(hidden)
            logits = llama.lm_head.output.save()
    h = _input(plain_llama, "model.layers.1")
    close(logits, logits_of(plain_llama, other, "model.layers.1", lambda _: h))


# --- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["all", 0, 2], ids=str)
def test_a_skipped_layer_still_fills_its_cache(model: Any, plain: Any, name: str, steps: Any) -> None:
    with model.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        with tracer.all() if steps == "all" else tracer.iter[steps]:
            layer(model, name, 1).skip(layer(model, name, 1).input * 2)
        with tracer.all():
            logits = model.lm_head.output[:, -1].save()
        result = tracer.result.save()
    count, seen = iter(range(10**6)), []

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        step = next(count)
        if steps in ("all", step):
            return with_first(output, (args[0] if args else next(iter(kwargs.values()))) * 2)
        return None

    handle = plain.get_submodule(path(name, 1)).register_forward_hook(after, with_kwargs=True)
    hooks = {"lm_head": lambda step, h: seen.append(h[:, -1].clone())}
    wanted = generate(plain, torch.tensor(IDS), at=hooks, max_new_tokens=N, **HF_NO_EOS)
    handle.remove()
    assert torch.equal(result, wanted)
    for found, expected in zip(logits, seen, strict=True):
        close(found, expected)


@pytest.mark.parametrize("which", [{0}, {1, 2}, {0, 1, 2}], ids=str)
def test_invokes_that_generate_together_skip_each_for_itself(
    model: Any, plain: Any, name: str, which: set[int]
) -> None:
    prompts, results = [IDS, BATCH, SHORT], []
    with model.generate(max_new_tokens=N, **NO_EOS) as tracer:
        for number, ids in enumerate(prompts):
            with tracer.invoke(ids):
                if number in which:
                    with tracer.all():
                        layer(model, name, 0).skip(layer(model, name, 0).input)
                results.append(tracer.result.save())
    for number, (ids, result) in enumerate(zip(prompts, results, strict=True)):
        if number in which:
            with instead(plain, path(name, 0), lambda h: h):
                wanted = generate(plain, torch.tensor(ids), max_new_tokens=N, **HF_NO_EOS)
        else:
            wanted = generate(plain, torch.tensor(ids), max_new_tokens=N, **HF_NO_EOS)
        assert torch.equal(result, wanted)


def test_a_module_without_cache_does_not_run_in_a_generation(llama: Any, plain_llama: Any) -> None:
    with counted(plain_llama, "model.layers.0.mlp") as calls:
        with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
            with tracer.iter[1:]:
                llama.layers[0].mlp.skip(0)
            tracer.result.save()
    assert calls == [6 * 64]  # the prefill alone


def test_what_an_invoke_reads_inside_ends_with_it(llama: Any, plain_llama: Any) -> None:
    free = generate(plain_llama, torch.tensor(IDS), max_new_tokens=N, **HF_NO_EOS)
    eos = int(free[0, 6 + 1])
    with llama.generate(max_new_tokens=N, eos_token_id=eos, min_new_tokens=0) as tracer:
        with tracer.invoke(IDS), tracer.all():
            inside = llama.layers[0].mlp.output.save()
        with tracer.invoke(SHORT):
            with tracer.all():
                llama.layers[0].skip(llama.layers[0].input)
            result = tracer.result.save()
    assert len(inside) == 2
    with instead(plain_llama, "model.layers.0", lambda h: h):
        wanted = generate(plain_llama, torch.tensor(SHORT), max_new_tokens=N, eos_token_id=eos)
    assert torch.equal(result, wanted)
    assert result.shape[1] > 3 + 2  # it went on without the other


# --- sessions and files ------------------------------------------------------------------------------------


def test_a_skip_is_of_its_own_trace(llama: Any, plain_llama: Any) -> None:
    with llama.session():
        with llama.trace(IDS):
            llama.layers[0].skip(llama.layers[0].input)
            one = llama.lm_head.output.save()
        with llama.trace(IDS):
            two = llama.lm_head.output.save()
    assert torch.equal(one, logits_of(plain_llama, IDS, "model.layers.0", lambda h: h))
    assert torch.equal(two, logits_of(plain_llama, IDS, None))


def test_a_skip_prints_and_reads_back(llama: Any) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke(SHORT):
            llama.layers[0].self_attn.skip((llama.layers[0].input, None))
            llama.lm_head.output.save()
    assert pellucid.Graph.from_json(tracer.graph.to_json()) == tracer.graph
    assert "skip(model.layers.0.self_attn.output (invoke 1), (v0, None))" in show(tracer.graph)


# --- mistakes ----------------------------------------------------------------------------------------------


def refused(model: Any, error: type[Exception], match: str, body: Callable[[], Any]) -> None:
    with pytest.raises(error, match=rf"test_skip.py:\d+: .*{match}"), model.trace(IDS):
        body()
        model.lm_head.output.save()


def test_nothing_is_touched_inside_a_skipped_module(llama: Any) -> None:
    inner = llama.layers[1].mlp

    def reads_before() -> None:
        inner.output.save()
        llama.layers[1].skip(llama.layers[1].input)

    def reads_after() -> None:
        llama.layers[1].skip(llama.layers[1].input)
        inner.down_proj.input.save()

    def writes() -> None:
        llama.layers[1].skip(llama.layers[1].input)
        inner.output = 0

    def skips() -> None:
        llama.layers[1].skip(llama.layers[1].input)
        inner.skip(0)

    match = "is inside model.layers.1, which is skipped and does not run"
    for body in (reads_before, reads_after, writes, skips):
        refused(llama, SiteError, match, body)
    with pytest.raises(SiteError, match=r"mlp.output \(step 2\) is inside .* skipped in step 2"):
        with llama.generate(IDS, max_new_tokens=4) as tracer, tracer.iter[2]:
            llama.layers[1].skip(llama.layers[1].input)
            inner.output.save()


def test_a_step_or_an_input_that_does_not_skip_is_free(llama: Any) -> None:
    with llama.generate(max_new_tokens=3, **NO_EOS) as tracer:
        with tracer.invoke(IDS):
            with tracer.iter[1]:
                llama.layers[1].skip(llama.layers[1].input)
            with tracer.iter[[0, 2]]:
                mine = llama.layers[1].mlp.output.save()
        with tracer.invoke(IDS), tracer.all():
            theirs = llama.layers[1].mlp.output.save()
    assert [len(mine), len(theirs)] == [2, 3]
    assert torch.equal(mine[0], theirs[0])


def test_other_mistakes_are_named(llama: Any) -> None:
    def later() -> None:
        llama.layers[0].skip(llama.layers[1].output)

    def itself() -> None:
        llama.layers[0].skip(llama.layers[0].output)

    def twice() -> None:
        llama.layers[0].skip(llama.layers[0].input)
        llama.layers[0].skip(0)

    refused(llama, OrderError, "layers.0 is skipped with a value that needs model.layers.1.output", later)
    refused(llama, OrderError, "layers.0 is skipped with a value that needs model.layers.0.output", itself)
    refused(llama, SiteError, "layers.0 is skipped twice", twice)
    refused(
        llama,
        ShapeError,
        r"layers.0.output has shape \[1, 6, 32\] and was given .* \[1, 32\]",
        lambda: llama.layers[0].skip(llama.layers[0].input[:, -1]),
    )
    refused(
        llama,
        ShapeError,
        r"self_attn.output is a tuple \(tensor, None\), and the skip gives a tensor",
        lambda: llama.layers[0].self_attn.skip(llama.layers[0].input),
    )
    refused(
        llama,
        ShapeError,
        "the skip gives something else there",
        lambda: llama.layers[0].self_attn.skip((llama.layers[0].input, 1)),
    )
    refused(llama, SiteError, "is never called in a pass", lambda: llama.model.layers.skip(0))
    refused(llama, SiteError, "CausalLMOutputWithPast, which no value can stand for", lambda: llama.skip(0))

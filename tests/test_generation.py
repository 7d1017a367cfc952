"""Generation with edits and captures by step, against ``transformers.generate`` with plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid
from generating import captured, generate
from pellucid_shared.errors import (
    GraphError,
    InputError,
    OrderError,
    RecordingError,
    ShapeError,
    SiteError,
    ValueNotReadyError,
)
from tiny_models import NAMES

N = 6
IDS = [[5, 9, 31, 7, 22, 40]]
BATCH = [[11, 3, 8, 12], [4, 15, 16, 7]]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
NO_EOS: dict[str, Any] = {"eos_token_id": []}
HF_NO_EOS: dict[str, Any] = {"eos_token_id": None}


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}


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


def path(name: str, index: int = 1) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{index}"


def at(model: Any, name: str, index: int) -> Any:
    for part in path(name, index).split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def out(model: Any, name: str, index: int = 1) -> Any:
    return at(model, name, index).output


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# --- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [IDS, BATCH], ids=["one row", "two rows"])
def test_greedy_tokens_are_those_of_transformers(model: Any, plain: Any, ids: list[list[int]]) -> None:
    with model.generate(ids, max_new_tokens=N, **NO_EOS) as tracer:
        result = tracer.result.save()
        again = model.generator.output.save()
    wanted = generate(plain, torch.tensor(ids), max_new_tokens=N, **HF_NO_EOS)
    assert torch.equal(result, wanted)
    assert torch.equal(again, wanted)


def test_several_invokes_generate_together_as_each_alone(model: Any, plain: Any) -> None:
    with model.generate(max_new_tokens=N, **NO_EOS) as tracer:
        results = []
        for ids in (IDS, BATCH, [[7, 8, 9]]):
            with tracer.invoke(ids):
                results.append(tracer.result.save())
    for ids, result in zip((IDS, BATCH, [[7, 8, 9]]), results, strict=True):
        assert torch.equal(result, generate(plain, torch.tensor(ids), max_new_tokens=N, **HF_NO_EOS))


def test_rows_of_different_lengths_are_padded_on_the_left(model: Any, plain: Any) -> None:
    ragged = [[5, 9, 31, 7, 22, 40], [11, 3, 8]]
    with model.generate(ragged, max_new_tokens=N, pad_token_id=0, **NO_EOS) as tracer:
        result = tracer.result.save()
    ids = torch.tensor([ragged[0], [0, 0, 0, *ragged[1]]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    wanted = generate(plain, ids, mask=mask, max_new_tokens=N, **HF_NO_EOS)
    assert torch.equal(result[:, 6:], wanted[:, 6:])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 0},
        {"top_k": 5},
        {"top_p": 0.6, "temperature": 1.3},
        {"repetition_penalty": 1.4, "top_k": 0},
    ],
    ids=lambda o: "-".join(o),
)
def test_sampling_with_a_seed_is_that_of_transformers(
    llama: Any, plain_llama: Any, options: dict[str, Any]
) -> None:
    with llama.generate(BATCH, max_new_tokens=N, do_sample=True, seed=7, **options, **NO_EOS) as tracer:
        result = tracer.result.save()
    wanted = generate(
        plain_llama, torch.tensor(BATCH), max_new_tokens=N, do_sample=True, seed=7, **options, **HF_NO_EOS
    )
    assert torch.equal(result, wanted)


def test_sampling_of_one_invoke_does_not_depend_on_its_neighbours(llama: Any) -> None:
    def sampled(*prompts: Any) -> torch.Tensor:
        with llama.generate(max_new_tokens=N, do_sample=True, seed=3, **NO_EOS) as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    result = tracer.result.save()
        return result

    assert torch.equal(sampled(IDS), sampled(BATCH, [[7, 8, 9]], IDS))


def test_a_token_that_ends_a_row_ends_it(llama: Any, plain_llama: Any) -> None:
    free = generate(plain_llama, torch.tensor(BATCH), max_new_tokens=N, **HF_NO_EOS)
    eos = int(free[0, 4 + 2])
    with llama.generate(BATCH, max_new_tokens=N, eos_token_id=eos, pad_token_id=0) as tracer:
        result = tracer.result.save()
    assert torch.equal(result, generate(plain_llama, torch.tensor(BATCH), max_new_tokens=N, eos_token_id=eos))
    with llama.generate(
        BATCH, max_new_tokens=N, eos_token_id=eos, min_new_tokens=5, pad_token_id=0
    ) as tracer:
        result = tracer.result.save()
    wanted = generate(plain_llama, torch.tensor(BATCH), max_new_tokens=N, eos_token_id=eos, min_new_tokens=5)
    assert torch.equal(result, wanted)


def test_the_models_generation_config_decides_what_is_left_open(llama: Any, plain_llama: Any) -> None:
    free = generate(plain_llama, torch.tensor(IDS), max_new_tokens=N, **HF_NO_EOS)
    before = plain_llama.generation_config.eos_token_id
    plain_llama.generation_config.eos_token_id = int(free[0, 6 + 2])
    try:
        with llama.generate(IDS, max_new_tokens=N) as tracer:
            result = tracer.result.save()
    finally:
        plain_llama.generation_config.eos_token_id = before
    assert torch.equal(result, free[:, : 6 + 3])


def test_logits_that_are_no_distribution_draw_nothing_and_fail_nobody(llama: Any) -> None:
    with llama.generate(max_new_tokens=3, do_sample=True, seed=1, **NO_EOS) as tracer:
        with tracer.invoke(IDS):
            llama.lm_head.output[:] = float("nan")
            broken = tracer.result.save()
        with tracer.invoke(BATCH):
            sound = tracer.result.save()
    with llama.generate(BATCH, max_new_tokens=3, do_sample=True, seed=1, **NO_EOS) as tracer:
        alone = tracer.result.save()
    assert broken.shape == (1, 9)
    assert torch.equal(sound, alone)


# --- captures ----------------------------------------------------------------------------------------------


def test_a_body_for_all_steps_saves_a_list(model: Any, plain: Any, name: str) -> None:
    with model.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer, tracer.iter[:]:
        hidden = out(model, name).save()
    wanted = captured(plain, torch.tensor(IDS), path(name), max_new_tokens=N, **HF_NO_EOS)
    assert len(hidden) == N
    assert type(hidden.value) is list
    for found, expected in zip(hidden, wanted, strict=True):
        close(found, expected)


@pytest.mark.parametrize(
    ("steps", "which"),
    [(slice(1, 3), [1, 2]), ([0, 2], [0, 2]), (slice(None, None, 2), [0, 2, 4]), ([-1], [5])],
)
def test_a_body_for_some_steps_runs_in_those(
    llama: Any, plain_llama: Any, steps: Any, which: list[int]
) -> None:
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer, tracer.iter[steps]:
        hidden = llama.layers[1].output[:, -1].save()
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    assert len(hidden) == len(which)
    for found, step in zip(hidden, which, strict=True):
        close(found, wanted[step][:, -1])


def test_one_step_saves_a_plain_value(llama: Any, plain_llama: Any) -> None:
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer, tracer.iter[2]:
        hidden = llama.layers[1].output.save()
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    close(hidden, wanted[2])


def test_next_names_the_steps_one_by_one(llama: Any, plain_llama: Any) -> None:
    with llama.generate(max_new_tokens=N, **NO_EOS) as tracer, tracer.invoke(IDS) as invoker:
        first = llama.layers[1].output.save()
        invoker.next()
        second = llama.layers[1].output.save()
        tracer.next(2)
        fourth = llama.layers[1].output.save()
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    for found, step in ((first, 0), (second, 1), (fourth, 3)):
        close(found, wanted[step])


def test_next_of_a_module_moves_that_module_alone(llama: Any, plain_llama: Any) -> None:
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS):
        later = llama.layers[1].next().output.save()
        other = llama.layers[0].output.save()
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    close(later, wanted[1])
    close(other, captured(plain_llama, torch.tensor(IDS), path("llama", 0), max_new_tokens=1)[0])


def test_a_loop_over_steps_is_plain_python(llama: Any, plain_llama: Any) -> None:
    found = {}
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        for step in tracer.iter[:]:
            if step % 2:
                continue
            found[step] = llama.layers[1].output[:, -1].save()
            if step == 4:
                break
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    assert list(found) == [0, 2, 4]
    for step, value in found.items():
        close(value, wanted[step][:, -1])


def test_a_list_grows_step_by_step(llama: Any, plain_llama: Any) -> None:
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        grown = tracer.list().save()
        with tracer.all():
            grown.append(llama.layers[1].output[:, -1].norm())
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    assert len(grown) == N
    for found, expected in zip(grown, wanted, strict=True):
        close(found, expected[:, -1].norm())


def test_invokes_capture_their_own_steps(model: Any, plain: Any, name: str) -> None:
    with model.generate(max_new_tokens=N, **NO_EOS) as tracer:
        saved = []
        for ids in (IDS, BATCH):
            with tracer.invoke(ids), tracer.iter[:]:
                saved.append(out(model, name).save())
    for ids, found in zip((IDS, BATCH), saved, strict=True):
        wanted = captured(plain, torch.tensor(ids), path(name), max_new_tokens=N, **HF_NO_EOS)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


# --- edits -------------------------------------------------------------------------------------------------


def test_an_edit_in_every_step_is_that_of_a_hook(model: Any, plain: Any, name: str) -> None:
    with model.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        with tracer.all():
            out(model, name, 0)[:, -1] *= -2
        result = tracer.result.save()

    def edited(step: int, h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] *= -2
        return h

    wanted = generate(plain, torch.tensor(IDS), at={path(name, 0): edited}, max_new_tokens=N, **HF_NO_EOS)
    assert torch.equal(result, wanted)
    assert not torch.equal(result, generate(plain, torch.tensor(IDS), max_new_tokens=N, **HF_NO_EOS))


@pytest.mark.parametrize("steps", [2, slice(2, None), [1, 4]], ids=["one", "from", "some"])
def test_an_edit_in_some_steps_shows_in_those_and_later(llama: Any, plain_llama: Any, steps: Any) -> None:
    which = (
        [steps] if isinstance(steps, int) else list(range(N))[steps] if isinstance(steps, slice) else steps
    )
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        with tracer.iter[steps]:
            llama.layers[0].mlp.output = llama.layers[0].mlp.output * -3
        result = tracer.result.save()
        with tracer.iter[:]:
            logits = llama.lm_head.output[:, -1].save()

    def edited(step: int, h: torch.Tensor) -> torch.Tensor | None:
        return h * -3 if step in which else None

    seen: list[torch.Tensor] = []
    hooks = {"model.layers.0.mlp": edited, "lm_head": lambda step, h: seen.append(h[:, -1].clone())}
    wanted = generate(plain_llama, torch.tensor(IDS), at=hooks, max_new_tokens=N, **HF_NO_EOS)
    assert torch.equal(result, wanted)
    for found, expected in zip(logits, seen, strict=True):
        close(found, expected)


def test_a_value_of_one_step_is_written_in_a_later_one(llama: Any, plain_llama: Any) -> None:
    with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
        early = llama.layers[0].output[:, -1:]
        with tracer.iter[1:]:
            llama.layers[1].output = early
        result = tracer.result.save()
    kept: list[torch.Tensor] = []

    def patched(step: int, h: torch.Tensor) -> torch.Tensor | None:
        return kept[0] if step else None

    def keep(step: int, h: torch.Tensor) -> None:
        kept.append(h[:, -1:].clone())

    hooks = {"model.layers.0": keep, "model.layers.1": patched}
    wanted = generate(plain_llama, torch.tensor(IDS), at=hooks, max_new_tokens=N, **HF_NO_EOS)
    assert torch.equal(result, wanted)


def test_a_write_that_needs_a_later_step_is_an_error(llama: Any) -> None:
    with pytest.raises(OrderError, match=r"it needs model.layers.0.output \(step 2\)"):
        with llama.generate(IDS, max_new_tokens=N) as tracer:
            with tracer.iter[2]:
                late = llama.layers[0].output
            llama.layers[0].output[:, -1:] = late
            tracer.result.save()


def test_a_body_that_does_not_fit_a_step_is_an_error_at_its_line(llama: Any) -> None:
    with (
        pytest.raises(ShapeError, match=r"test_generation.py:\d+: .*\[1, 1, 32\].*\[1, 6, 32\]"),
        llama.generate(IDS, max_new_tokens=N) as tracer,
    ):
        prompt = llama.layers[0].output
        with tracer.iter[:]:
            llama.layers[1].output = prompt * 2
        tracer.result.save()


def test_steps_come_back_in_the_order_they_are_asked_for(llama: Any, plain_llama: Any) -> None:
    wanted = captured(plain_llama, torch.tensor(IDS), path("llama"), max_new_tokens=N, **HF_NO_EOS)
    for steps, which in (([2, 0], [2, 0]), (slice(None, None, -2), [5, 3, 1])):
        with llama.generate(IDS, max_new_tokens=N, **NO_EOS) as tracer:
            grown = tracer.list().save()
            with tracer.iter[steps]:
                last = llama.layers[1].output[:, -1]
                hidden = last.save()
                grown.append(last)
        for found in (hidden, grown):
            assert len(found) == len(which)
            for one, step in zip(found, which, strict=True):
                close(one, wanted[step][:, -1])


def test_a_body_for_no_step_saves_an_empty_list(llama: Any) -> None:
    with llama.generate(IDS, max_new_tokens=3, **NO_EOS) as tracer:
        ids = tracer.result.save()
        with tracer.iter[5:]:
            hidden = llama.layers[1].output.save()
    assert hidden.value == []
    assert ids.shape == (1, 9)


def test_a_penalty_leaves_padding_out(llama: Any, plain_llama: Any) -> None:
    ragged = [[5, 9, 31, 7, 22, 40], [11, 3, 8]]
    with llama.generate(ragged, max_new_tokens=3, repetition_penalty=1.7, pad_token_id=0, **NO_EOS) as tracer:
        with tracer.all():
            llama.lm_head.output[:, -1, 0] = 3.0  # the id that pads is the best
        result = tracer.result.save()

    def favoured(step: int, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[:, -1, 0] = 3.0
        return logits

    ids = torch.tensor([ragged[0], [0, 0, 0, *ragged[1]]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    options = {"max_new_tokens": 3, "repetition_penalty": 1.7, **HF_NO_EOS}
    wanted = generate(plain_llama, ids, mask=mask, at={"lm_head": favoured}, **options)
    assert torch.equal(result[:, 6:], wanted[:, 6:])


def test_a_generation_config_that_asks_for_more_is_refused_by_name(llama: Any, plain_llama: Any) -> None:
    plain_llama.generation_config.no_repeat_ngram_size = 2
    try:
        with pytest.raises(InputError, match="asks for no_repeat_ngram_size=2"):
            with llama.generate(IDS, max_new_tokens=3) as tracer:
                tracer.result.save()
    finally:
        plain_llama.generation_config.no_repeat_ngram_size = None


def test_a_model_without_a_cache_is_not_generated_with() -> None:
    from transformers import AutoModelForCausalLM, Mamba2Config

    config = Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1
    )
    mamba = pellucid.LanguageModel("mamba2", model=AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(InputError, match="mamba2 keeps nothing from step to step"):
        with mamba.generate(IDS, max_new_tokens=2) as tracer:
            tracer.result.save()
    with mamba.generate(IDS, max_new_tokens=1, eos_token_id=[]) as tracer:
        assert tracer.result.save() is not None


# --- ending early ------------------------------------------------------------------------------------------


@pytest.fixture
def ending(plain_llama: Any) -> int:
    """A token that ends the generation of IDS after 3 steps."""
    return int(generate(plain_llama, torch.tensor(IDS), max_new_tokens=N, **HF_NO_EOS)[0, 6 + 2])


def test_the_steps_that_ran_are_returned(llama: Any, ending: int) -> None:
    with llama.generate(IDS, max_new_tokens=N, eos_token_id=ending) as tracer:
        with tracer.iter[:]:
            hidden = llama.layers[1].output.save()
        grown = tracer.list().save()
        with tracer.iter[1:]:
            grown.append(llama.layers[0].output.sum())
        loop = []
        for step in tracer.iter[:]:
            loop.append(llama.layers[0].output.save(f"step {step}"))
        result = tracer.result.save()
    assert result.shape == (1, 9)
    assert len(hidden) == 3
    assert len(grown) == 2
    assert loop[2].shape == (1, 1, 32)
    with pytest.raises(ValueNotReadyError, match="the generation ended before its step"):
        _ = loop[3].value


def test_a_step_that_had_to_run_and_did_not_is_an_error_that_names_it(llama: Any, ending: int) -> None:
    with pytest.raises(SiteError, match=r"step 4.* was not reached: the generation ended after 3 steps"):
        with llama.generate(IDS, max_new_tokens=N, eos_token_id=ending) as tracer, tracer.iter[4]:
            llama.layers[1].output.save()


def test_an_invoke_that_ends_leaves_the_others_as_they_are(llama: Any, plain_llama: Any, ending: int) -> None:
    with llama.generate(max_new_tokens=N, eos_token_id=ending) as tracer:
        saved = []
        for ids in (BATCH, IDS, [[7, 8, 9]]):
            with tracer.invoke(ids):
                with tracer.all():
                    hidden = llama.layers[1].output[:, -1].save()
                saved.append((hidden, tracer.result.save()))
    for ids, (hidden, result) in zip((BATCH, IDS, [[7, 8, 9]]), saved, strict=True):
        wanted = generate(
            plain_llama, torch.tensor(ids), max_new_tokens=N, eos_token_id=ending, pad_token_id=ending
        )
        assert torch.equal(result, wanted)
        assert len(hidden) == wanted.shape[1] - len(ids[0])


# --- mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_are_named_at_their_line(llama: Any) -> None:
    with pytest.raises(InputError, match="no option 'num_beams'"):
        llama.generate(IDS, num_beams=3)
    with pytest.raises(InputError, match="max_new_tokens is a whole number from 1 to 100000, found 0"):
        llama.generate(IDS, max_new_tokens=0)
    with pytest.raises(InputError, match="6 tokens and is to get 200 more; llama takes at most 128"):
        with llama.generate(IDS, max_new_tokens=200):
            pass
    with llama.generate(IDS, max_new_tokens=3) as tracer:
        with pytest.raises(RecordingError, match="step 3 is asked of a generation of 3 steps"):
            tracer.iter[3]
        with pytest.raises(RecordingError, match="step 3 is asked of a generation of 3 steps"):
            tracer.next(3)
        with pytest.raises(RecordingError, match="a list of different steps"):
            tracer.iter[[1, 1]]
        with pytest.raises(RecordingError, match="cannot be opened inside another"), tracer.all():
            with tracer.all():
                pass
    with llama.trace(IDS) as tracer:
        with pytest.raises(RecordingError, match="a trace is one forward pass"):
            tracer.next()
        with pytest.raises(RecordingError, match="a trace is one forward pass"), tracer.all():
            pass


def test_steps_that_were_skimmed_are_said_so(llama: Any) -> None:
    with pytest.raises(
        RecordingError, match=r"gone through at .*test_generation.py:\d+ with nothing written"
    ):
        with llama.generate(IDS, max_new_tokens=3) as tracer:
            for _ in list(tracer.iter[:]):
                llama.layers[0].output.save()


def test_what_a_body_makes_in_each_step_stays_in_it(llama: Any) -> None:
    with pytest.raises(GraphError, match="append it to a list, or save it in the body"):
        with llama.generate(IDS, max_new_tokens=3) as tracer:
            with tracer.all():
                hidden = llama.layers[0].output
            (hidden * 2).save()

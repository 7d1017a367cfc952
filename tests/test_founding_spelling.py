"""Notebooks of the founding years: ``model.forward()``, its runner, and blocks that return tuples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import pellucid
from client_fixtures import CardModel
from generating import captured, generate
from pellucid import LanguageModel
from pellucid_shared.errors import (
    IndexOutOfRangeError,
    InputError,
    PellucidError,
    ShapeError,
    SiteError,
    ValueNotReadyError,
)
from references import capture, first, forward, with_first
from service import running_service

pytestmark = pytest.mark.xdist_group("service")

NAMES = {"gpt2": "transformer.h", "llama": "model.layers"}
IDS, OTHER = [[5, 9, 31, 7, 2, 40]], [[11, 3, 8]]


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folders = {name: tiny_folders[name] for name in NAMES}
    with running_service(folders, tmp_path_factory.mktemp("service")) as url:
        yield url


@pytest.fixture(params=sorted(NAMES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(name: str, tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models[name]


@pytest.fixture(params=["local", "remote"])
def model(request: pytest.FixtureRequest, name: str, plain: PreTrainedModel) -> Any:
    if request.param == "local":
        return LanguageModel(name, model=plain)
    return LanguageModel(name, remote=request.getfixturevalue("service"))


def layers(model: Any, name: str) -> Any:
    return model.transformer.h if name == "gpt2" else model.model.layers


def close(found: Any, wanted: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def edited(plain: Any, name: str, ids: Any, change: Any, block: int = 0) -> torch.Tensor:
    """Logits with one block's tensor changed by hooks."""
    after = {f"{NAMES[name]}.{block}": lambda out: with_first(out, change(first(out).clone()))}
    logits: torch.Tensor = forward(plain, torch.tensor(ids), after=after).logits
    return logits


def test_the_founding_example_runs_word_for_word(model: Any, plain: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.forward(remote=model._remote) as runner, runner.invoke(IDS) as invoker:
            h = layers(model, name)[-1].output[0]
            assert h.shape == (1, 6, 32)
            hidden = h.save()
            row = h[0].save()
            tokens = torch.softmax(model.lm_head.output, dim=2).argmax(dim=2).save()
            everything = invoker.save_all()
    wanted = forward(plain, torch.tensor(IDS)).logits
    close(row, hidden[0])
    close(hidden.value, capture(plain, torch.tensor(IDS), f"{NAMES[name]}.1"))
    assert torch.equal(tokens.value, wanted.softmax(2).argmax(2))
    close(runner.output.logits, wanted)
    close(runner.output["logits"], wanted)
    close(runner.output[0], wanted)
    assert torch.equal(everything[f"{NAMES[name]}.1"][0], hidden), "a block is a tuple of one here too"


def test_the_runners_output_holds_all_invokes_padded_on_the_left(model: Any, plain: Any, name: str) -> None:
    with model.forward() as runner:
        with runner.invoke(OTHER):
            hidden = layers(model, name)[0].output[0].save()
        with runner.invoke([IDS[0], IDS[0][::-1]]):
            layers(model, name)[0].output[0][:] = hidden.mean()
    logits = runner.output.logits
    assert logits.shape == (3, 6, 99)
    close(logits[:1, 3:], forward(plain, torch.tensor(OTHER)).logits)
    assert logits[0, :3].abs().sum() == 0
    close(logits[1:], edited(plain, name, [IDS[0], IDS[0][::-1]], lambda h: h.fill_(hidden.mean())))


EDITS: dict[str, tuple[Any, Any]] = {
    "in place": (lambda block: block.output[0].mul_(2), lambda h: h * 2),
    "all of it": (lambda block: block.output[0].__setitem__(slice(None), 0), torch.zeros_like),
    "a slice": (
        lambda block: block.output[0].__setitem__((slice(None), -1), 3.0),
        lambda h: torch.cat([h[:, :-1], torch.full_like(h[:, -1:], 3.0)], dim=1),
    ),
    "a member": (lambda block: block.output.__setitem__(0, block.output[0] * 2), lambda h: h * 2),
    "a tuple": (lambda block: setattr(block, "output", (block.output[0] * 2,)), lambda h: h * 2),
    "a joined tuple": (
        lambda block: setattr(block, "output", (block.output[0] * 2,) + block.output[1:]),  # noqa: RUF005
        lambda h: h * 2,
    ),
    "an unpacked tuple": (
        lambda block: setattr(block, "output", (block.output[0] * 2, *block.output[1:])),
        lambda h: h * 2,
    ),
    "a tuple before it": (
        lambda block: setattr(block, "output", () + block.output),  # noqa: RUF005
        lambda h: h,
    ),
    "the tensor itself": (lambda block: setattr(block, "output", block.output[0] * 2), lambda h: h * 2),
    "a tuple of a number": (lambda block: setattr(block, "output", (0,)), torch.zeros_like),
}


@pytest.mark.parametrize("edit", EDITS)
def test_blocks_are_edited_as_tuples_of_one(model: Any, plain: Any, name: str, edit: str) -> None:
    write, change = EDITS[edit]
    with model.trace(IDS, tuple_outputs=True):
        write(layers(model, name)[0])
        logits = model.lm_head.output.save()
    close(logits, edited(plain, name, IDS, change))


def test_augmented_assignment_reaches_the_model(model: Any, plain: Any, name: str) -> None:
    with model.trace(IDS, tuple_outputs=True):
        layers(model, name)[0].output[0] += 1
        layers(model, name)[0].output[0][:, 1] *= 2
        logits = model.lm_head.output.save()

    def change(h: torch.Tensor) -> torch.Tensor:
        h += 1
        h[:, 1] *= 2
        return h

    close(logits, edited(plain, name, IDS, change))


def test_a_name_taken_before_a_replacement_keeps_what_was_there(model: Any, plain: Any, name: str) -> None:
    with model.trace(IDS, tuple_outputs=True):
        block = layers(model, name)[0]
        old = block.output
        block.output = (old[0] * 2,)
        new = block.output
        kept = pellucid.save({"old": old[0], "new": new[0]})
        whole = new.save("whole")
    before = capture(plain, torch.tensor(IDS), f"{NAMES[name]}.0")
    close(kept["old"], before)
    close(kept["new"], before * 2)
    assert isinstance(whole, tuple)
    close(whole[0], before * 2)


def test_inputs_are_the_tuple_of_arguments(model: Any, plain: Any, name: str) -> None:
    with model.trace(IDS, tuple_outputs=True):
        block = layers(model, name)[1]
        block.input[0][:, 0] = 0
        given = block.input[0].save()
        block.input = (block.input[0] * 2, *block.input[1:])
        ids = model.input[0].save()
        logits = model.lm_head.output.save()
    path = f"{NAMES[name]}.1"

    def before(args: Any, kwargs: Any) -> Any:
        h = (args[0] if args else kwargs["hidden_states"]).clone()
        h[:, 0] = 0
        return (h * 2, *args[1:]), kwargs

    shown = capture(plain, torch.tensor(IDS), path, "input").clone()
    shown[:, 0] = 0
    close(given, shown)
    assert ids.tolist() == IDS
    close(logits, forward(plain, torch.tensor(IDS), before={path: before}).logits)


def test_a_model_may_be_made_so_and_a_trace_may_say_otherwise(plain: Any, name: str) -> None:
    model: Any = LanguageModel(name, model=plain, tuple_outputs=True)
    wanted = capture(plain, torch.tensor(IDS), f"{NAMES[name]}.0")
    with model.trace(IDS):
        inside = layers(model, name)[0].output[0].save()
        mlp = layers(model, name)[0].mlp.output.save()
        attention = (
            layers(model, name)[0].children["attn" if name == "gpt2" else "self_attn"].output[0].save()
        )
    assert torch.equal(inside, wanted)
    assert mlp.shape == attention.shape == wanted.shape, "only blocks are changed"
    with model.trace(IDS, tuple_outputs=False):
        bare = layers(model, name)[0].output.save()
    assert torch.equal(bare, wanted)


def refusals(model: Any, name: str) -> dict[str, tuple[Any, type[PellucidError], str]]:
    block = layers(model, name)[0]
    path = f"{NAMES[name]}.0.output"
    return {
        "member": (lambda: block.output[1], IndexOutOfRangeError, "a tuple of one tensor>; it has no 1"),
        "write": (lambda: block.output.__setitem__(1, 0), IndexOutOfRangeError, "it has no 1"),
        "attribute": (lambda: block.output.shape, SiteError, rf"write {path}\[0\].shape"),
        "too many": (
            lambda: setattr(block, "output", (1, 2)),
            ShapeError,
            "and was given 2 values",
        ),
        "nothing": (lambda: setattr(block, "output", ()), ShapeError, "given 0 values"),
        "shape": (lambda: setattr(block, "output", (block.output[0][:, 1],)), ShapeError, r"\[1, 32\]"),
    }


@pytest.mark.parametrize("case", ["member", "write", "attribute", "too many", "nothing", "shape"])
def test_what_a_tuple_of_one_does_not_have_is_refused(plain: Any, name: str, case: str) -> None:
    model: Any = LanguageModel(name, model=plain)
    use, error, message = refusals(model, name)[case]
    with pytest.raises(error, match=message) as caught, model.trace(IDS, tuple_outputs=True):
        use()
    assert str(caught.value).startswith(f"{__file__}:")


def test_runners_say_what_they_take_and_when_their_output_is_there() -> None:
    model: Any = CardModel()
    with pytest.raises(InputError, match=r"model.forward has no option 'max_new_tokens'"):
        model.forward(max_new_tokens=3)

    def early() -> None:
        _ = runner.output

    with pytest.raises(ValueNotReadyError, match=r"runner\.output is there after"), model.forward() as runner:
        early()

    def failing() -> None:
        with runner.invoke([1, 2]):
            pass
        with runner.invoke([1, 2]):
            model.h[0].output[:, 9].save()

    with pytest.raises(IndexOutOfRangeError, match="9"), model.forward() as runner:
        failing()
    with pytest.raises(ValueNotReadyError, match=r"runner.output has no value: the block ended") as caught:
        _ = runner.output
    assert str(caught.value).startswith(f"{__file__}:")


def test_steps_of_generation_are_named_with_next(model: Any, plain: PreTrainedModel, name: str) -> None:
    steps: dict[int, list[Any]] = {}
    outputs = []
    with model.generate(max_new_tokens=3, eos_token_id=[], tuple_outputs=True) as generator:
        for number, ids in enumerate((IDS, OTHER)):
            with generator.invoke(ids) as invoker:
                steps[number] = [layers(model, name)[1].output[0].save()]
                for _ in range(2):
                    invoker.next()
                    steps[number].append(layers(model, name)[1].output[0].save())
                outputs.append(model.generator.output.save())
    for number, ids in enumerate((IDS, OTHER)):
        own = {"max_new_tokens": 3, "eos_token_id": None}
        wanted = captured(plain, torch.tensor(ids), f"{NAMES[name]}.1", **own)
        for found, expected in zip(steps[number], wanted, strict=True):
            torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(outputs[number].value, generate(plain, torch.tensor(ids), **own))

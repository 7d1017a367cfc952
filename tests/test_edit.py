"""Interventions that stay: recorded once, held in every later trace, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import einops
import pytest
import torch

import pellucid
from client_fixtures import CardModel
from generating import generate
from pellucid_shared.errors import (
    ExecutionError,
    IndexOutOfRangeError,
    OrderError,
    RecordingError,
    ShapeError,
    ValueNotReadyError,
)
from references import capture, first, forward, with_first
from service import running_service
from tiny_models import NAMES

PROMPTS = ([[5, 9, 31, 7, 2, 40]], [[11, 3, 8]], [[1, 2, 3, 4], [9, 8, 7, 6]])
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
N = 4
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.fixture
def model(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


def close(found: Any, wanted: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def hooked(plain: Any, ids: list[list[int]], **changes: Change) -> torch.Tensor:
    """Logits of llama with hooks on its layers, ``l0=``, ``l1=``."""
    after = {}
    for name, change in changes.items():

        def hook(output: Any, change: Change = change) -> Any:
            return with_first(output, change(first(output).clone()))

        after[f"model.layers.{name[1:]}"] = hook
    found: torch.Tensor = forward(plain, torch.tensor(ids), after=after).logits
    return found


def logits_of(model: Any, ids: Any, **options: Any) -> Any:
    with model.trace(ids, **options):
        logits = model.lm_head.output.save()
    return logits  # noqa: RET504 (the end of the block fills it)


def line_of(mark: str) -> str:
    with open(__file__) as file:
        numbers = [i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {mark}")]
    assert len(numbers) == 1
    return f"{__file__}:{numbers[0]}"


# --- where an edit holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_holds_in_traces_and_generations_of_the_second_handle(name: str, tiny_models: Any) -> None:
    plain = tiny_models[name]
    model: Any = pellucid.LanguageModel(name, model=plain)
    path = f"{LAYERS.get(name, 'model.layers')}.0"
    head = "embed_out" if name == "gpt_neox" and hasattr(plain, "embed_out") else "lm_head"
    steer = torch.linspace(-1, 1, 32)
    with model.edit() as edited:
        h = model.get(f"{path}.output")
        h = h if isinstance(h, torch.Tensor) else h[0]
        h[:, -1] = h[:, -1] * 0.5 + steer

    def change(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] = h[:, -1] * 0.5 + steer
        return h

    after = {path: lambda output: with_first(output, change(first(output)))}
    for ids in PROMPTS:
        with edited.trace(ids):
            logits = model.get(f"{head}.output").save()
        with model.trace(ids):
            untouched = edited.get(f"{head}.output").save()
        close(logits, forward(plain, torch.tensor(ids), after=after).logits)
        close(untouched, forward(plain, torch.tensor(ids)).logits)
    with edited.generate(PROMPTS[0], max_new_tokens=N, eos_token_id=[]) as tracer:
        result = tracer.result.save()
        with tracer.iter[2]:
            last = model.get(f"{head}.output").save()
    seen: list[torch.Tensor] = []
    at = {path: lambda step, h: change(h), head: lambda step, h: seen.append(h.clone())}
    wanted = generate(plain, torch.tensor(PROMPTS[0]), at=at, max_new_tokens=N, eos_token_id=None)
    assert torch.equal(result, wanted)
    close(last, seen[2])


def test_each_invoke_gets_its_own(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output[:, 0] = model.layers[0].output.mean(1) * model.layers[0].output.shape[1]
    found = []
    with edited.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                found.append(model.lm_head.output.save())

    def change(h: torch.Tensor) -> torch.Tensor:
        h[:, 0] = h.mean(1) * h.shape[1]
        return h

    for ids, logits in zip(PROMPTS, found, strict=True):
        close(logits, hooked(plain, ids, l0=change))


def test_an_edit_holds_in_a_session_by_the_handle_of_each_trace(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output *= 2
    with model.session() as session:
        with session.trace(PROMPTS[0]):
            untouched = model.lm_head.output.save()
        with edited.trace(PROMPTS[1]):
            changed = model.lm_head.output.save()
        with model.edit() as other:  # between traces of a session
            model.layers[1].output *= 3
        with other.trace(PROMPTS[1]):
            others = model.lm_head.output.save()
    with edited.session() as session, session.trace(PROMPTS[2]):
        by_default = edited.lm_head.output.save()
    close(untouched, hooked(plain, PROMPTS[0]))
    close(changed, hooked(plain, PROMPTS[1], l0=lambda h: h * 2))
    close(others, hooked(plain, PROMPTS[1], l1=lambda h: h * 3))
    close(by_default, hooked(plain, PROMPTS[2], l0=lambda h: h * 2))


def test_edits_stack_in_order_and_are_cleared(model: Any, plain: Any) -> None:
    ids = PROMPTS[0]
    with model.edit() as one:
        one.layers[0].output = one.layers[0].output + 1
    with one.edit() as two:
        two.layers[0].output = two.layers[0].output * 2
    with two.edit(inplace=True) as same:
        same.layers[1].output[:, -1] = 0
    assert same is two

    def ended(h: torch.Tensor) -> torch.Tensor:
        h[:, -1] = 0
        return h

    close(logits_of(one, ids), hooked(plain, ids, l0=lambda h: h + 1))
    close(logits_of(two, ids), hooked(plain, ids, l0=lambda h: (h + 1) * 2, l1=ended))
    two.clear_edits()
    close(logits_of(two, ids), hooked(plain, ids))
    close(logits_of(one, ids), hooked(plain, ids, l0=lambda h: h + 1))
    close(logits_of(model, ids), hooked(plain, ids))


def test_an_edit_in_place_is_of_the_model_itself(model: Any, plain: Any) -> None:
    ids = PROMPTS[0]
    with model.edit(inplace=True):
        model.layers[0].output *= 2
    with model.trace(ids):
        h = model.layers[0].output.save()  # a read shows the edit
        model.layers[1].output *= 3  # and the trace's own come after
        logits = model.lm_head.output.save()
    close(h, capture(plain, torch.tensor(ids), "model.layers.0") * 2)
    close(logits, hooked(plain, ids, l0=lambda h: h * 2, l1=lambda h: h * 3))
    close(model.trace(ids, trace=False).logits, hooked(plain, ids, l0=lambda h: h * 2))
    with model.forward() as runner:
        for given in PROMPTS[:1]:
            with runner.invoke(given):
                pass
    close(runner.output["logits"], hooked(plain, ids, l0=lambda h: h * 2))
    model.clear_edits()
    close(logits_of(model, ids), hooked(plain, ids))


def test_a_handle_shares_names_and_the_loaded_model(model: Any) -> None:
    with model.edit() as edited:
        pass
    edited.rename({"model.layers": "blocks"})
    assert model.blocks[0].path == "model.layers.0"
    assert edited._target(False) is model._target(False)
    assert repr(edited) == repr(model)
    close(logits_of(edited, PROMPTS[0]), logits_of(model, PROMPTS[0]))


# --- what an edit holds ------------------------------------------------------------------------------------


def test_sizes_of_the_prompt_are_those_of_each_trace_and_step(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        h = model.layers[0].output
        batch, tokens, hidden = h.shape
        assert hidden == h.shape[-1] == h.size(2) == 32
        h.view(batch, tokens, 4, hidden // 4)[:, :, 1] = 0
        h[:, tokens - 1] = h[:, tokens // 2] + torch.ones(batch, hidden) * tokens
        h[:, -(1 + tokens % 2) :] += einops.rearrange(h, "b t (n d) -> (b t) n d", n=4).mean()
        h += torch.zeros(h.shape[:2])[..., None] + h.sum((0, 1)) / (2 * batch * tokens)

    def change(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        batch, tokens, _ = h.shape
        h.view(batch, tokens, 4, 8)[:, :, 1] = 0
        h[:, tokens - 1] = h[:, tokens // 2] + tokens
        h[:, -(1 + tokens % 2) :] += h.mean()
        return h + h.mean((0, 1)) / 2

    for ids in PROMPTS:
        close(logits_of(edited, ids), hooked(plain, ids, l0=change))
    with edited.generate(PROMPTS[1], max_new_tokens=N, eos_token_id=[]) as tracer:
        result = tracer.result.save()
    at = {"model.layers.0": lambda step, h: change(h)}
    assert torch.equal(
        result, generate(plain, torch.tensor(PROMPTS[1]), at=at, max_new_tokens=N, eos_token_id=None)
    )


def test_what_python_asks_of_a_size_is_refused_by_its_name(model: Any) -> None:
    name = r"model.layers.0.output.shape\[1\].* is a size of the prompts to come"
    with model.edit() as edited:
        h = model.layers[0].output
        tokens = h.shape[1]
        for ask in (
            lambda: tokens > 3,
            lambda: tokens == 3,
            lambda: int(tokens),
            lambda: 1 / tokens,
            lambda: bool(tokens),
            lambda: torch.tensor([tokens, 1]),
        ):
            with pytest.raises(RecordingError, match=name):
                ask()
        with pytest.raises(RecordingError, match=r"shape\[0\] is a size of the prompts to come"):
            len(h)
        with pytest.raises(RecordingError, match="a size of the prompts to come"):
            h.numel()
        with pytest.raises(RecordingError, match="where each prompt's tokens begin depends on the prompts"):
            _ = h.token[0]
        assert f"{tokens}" == "<model.layers.0.output.shape[1]>"
        assert "model.layers.0.output [batch, tokens, 32] float32" in repr(h)
        h *= 1
    with edited.trace(PROMPTS[0]):
        with pytest.raises(RecordingError, match=name):
            model.layers[1].output[:, tokens - 1] = 0
        model.lm_head.output.save()


def test_tensors_modules_and_random_numbers_are_part_of_an_edit(model: Any, plain: Any) -> None:
    vector = torch.linspace(0, 1, 32)
    with model.edit() as edited:
        h = model.layers[0].output
        noise = torch.randn(32)
        model.layers[1].output = model.layers[1].output + model.model.norm(h) + vector + noise
    vector.zero_()  # it went in as it was
    ids = PROMPTS[0]
    h = capture(plain, torch.tensor(ids), "model.layers.0")
    for seed in (3, 4):
        noise = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            added = plain.model.norm(h) + torch.linspace(0, 1, 32) + noise
        wanted = hooked(plain, ids, l1=lambda h, added=added: h + added)
        close(logits_of(edited, ids, seed=seed), wanted)


def test_tuples_of_earlier_years(plain: Any) -> None:
    model: Any = pellucid.LanguageModel("llama", model=plain, tuple_outputs=True)
    with model.edit() as edited:
        model.layers[0].output[0][:, -1] = 0
    with edited.trace(PROMPTS[0]):
        logits = model.lm_head.output.save()

    def ended(h: torch.Tensor) -> torch.Tensor:
        h[:, -1] = 0
        return h

    close(logits, hooked(plain, PROMPTS[0], l0=ended))


def test_the_graph_of_an_edited_trace_says_all(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output += torch.ones(32)
    with edited.generate(PROMPTS[0], max_new_tokens=3, eos_token_id=[]) as tracer:
        result = tracer.result.save("ids")
    assert pellucid.Graph.from_json(tracer.graph.to_json()) == tracer.graph
    again = model.run(tracer.experiment)  # the edit is in the experiment: whoever runs it needs no handle
    assert torch.equal(again["ids"], result)


def test_texts_for_a_server_are_tokenized_only_where_an_edit_asks_their_sizes() -> None:
    model: Any = CardModel(answer=lambda graph: {})
    with model.edit() as edited:
        model.h[0].output[:, -1] = 0
    with edited.trace("hello") as tracer:
        pass
    assert model.made.trips == []
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "setitem"]
    with edited.edit(inplace=True):
        h = model.h[0].output
        h[:, h.shape[1] // 2] = 0
    with edited.trace("hello") as tracer:
        pass
    assert model.made.trips == [["hello"]]
    assert tracer.graph.nodes[-1].args[1] == (slice(None), 2)


def test_a_size_that_a_loop_took_for_a_number_fails_at_its_line() -> None:
    model: Any = CardModel(distant=False, answer=lambda graph: {})
    with model.edit() as edited:
        h = model.h[0].output
        for token in range(h.shape[1]):
            h[:, token] = 0  # of a loop
    with pytest.raises(IndexOutOfRangeError, match="in an edit of the model") as caught:
        with edited.trace("hello"):
            pass
    assert str(caught.value).startswith(line_of("of a loop"))


# --- errors ------------------------------------------------------------------------------------------------


def test_what_an_edit_cannot_hold_is_refused(model: Any) -> None:
    with pytest.raises(RecordingError, match=r"test_edit.py:\d+: nothing is saved in an edit"), model.edit():
        model.layers[0].output.save()
    kept = torch.zeros(2)
    with pytest.raises(RecordingError, match="nothing is saved in an edit"), model.edit():
        kept[0] = model.layers[0].output.mean()
    assert type(kept) is torch.Tensor
    with pytest.raises(RecordingError, match="an edit has no steps of its own"), model.edit():
        model.layers[0].next().output[:] = 0
    with pytest.raises(RecordingError, match="an edit has no steps of its own"), model.edit():
        with model.layers[0].all():
            pass
    with pytest.raises(RecordingError, match="one forward pass ends with no ids"), model.edit():
        _ = model.generator.output
    with pytest.raises(RecordingError, match="an edit is not made inside a trace"), model.trace(PROMPTS[0]):
        with model.edit():
            pass
    with pytest.raises(RecordingError, match="an edit is not made inside a trace or another"), model.edit():
        with model.edit():
            pass
    with pytest.raises(RecordingError, match="cannot be opened inside another"), model.edit():
        with model.trace(PROMPTS[0]):
            pass


def test_a_line_that_fits_some_prompts_only_is_refused_in_the_edit(model: Any) -> None:
    with pytest.raises(ShapeError, match=r"\[batch, tokens, 32\] and \[1, 6, 32\].*an edit holds for every"):
        with model.edit():
            model.layers[0].output += torch.ones(1, 6, 32)
    with pytest.raises(OrderError, match=r"needs model.layers.1.output") as caught, model.edit():
        model.layers[0].output = model.layers[1].output  # too late
    assert str(caught.value).startswith(line_of("too late"))


def test_a_failed_edit_is_not_kept(model: Any, plain: Any) -> None:
    with pytest.raises(KeyError), model.edit(inplace=True):
        model.layers[0].output *= 2
        raise KeyError
    close(logits_of(model, PROMPTS[0]), hooked(plain, PROMPTS[0]))


def test_a_value_of_an_edit_is_of_no_use_outside(model: Any) -> None:
    with model.edit() as edited:
        h = model.layers[0].output
    match = "was made in an edit, which has no run of its own: read the site again"
    for use in (lambda: h + 1, lambda: h.shape, lambda: h.value, lambda: torch.exp(h)):
        with pytest.raises(ValueNotReadyError, match=match):
            use()
    with pytest.raises(ValueNotReadyError, match=match), edited.trace(PROMPTS[0]):
        model.layers[1].output = h


def test_an_error_in_a_trace_names_the_line_of_the_edit_and_that_of_the_trace(model: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output[:, 4] = 0  # fifth token
    logits_of(edited, PROMPTS[0])
    with pytest.raises(IndexOutOfRangeError, match=r"\(in an edit of the model, for the trace at ") as caught:
        with edited.trace(PROMPTS[1]):  # short prompt
            pass
    assert str(caught.value).startswith(line_of("fifth token"))
    assert line_of("short prompt") in str(caught.value)
    with pytest.raises(IndexOutOfRangeError, match="in an edit") as caught:
        with edited.generate(PROMPTS[0], max_new_tokens=3):
            pass
    assert str(caught.value).startswith(line_of("fifth token"))
    with pytest.raises(IndexOutOfRangeError, match="in an edit"), edited.trace() as tracer:
        with pytest.raises(IndexOutOfRangeError), tracer.invoke(PROMPTS[1]):
            pass
        with tracer.invoke(PROMPTS[0]):  # half an edit is written: catching the error does not mend that
            pass


def test_an_error_of_the_run_names_the_line_of_the_edit(model: Any) -> None:
    with model.edit() as edited:
        model.layers[1].output += model.layers[0].output.transpose(1, 2).view(-1)[:32]  # no view
    with pytest.raises(ExecutionError) as caught:
        logits_of(edited, PROMPTS[0])
    assert str(caught.value).startswith(line_of("no view"))


# --- on a server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"llama": tiny_folders["llama"]}, tmp_path_factory.mktemp("edits")) as url:
        yield url


@pytest.mark.xdist_group("service-edits")
def test_edits_hold_on_a_server(service: str, plain: Any) -> None:
    model: Any = pellucid.LanguageModel("llama", remote=service)
    steer = torch.linspace(-1, 1, 32)
    with model.edit() as edited:
        h = model.layers[0].output
        h[:, h.shape[1] - 1] += steer

    def change(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] += steer
        return h

    found = []
    with edited.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                found.append(model.lm_head.output.save())
    for ids, logits in zip(PROMPTS, found, strict=True):
        close(logits, hooked(plain, ids, l0=change))
    with edited.generate(PROMPTS[1], max_new_tokens=N, eos_token_id=[]) as tracer:
        result = tracer.result.save()
    at = {"model.layers.0": lambda step, h: change(h)}
    assert torch.equal(
        result, generate(plain, torch.tensor(PROMPTS[1]), at=at, max_new_tokens=N, eos_token_id=None)
    )
    close(logits_of(model, PROMPTS[0]), hooked(plain, PROMPTS[0]))

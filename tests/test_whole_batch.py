"""Bodies over the whole batch, against one left-padded batch with plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pellucid
from generating import generate
from pellucid_shared.errors import (
    IndexOutOfRangeError,
    OrderError,
    RecordingError,
    ShapeError,
    SiteError,
)
from references import capture, first, forward, with_first
from service import running_service
from tiny_models import NAMES

A, B, C = [[5, 9, 31, 7, 2, 40]], [[11, 3, 8]], [[1, 2, 3, 4], [9, 8, 7, 6]]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
#: The three as the tokenizer would give them with padding_side="left".
IDS = torch.tensor([[5, 9, 31, 7, 2, 40], [0, 0, 0, 11, 3, 8], [0, 0, 1, 2, 3, 4], [0, 0, 9, 8, 7, 6]])
MASK = torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
#: Where each of the three stands in it.
PLACES = ((slice(0, 1), slice(0, None)), (slice(1, 2), slice(3, None)), (slice(2, 4), slice(2, None)))
N = 4


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, Any]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(models: Any) -> Any:
    return models["llama"]


@pytest.fixture
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


def layer(name: str, index: int = 0) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{index}"


def close(found: Any, wanted: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def at_tokens(found: Any, wanted: torch.Tensor) -> None:
    """Equal where there are tokens; zeros where there are none."""
    there = MASK.bool().reshape(*MASK.shape, *[1] * (wanted.ndim - 2))
    close(found, torch.where(there, wanted, torch.zeros_like(wanted)))


def three(tracer: Any) -> None:
    for ids in (A, B, C):
        with tracer.invoke(ids):
            pass


def line_of(mark: str) -> str:
    with open(__file__) as file:
        numbers = [i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {mark}")]
    assert len(numbers) == 1
    return f"{__file__}:{numbers[0]}"


# --- reading -----------------------------------------------------------------------------------------------


def test_sites_are_seen_as_one_left_padded_batch(models: Any, tiny_models: Any, name: str) -> None:
    model, plain = models[name], tiny_models[name]
    head = "embed_out" if name == "gpt_neox" and hasattr(plain, "embed_out") else "lm_head"
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            h = model.get(f"{layer(name)}.output")
            assert h.shape == (4, 6, 32)
            assert f"{layer(name)}.output of the whole batch [4, 6, 32] float32" in repr(h)
            mean = h[:, -1].mean(0).save()
            h.save()
            taken = model.get(f"{layer(name, 1)}.input").save()
            logits = model.get(f"{head}.output").save()
            by_field = model.output.logits.save()
    at_tokens(h, capture(plain, IDS, layer(name), mask=MASK))
    close(mean, capture(plain, IDS, layer(name), mask=MASK)[:, -1].mean(0))
    at_tokens(taken, capture(plain, IDS, layer(name, 1), "input", mask=MASK))
    at_tokens(logits, forward(plain, IDS, mask=MASK).logits)
    assert torch.equal(by_field, logits)


def test_ids_are_padded_with_the_pad_token(tiny_models: Any) -> None:
    plain = tiny_models["llama"]
    model: Any = pellucid.LanguageModel("llama", model=plain)
    model.card.config["pad_token_id"] = 7  # the card is this model's own
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            ids = model.input.save()
            embedded = model.model.embed_tokens.input.save()
    assert torch.equal(ids, torch.where(MASK.bool(), IDS, 7))
    assert torch.equal(embedded, ids)


def test_values_cross_into_the_body_and_out_of_it(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            one = model.layers[0].output
        with tracer.invoke(B):
            pass
        with tracer.invoke():  # of the two before it
            both = model.layers[0].output
            assert both.shape == (2, 6, 32)
            total = (both.sum() + one.sum()).save()
        with tracer.invoke(C):
            model.layers[1].output[:, -1] = both[:, -1]
            logits = model.lm_head.output.save()
    h = [capture(plain, torch.tensor(ids), "model.layers.0") for ids in (A, B)]
    close(total, 2 * h[0].sum() + h[1].sum())
    last = torch.cat([x[:, -1] for x in h])

    def patched(output: Any) -> Any:
        changed = first(output).clone()
        changed[:, -1] = last
        return with_first(output, changed)

    close(logits, forward(plain, torch.tensor(C), after={"model.layers.1": patched}).logits)


def test_flat_rows_of_a_router(models: Any, tiny_models: Any) -> None:
    model, plain = models["mixtral"], tiny_models["mixtral"]
    path = next(call.module for call in model.card.prefill if _is_flat(call.args))
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            rows = model.get(f"{path}.input")
            before = rows.clone().save()
            rows[:] = rows * 2
            model.get(f"{path}.input")[0] = 1.0
            logits = model.lm_head.output.save()

    def doubled(args: Any, kwargs: Any) -> None:
        args[0].mul_(2)  # one object with what the experts take
        args[0][0] = 1

    found = capture(plain, IDS, path, "input", mask=MASK)
    assert before.shape == found.shape == (24, 32)
    at_tokens(before.reshape(4, 6, 32), found.reshape(4, 6, 32))
    at_tokens(logits, forward(plain, IDS, mask=MASK, before={path: doubled}).logits)


def _is_flat(args: Any) -> bool:
    return any((getattr(leaf, "shape", None) or ("",))[0] == "rows" for leaf in args)


def test_with_one_invoke_it_is_that_invokes_own(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke():
            model.layers[0].output[:, -1] = 0
            cosine = model.model.rotary_emb.output[0].save()
            logits = model.lm_head.output.save()
    assert {node.op for node in tracer.graph.nodes} <= {"site.get", "setitem", "save"}
    assert cosine.shape == (1, 6, 8)

    def ended(output: Any) -> Any:
        changed = first(output).clone()
        changed[:, -1] = 0
        return with_first(output, changed)

    close(logits, forward(plain, torch.tensor(A), after={"model.layers.0": ended}).logits)


# --- writing -----------------------------------------------------------------------------------------------

BIAS = torch.linspace(-1, 1, 4 * 6 * 32).reshape(4, 6, 32)


def _through_views(h: Any) -> None:
    last = h[:, -1]
    last[1:] *= 2
    h.transpose(1, 2)[:, :4] = 3


def _in_place(h: Any) -> None:
    h[:, -1] = 0
    h[2:, 3:] *= 3
    h[:, [0, 4]] += 1
    h += h.mean(-1, keepdim=True)


EDITS: dict[str, Callable[[Any], None]] = {
    "last token": lambda h: h.__setitem__((slice(None), -1), 0),
    "one row": lambda h: h.__setitem__(1, h[0]),
    "by a mask": lambda h: h.__setitem__(h > 0, 0),
    "through views": _through_views,
    "several": _in_place,
    "a method": lambda h: h.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_in_place_reach_the_model(models: Any, tiny_models: Any, name: str, edit: str) -> None:
    model, plain = models[name], tiny_models[name]
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            h = model.get(f"{layer(name)}.output")
            EDITS[edit](h)
            again = model.get(f"{layer(name)}.output").save()  # one name for one tensor
            h.save()
            logits = model.output.logits.save()
    seen: list[torch.Tensor] = []

    def changed(output: Any) -> Any:
        tensor = first(output).clone()
        EDITS[edit](tensor)
        seen.append(tensor)
        return with_first(output, tensor)

    wanted = forward(plain, IDS, mask=MASK, after={layer(name): changed}).logits
    there = MASK.bool()
    close(h[there], seen[0][there])
    assert torch.equal(again, h)
    close(logits[there], wanted[there])


def _assign(model: Any) -> None:
    model.layers[0].output[:, -2:] = 1.5


def _augment(model: Any) -> None:
    model.layers[0].output *= 2
    model.layers[0].output[:, -1] -= 1


def _replace(model: Any) -> None:
    model.layers[0].output = model.layers[0].output * 2 + BIAS


def _by_a_tensor(model: Any) -> None:
    model.layers[0].output = BIAS


def _by_a_number(model: Any) -> None:
    model.layers[0].mlp.output = 0.25


def _of_arguments(model: Any) -> None:
    model.layers[1].input = model.layers[1].input + BIAS


def _of_what_another_holds(model: Any) -> None:
    model.layers[1].input_layernorm.input[:, -1] = 2  # the residual stream itself: one object


def _of_a_member(model: Any) -> None:
    model.layers[1].self_attn.output[0][:, -1] = 0


def _of_a_tuple(model: Any) -> None:
    out = model.layers[1].self_attn.output
    model.layers[1].self_attn.output = (out[0] * 2, *out[1:])


def _of_a_member_replaced(model: Any) -> None:
    model.layers[1].self_attn.output[0] = BIAS


def _by_tokens(model: Any) -> None:
    h = model.layers[0].output
    h.token[0] = 2
    h.t[1:3] *= 3


def _hook_tokens(h: torch.Tensor) -> torch.Tensor:
    for row, start in enumerate((6 - MASK.sum(1)).tolist()):
        h[row, start] = 2
        h[row, start + 1 : start + 3] *= 3
    return h


def _set(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(h: torch.Tensor) -> torch.Tensor:
        h[index] = value
        return h

    return change


def _halves(h: torch.Tensor) -> torch.Tensor:
    h *= 2
    h[:, -1] -= 1
    return h


LAST = (slice(None), -1)
WRITES: dict[str, tuple[Callable[[Any], None], str, str, Callable[[torch.Tensor], Any]]] = {
    "index": (_assign, "after", "model.layers.0", _set((slice(None), slice(-2, None)), 1.5)),
    "augmented": (_augment, "after", "model.layers.0", _halves),
    "replacement": (_replace, "after", "model.layers.0", lambda h: h * 2 + BIAS),
    "a tensor": (_by_a_tensor, "after", "model.layers.0", lambda h: BIAS),
    "a number": (_by_a_number, "after", "model.layers.0.mlp", lambda h: torch.full_like(h, 0.25)),
    "an argument": (_of_arguments, "before", "model.layers.1", lambda h: h + BIAS),
    "an alias": (_of_what_another_holds, "before", "model.layers.1", _set(LAST, 2)),
    "a member": (_of_a_member, "after", "model.layers.1.self_attn", _set(LAST, 0)),
    "a tuple": (_of_a_tuple, "after", "model.layers.1.self_attn", lambda h: h * 2),
    "a member replaced": (_of_a_member_replaced, "after", "model.layers.1.self_attn", lambda h: BIAS),
    "tokens": (_by_tokens, "after", "model.layers.0", _hook_tokens),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_at_sites(model: Any, plain: Any, write: str) -> None:
    body, when, path, change = WRITES[write]
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            body(model)
            logits = model.lm_head.output.save()
    close(logits[MASK.bool()], hooked(plain, when, path, change)[MASK.bool()])


def hooked(plain: Any, when: str, path: str, change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    def before(args: Any, kwargs: Any) -> Any:
        return (change(args[0].clone()), *args[1:]), kwargs

    def after(output: Any) -> Any:
        return with_first(output, change(first(output).clone()))

    hooks: dict[str, Any] = {when: {path: before if when == "before" else after}}
    found: torch.Tensor = forward(plain, IDS, mask=MASK, **hooks).logits
    return found


def test_what_was_edited_in_place_is_not_replaced_as_well(model: Any) -> None:
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            model.layers[0].output *= 2
            model.layers[0].output[:, -1] += 1
    assert "site.set" not in {node.op for node in tracer.graph.nodes}


def test_a_replacement_leaves_names_alone(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            old = model.layers[0].output
            model.layers[0].output = 2 * old
            old[:] = 0  # names the tensor that was replaced
            new = model.layers[0].output.save()
            old.save()
            logits = model.lm_head.output.save()
    at_tokens(new, 2 * capture(plain, IDS, "model.layers.0", mask=MASK))
    assert old.abs().sum() == 0
    close(
        logits[MASK.bool()],
        hooked(plain, "after", "model.layers.0", lambda h: h * 2)[MASK.bool()],
    )


def test_a_name_of_an_invoke_shows_the_edit_of_the_batch(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke(B):
            own = model.layers[0].output
            kept = own.clone().save()
        with tracer.invoke():
            model.layers[0].output[:, -1] = 5
        own = (own + 0).save()
    wanted = capture(plain, torch.tensor(B), "model.layers.0")
    close(kept, wanted)
    wanted[:, -1] = 5
    close(own, wanted)


def test_earlier_spellings(plain: Any) -> None:
    model: Any = pellucid.LanguageModel("llama", model=plain)
    with model.forward() as runner:
        three(runner)
        with runner.invoke():
            model.layers[0].output[0][:, -1] = 0
    close(
        runner.output["logits"][MASK.bool()],
        hooked(plain, "after", "model.layers.0", _set(LAST, 0))[MASK.bool()],
    )


def test_edits_of_the_model_hold_once_for_each_invoke(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output *= 2
    with edited.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            h = model.layers[0].output.save()
    at_tokens(h, 2 * capture(plain, IDS, "model.layers.0", mask=MASK))


# --- generation --------------------------------------------------------------------------------------------


def test_generations_step_by_step(models: Any, tiny_models: Any, name: str) -> None:
    model, plain = models[name], tiny_models[name]
    with model.generate(max_new_tokens=N, eos_token_id=[], pad_token_id=0) as tracer:
        three(tracer)
        with tracer.invoke():
            model.get(f"{layer(name)}.output")[:, -1] *= 2
            for step in tracer.iter[1:]:
                h = model.get(f"{layer(name)}.output")
                assert h.shape == (4, 1, 32)
                h[1:] = h[1:] + step
            with tracer.iter[1:]:
                seen = model.get(f"{layer(name, 1)}.output").save()
            result = tracer.result.save()
    captured: list[torch.Tensor] = []

    def change(step: int, h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        if step == 0:
            h[:, -1] *= 2
        else:
            h[1:] += step
        return h

    at = {layer(name): change, layer(name, 1): lambda step, h: captured.append(h.clone())}
    wanted = generate(plain, IDS, mask=MASK, at=at, max_new_tokens=N, eos_token_id=None)
    assert torch.equal(result, wanted)
    for one, other in zip(seen, captured[1:], strict=True):
        close(one, other)


def test_bodies_for_all_steps(model: Any) -> None:
    with model.generate(max_new_tokens=3, eos_token_id=[]) as tracer:
        for ids in (A, [[1, 2, 3, 4, 5, 6]]):
            with tracer.invoke(ids):
                pass
        with tracer.invoke(), tracer.all():
            h = model.layers[0].output.save()
    assert [tuple(x.shape) for x in h] == [(2, 6, 32), (2, 1, 32), (2, 1, 32)]
    with pytest.raises(RecordingError, match=r"write `with tracer.iter\[0\]:` and `with tracer.iter\[1:\]:`"):
        with model.generate(max_new_tokens=3, eos_token_id=[]) as tracer:
            three(tracer)
            with tracer.invoke(), tracer.all():
                model.layers[0].output.save()
    with pytest.raises(RecordingError, match=r"read tracer.result in each invoke, or generate with eos"):
        with model.generate(max_new_tokens=3) as tracer:
            three(tracer)
            with tracer.invoke():
                tracer.result.save()


# --- errors ------------------------------------------------------------------------------------------------


def refused(model: Any, error: type[Exception], match: str, body: Callable[[], Any]) -> str:
    with pytest.raises(error, match=match) as caught, model.trace() as tracer:
        three(tracer)
        with tracer.invoke():
            body()
    return str(caught.value)


def test_mistakes_are_named(model: Any) -> None:
    with pytest.raises(RecordingError, match=r"body over the inputs before it, and there is none"):
        with model.trace() as tracer, tracer.invoke():
            pass
    with pytest.raises(RecordingError, match="was given its input"), model.trace(A) as tracer:
        with tracer.invoke():
            pass
    with pytest.raises(RecordingError, match="cannot be opened inside another"), model.trace() as tracer:
        with tracer.invoke(A), tracer.invoke():
            pass
    rotary = model.model.rotary_emb
    refused(
        model,
        SiteError,
        r"rotary_emb.output\[0\] is \[1, tokens, 8\].* has no batch axis",
        lambda: rotary.output[0],
    )

    def misshapen() -> None:
        model.layers[0].output = torch.zeros(4, 5, 32)  # five tokens

    text = refused(
        model, ShapeError, r"whole batch has shape \[4, 6, 32\] and was given .*\[4, 5, 32\]", misshapen
    )
    assert text.startswith(line_of("five tokens"))

    def late() -> None:
        model.layers[0].output[:, -1] = model.layers[1].output[:, -1]  # later

    text = refused(model, OrderError, "take .clone", late)
    assert text.startswith(line_of("later"))

    def late_replacement() -> None:
        model.layers[0].output = model.layers[1].output

    refused(model, OrderError, "needs model.layers.1.output", late_replacement)
    refused(
        model,
        IndexOutOfRangeError,
        "row 1 of the prompt has 3 tokens",
        lambda: model.layers[0].output.token[3],
    )


def test_an_edit_that_would_undo_one_by_another_name_is_refused(model: Any) -> None:
    with pytest.raises(
        RecordingError, match="was read before one invoke's own value of it was edited, at"
    ) as caught:
        with model.trace() as tracer:
            with tracer.invoke(A):
                own = model.layers[0].output
            with tracer.invoke(B):
                pass
            with tracer.invoke():
                h = model.layers[0].output
                own[:, 0] = 1  # own name
                again = model.layers[0].output
                again[:, -1] = 2  # read again: it has both
                h[:, -1] = 2
    assert line_of("own name") in str(caught.value)


# --- on a server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"smollm2": smollm2}, tmp_path_factory.mktemp("whole")) as url:
        yield url


@pytest.mark.xdist_group("service-whole")
def test_texts_on_a_server_are_padded_as_the_tokenizer_pads_them(service: str, smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = pellucid.LanguageModel("smollm2", remote=service)
    texts = ["The Eiffel Tower is in the city of", "Hello"]
    with model.trace() as tracer:
        for text in texts:
            with tracer.invoke(text):
                pass
        with tracer.invoke():
            h = model.model.layers[3].output
            h[:, -1] *= 1.5
            h.save()
            logits = model.lm_head.output[:, -1].save()
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto").eval()
    seen: list[torch.Tensor] = []

    def after(output: Any) -> Any:
        changed = first(output).clone()
        changed[:, -1] *= 1.5
        seen.append(changed)
        return with_first(output, changed)

    wanted = forward(plain, batch["input_ids"], mask=batch["attention_mask"], after={"model.layers.3": after})
    there = batch["attention_mask"].bool()
    scale = float(seen[0].abs().max())
    torch.testing.assert_close(h[there], seen[0][there], atol=1e-4 * scale, rtol=1e-4)
    torch.testing.assert_close(logits, wanted.logits[:, -1], atol=1e-3, rtol=1e-3)

"""Gradients, local and remote, against plain autograd with plain hooks."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pellucid
from experiments import at
from pellucid_shared.errors import (
    GradientError,
    NotYetError,
    OrderError,
    PellucidError,
    ShapeError,
)
from pellucid_shared.show import show
from references import first, with_first
from tiny_models import HIDDEN, NAMES, VOCAB

IDS = [[5, 9, 31, 7, 22, 40]]
PROMPTS = [IDS, [[11, 3, 8, 12], [4, 15, 16, 7]], [[42]]]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
EMBED = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
NORM = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}


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


@pytest.fixture(params=["packed", "one by one"])
def either(request: pytest.FixtureRequest, model: Any) -> Iterator[Any]:
    """The model, with invokes that share a pass and with invokes that take turns."""
    engine = model._target(None).engine
    card = engine.card
    engine.card = card.model_copy(update={"packs": request.param == "packed"})
    yield model
    engine.card = card


def layer(name: str, index: int) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{index}"


def close(found: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    wanted = wanted.detach()
    largest = max(scale, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, atol=1e-4 * largest, rtol=1e-3)


class Tape(dict[str, torch.Tensor]):
    """What plain hooks saw in a pass that records gradients; ``grads`` holds their gradients, each that of
    the version that was current in the hook."""

    def __init__(self) -> None:
        super().__init__()
        self.grads: dict[str, torch.Tensor] = {}
        self.change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def see(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        self[key] = tensor

        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            new = self.change[key](gradient) if key in self.change else None
            self.grads[key] = gradient if new is None else new
            return new

        tensor.register_hook(hook)
        return tensor


def taped(
    model: torch.nn.Module,
    ids: list[list[int]],
    sees: dict[str, str],
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    tape: Tape | None = None,
) -> Tape:
    """A forward pass; ``sees`` maps a key to ``path.output`` or ``path.input``, ``edits`` a path to what its
    output becomes (after it was seen)."""
    tape = Tape() if tape is None else tape
    handles = []

    def after(module: Any, args: Any, output: Any, key: str) -> None:
        tape.see(key, first(output))

    def before(module: Any, args: Any, kwargs: Any, key: str) -> None:
        tape.see(key, args[0] if args else next(iter(kwargs.values())))

    for key, place in sees.items():
        path, _, kind = place.rpartition(".")
        module = model.get_submodule(path)
        if kind == "output":
            handles.append(module.register_forward_hook(lambda m, a, o, key=key: after(m, a, o, key)))
        else:
            hook = lambda m, a, k, key=key: before(m, a, k, key)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for path, edit in (edits or {}).items():
        change = lambda m, a, o, edit=edit: with_first(o, edit(first(o)))  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(change))
    try:
        tape["logits"] = model(input_ids=torch.tensor(ids), use_cache=False).logits
        return tape
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(autouse=True)
def nothing_stays(tiny_models: Any) -> Iterator[None]:
    """A run leaves no gradient on a weight, no hook on a module, and weights as they were."""
    for model in tiny_models.values():
        model.zero_grad(set_to_none=True)
    before = {name: [p.requires_grad for p in model.parameters()] for name, model in tiny_models.items()}
    yield
    for name, model in tiny_models.items():
        assert before[name] == [p.requires_grad for p in model.parameters()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        model.zero_grad(set_to_none=True)
    assert torch.is_grad_enabled()


# --- reading -----------------------------------------------------------------------------------------------


def test_gradients_at_every_kind_of_place(model: Any, plain: Any, name: str) -> None:
    places = {
        "embed": f"{EMBED.get(name, 'model.embed_tokens')}.output",
        "in": f"{layer(name, 0)}.input",
        "attention": f"{layer(name, 0)}.{ATTENTION.get(name, 'self_attn')}.output",
        "h": f"{layer(name, 0)}.output",
        "mlp in": f"{layer(name, 1)}.mlp.input",
        "mlp": f"{layer(name, 1)}.mlp.output",
        "normed": f"{NORM.get(name, 'model.norm')}.output",
        "logits out": "lm_head.output",
    }
    with model.trace(IDS):
        values = {}
        for key, place in places.items():
            path, _, kind = place.rpartition(".")
            value = getattr(at(model, path), kind)
            values[key] = value[0] if key == "attention" else value
        computed = values["h"] * 2
        loss = (model.lm_head.output[:, -1] ** 2).sum() + computed.sum() + (computed**2).mean()
        loss.backward()
        grads = {key: value.grad.save() for key, value in values.items()}
        of_computed = computed.grad.save()
        of_loss = loss.grad.save()
        loss.save()
    tape = taped(plain, IDS, places)
    doubled = tape.see("computed", tape["h"] * 2)
    wanted = (tape["logits"][:, -1] ** 2).sum() + doubled.sum() + (doubled**2).mean()
    wanted.backward()
    close(loss, wanted)
    for key, found in grads.items():
        close(found, tape.grads[key])
    close(of_computed, tape.grads["computed"])
    assert of_loss == 1


def test_each_gradient_asked_alone_is_the_same(model: Any, plain: Any, name: str) -> None:
    """Tracking begins at that one tensor, and all the model does with it counts."""
    inside = {"gpt_neox": "post_attention_layernorm", "gpt2": "ln_2"}.get(name, "post_attention_layernorm")
    places = [
        f"{layer(name, 0)}.input",
        f"{layer(name, 1)}.{inside}.input",
        f"{layer(name, 1)}.{inside}.output",
        f"{layer(name, 1)}.mlp.input",
    ]
    tape = taped(plain, IDS, {place: place for place in places})
    tape["logits"].pow(2).mean().backward()
    for place in places:
        path, _, kind = place.rpartition(".")
        with model.trace(IDS):
            gradient = getattr(at(model, path), kind).grad.save()
            model.lm_head.output.pow(2).mean().backward()
        close(gradient, tape.grads[place])


def test_what_the_model_did_with_a_tensor_before_it_is_read_counts(models: Any, tiny_models: Any) -> None:
    """GPT-NeoX gives one tensor to two norms; the gradient read at the second is that of both."""
    plain, model = tiny_models["gpt_neox"], models["gpt_neox"]
    second = "gpt_neox.layers.1.post_attention_layernorm"
    with model.trace(IDS):
        gradient = at(model, second).input.grad.save()
        model.lm_head.output[:, -1].sum().backward()
    tape = taped(plain, IDS, {"x": f"{second}.input"})
    tape["logits"][:, -1].sum().backward()
    close(gradient, tape.grads["x"])
    with model.trace() as tracer:  # in a pass that is shared
        found = []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                found.append(at(model, second).input.grad.save())
                model.lm_head.output[:, -1].sum().backward()
    for ids, gradient in zip(PROMPTS, found, strict=True):
        tape = taped(plain, ids, {"x": f"{second}.input"})
        tape["logits"][:, -1].sum().backward()
        close(gradient, tape.grads["x"])


def test_the_gradient_of_a_batch_with_padding(llama: Any, plain_llama: Any) -> None:
    with llama.trace([[5, 9, 31, 7, 22, 40], [11, 3, 8]]):
        gradient = llama.layers[0].output.grad.save()
        llama.lm_head.output[:, -1].sum().backward()
    for row, ids in enumerate(([5, 9, 31, 7, 22, 40], [11, 3, 8])):
        tape = taped(plain_llama, [ids], {"h": "model.layers.0.output"})
        tape["logits"][:, -1].sum().backward()
        close(gradient[row : row + 1, -len(ids) :], tape.grads["h"])


def test_a_value_that_is_no_site_and_one_made_of_nothing(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        steering = torch.zeros(HIDDEN).requires_grad_()
        steering.retain_grad()
        llama.layers[0].output += steering
        view = steering[3:5]
        loss = llama.lm_head.output.logsumexp(-1).sum() + view.sum() * 3
        loss.backward()
        gradient = steering.grad.save()
        of_view = view.grad.save()
    wanted = torch.zeros(HIDDEN, requires_grad=True)
    tape = taped(plain_llama, IDS, {}, {"model.layers.0": lambda h: h + wanted})
    (tape["logits"].logsumexp(-1).sum() + wanted[3:5].sum() * 3).backward()
    assert wanted.grad is not None
    close(gradient, wanted.grad)
    assert torch.equal(of_view, torch.full((2,), 3.0))


def test_every_spelling_of_backward(llama: Any, plain_llama: Any) -> None:
    weights = torch.linspace(-1, 1, VOCAB)
    found: list[Any] = []
    with llama.trace(IDS):  # named before it, as the founding spelling has it
        found.append(llama.layers[0].backward_output.save())
        (llama.lm_head.output[0, -1] * weights).sum().backward()
    with llama.trace(IDS):  # after it
        h = llama.layers[0].output
        (llama.lm_head.output[0, -1] * weights).sum().backward(retain_graph=True)
        found.append(h.grad.save())
    with llama.trace(IDS):  # in its block
        h = llama.layers[0].output
        with (llama.lm_head.output[0, -1] * weights).sum().backward():
            found.append(h.grad.save())
    with llama.trace(IDS):  # with a gradient to begin with
        llama.lm_head.output[0, -1].backward(weights)
        found.append(llama.layers[1].backward_input.save())
    with llama.trace(IDS):
        llama.lm_head.output[0, -1].backward(gradient=llama.lm_head.output[0, -1].detach() * 0 + weights)
        found.append(llama.layers[1].input.grad.save())
    tape = taped(plain_llama, IDS, {"h": "model.layers.0.output"})
    tape["logits"][0, -1].backward(weights)
    assert len(found) == 5
    for gradient in found:
        close(gradient, tape.grads["h"])


def test_two_backward_passes_have_gradients_of_their_own(model: Any, plain: Any, name: str) -> None:
    with model.trace(IDS):
        h = at(model, layer(name, 0)).output
        logits = model.lm_head.output
        with logits[0, -1, 7].backward(retain_graph=True):
            one = h.grad.save()
        with logits[0, -2, 3].backward():
            two = h.grad.save()
            both = (one + h.grad).norm().save()
        logits[0, 0].sum().backward()
        three = h.grad.save()
    wanted = []
    tape = taped(plain, IDS, {"h": f"{layer(name, 0)}.output"})
    for loss in (tape["logits"][0, -1, 7], tape["logits"][0, -2, 3], tape["logits"][0, 0].sum()):
        loss.backward(retain_graph=True)
        wanted.append(tape.grads["h"].clone())
    for found, expected in zip((one, two, three), wanted, strict=True):
        close(found, expected)
    close(both, (wanted[0] + wanted[1]).norm())


def test_a_pass_over_what_a_later_one_needs_is_kept_without_being_asked(llama: Any) -> None:
    with llama.trace(IDS):
        h, logits = llama.layers[0].output, llama.lm_head.output
        logits.sum().backward(retain_graph=False)
        logits.pow(2).sum().backward()
        h.grad.save()


# --- invokes -----------------------------------------------------------------------------------------------


def test_each_invoke_has_its_own_pass(either: Any, plain: Any, name: str) -> None:
    saved = []
    with either.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                early = at(either, layer(name, 0)).output.grad.save()
                loss = either.lm_head.output[:, -1].logsumexp(-1).sum()
                loss.backward()
                late = at(either, layer(name, 1)).mlp.output.grad.save()
                saved.append((early, late))
    for ids, (early, late) in zip(PROMPTS, saved, strict=True):
        tape = taped(plain, ids, {"h": f"{layer(name, 0)}.output", "m": f"{layer(name, 1)}.mlp.output"})
        tape["logits"][:, -1].logsumexp(-1).sum().backward()
        close(early, tape.grads["h"])
        close(late, tape.grads["m"])


def test_a_loss_over_several_invokes(either: Any, plain: Any, name: str) -> None:
    with either.trace() as tracer:
        values, ends = [], []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                values.append(at(either, layer(name, 0)).output)
                ends.append(either.lm_head.output[:, -1].mean(0))
        loss = (ends[0] * ends[1]).sum() + (ends[2] * ends[0]).sum()
        loss.backward()
        grads = [value.grad.save() for value in values]
    tapes = [taped(plain, ids, {"h": f"{layer(name, 0)}.output"}) for ids in PROMPTS]
    last = [tape["logits"][:, -1].mean(0) for tape in tapes]
    ((last[0] * last[1]).sum() + (last[2] * last[0]).sum()).backward()
    for found, tape in zip(grads, tapes, strict=True):
        close(found, tape.grads["h"])


def test_edits_of_an_invoke_and_values_from_another(either: Any, plain: Any, name: str) -> None:
    """A patch from one input into another: gradients flow into both."""
    path = layer(name, 0)
    with either.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            source = at(either, path).output
        with tracer.invoke(PROMPTS[2]):
            target = at(either, path).output
            at(either, path).output[:, -1] = source[:, -1] * 2
            after = at(either, path).output
            either.lm_head.output[:, -1].pow(2).sum().backward()
        saved = [v.grad.save() for v in (source, target, after)]
    tape = taped(plain, PROMPTS[0], {"source": f"{path}.output"})

    def patched(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] = tape["source"][:, -1] * 2
        return tape.see("after", h)

    taped(plain, PROMPTS[2], {"target": f"{path}.output"}, {path: patched}, tape)
    tape["logits"][:, -1].pow(2).sum().backward()
    for found, key in zip(saved, ("source", "target", "after"), strict=True):
        close(found, tape.grads[key])
    assert not saved[1].any()


# --- edits of the forward pass -----------------------------------------------------------------------------


def in_place(h: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[:, -1] *= 3
    h[..., :4] = 0
    return h


@pytest.mark.parametrize("edited", ["replaced", "in place"])
@pytest.mark.parametrize("several", [False, True], ids=["alone", "shared"])
def test_gradients_through_an_edited_layer(
    model: Any, plain: Any, name: str, edited: str, several: bool
) -> None:
    paths = (layer(name, 0), f"{layer(name, 1)}.mlp")

    def body() -> list[Any]:
        before = [at(model, path).output for path in paths]
        for path in paths:
            module = at(model, path)
            if edited == "replaced":
                module.output = module.output * 0.5 + 1
            else:
                module.output[:, -1] *= 3
                module.output[..., :4] = 0
        after = [at(model, path).output for path in paths]
        model.lm_head.output[:, -1].pow(2).sum().backward()
        return [v.grad.save() for v in (*before, *after)]

    prompts = PROMPTS if several else [IDS]
    with model.trace() as tracer:
        saved = []
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(body())
    edit = (lambda h: h * 0.5 + 1) if edited == "replaced" else in_place
    for ids, found in zip(prompts, saved, strict=True):
        tape = Tape()
        sees = {f"before {path}": f"{path}.output" for path in paths}
        edits = {path: lambda h, path=path, t=tape: t.see(f"after {path}", edit(h)) for path in paths}
        taped(plain, ids, sees, edits, tape)
        tape["logits"][:, -1].pow(2).sum().backward()
        keys = [*(f"before {path}" for path in paths), *(f"after {path}" for path in paths)]
        for gradient, key in zip(found, keys, strict=True):
            close(gradient, tape.grads[key])


def test_an_edit_in_place_of_what_autograd_has_kept_is_no_trouble(llama: Any) -> None:
    """Plain PyTorch refuses this pass; here each value has the gradient of the lines as they are written."""
    with llama.trace(IDS):
        h = llama.layers[0].output
        p = h.exp()
        kept = p.sum()
        p[..., 0] = 0
        (kept + (p * 2).sum() + llama.lm_head.output.sum() * 0).backward()
        gradient = h.grad.save()
        saved = h.save()
    wanted = saved.exp() * 3
    wanted[..., 0] = saved.exp()[..., 0]
    close(gradient, wanted)


def test_the_gradient_is_that_of_the_version_that_was_read(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        before = llama.layers[0].output
        before *= 3
        after = llama.layers[0].output
        llama.lm_head.output.pow(2).sum().backward()
        first_, second = before.grad.save(), after.grad.save()
    tape = Tape()
    taped(
        plain_llama,
        IDS,
        {"before": "model.layers.0.output"},
        {"model.layers.0": lambda h: tape.see("after", h * 3)},
        tape,
    )
    tape["logits"].pow(2).sum().backward()
    close(first_, tape.grads["before"])
    close(second, tape.grads["after"])


def test_applied_modules_pass_gradients(model: Any, plain: Any, name: str) -> None:
    norm = NORM.get(name, "model.norm")
    with model.trace(IDS):
        h = at(model, layer(name, 0)).output
        lens = model.lm_head(at(model, norm)(h))
        lens[:, -1].pow(2).sum().backward()
        gradient = h.grad.save()
    tape = taped(plain, IDS, {"h": f"{layer(name, 0)}.output"})
    plain.get_submodule("lm_head")(plain.get_submodule(norm)(tape["h"]))[:, -1].pow(2).sum().backward()
    close(gradient, tape.grads["h"])


def test_gradients_do_not_pass_detach_nor_no_grad(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h = llama.layers[0].output
        with torch.no_grad():
            scale = h.pow(2).sum()
            top, _ = h.max(-1)
        (h.sum() * scale + (h.detach() * h).sum() + top.sum() * h.sum()).backward()
        gradient = h.grad.save()
    tape = taped(plain_llama, IDS, {"h": "model.layers.0.output"})
    h = tape["h"]
    scale, top = h.pow(2).sum().detach(), h.max(-1)[0].detach()
    (h.sum() * scale + (h.detach() * h).sum() + top.sum() * h.sum()).backward()
    close(gradient, tape.grads["h"])


def test_a_trace_written_under_no_grad_has_no_more_nodes(llama: Any) -> None:
    with torch.no_grad(), llama.trace(IDS) as tracer:
        (llama.layers[0].output * 2).save()
    assert [node.op for node in tracer.graph.nodes] == ["site.get", "torch.mul", "save"]


# --- edits of gradients ------------------------------------------------------------------------------------


def halved(g: torch.Tensor) -> torch.Tensor:
    return g * 0.5


def cut(g: torch.Tensor) -> torch.Tensor:
    g = g.clone()
    g[:, -1] = 0
    return g


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (lambda h: setattr(h, "grad", h.grad * 0.5), halved),
        (lambda h: h.grad.__imul__(0.5), halved),
        (lambda h: h.grad.__setitem__((slice(None), -1), 0), cut),
        (lambda h: setattr(h, "grad", 1), torch.ones_like),
    ],
    ids=["replaced", "multiplied", "cut", "filled"],
)
def test_a_changed_gradient_changes_those_before_it(
    model: Any, plain: Any, name: str, write: Any, change: Any
) -> None:
    with model.trace(IDS):
        early = at(model, layer(name, 0)).input
        h = at(model, layer(name, 0)).output
        later = at(model, layer(name, 1)).mlp.output
        with model.lm_head.output[:, -1].pow(2).sum().backward():
            write(h)
            saved = [v.grad.save() for v in (early, h, later)]
    tape = Tape()
    tape.change["h"] = change
    sees = {"early": f"{layer(name, 0)}.input", "h": f"{layer(name, 0)}.output"}
    taped(plain, IDS, {**sees, "later": f"{layer(name, 1)}.mlp.output"}, tape=tape)
    tape["logits"][:, -1].pow(2).sum().backward()
    for found, key in zip(saved, ("early", "h", "later"), strict=True):
        close(found, tape.grads[key])


def test_augmented_assignment_and_module_spellings(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h = llama.layers[1].output
        h.grad *= 2
        h.grad[..., 0] += 5
        llama.layers[0].backward_output = llama.layers[0].backward_output.clamp(-1, 1)
        llama.layers[0].mlp.backward_input *= 3
        loss = llama.lm_head.output[:, -1].sum()
        loss.backward()
        saved = [llama.layers[0].backward_input.save(), llama.layers[0].mlp.backward_input.save()]
    tape = Tape()

    def shifted(g: torch.Tensor) -> torch.Tensor:
        g = g * 2
        g[..., 0] += 5
        return g

    tape.change = {"b": shifted, "a": lambda g: g.clamp(-1, 1), "m": lambda g: g * 3}
    sees = {"b": "model.layers.1.output", "a": "model.layers.0.output", "m": "model.layers.0.mlp.input"}
    taped(plain_llama, IDS, {**sees, "in": "model.layers.0.input"}, tape=tape)
    tape["logits"][:, -1].sum().backward()
    close(saved[0], tape.grads["in"])
    close(saved[1], tape.grads["m"])


def test_a_gradient_is_changed_by_later_ones_and_by_values(llama: Any, plain_llama: Any) -> None:
    with llama.trace() as tracer:
        for ids in PROMPTS[:2]:
            with tracer.invoke(ids):
                early, late = llama.layers[0].output, llama.layers[1].output
                llama.lm_head.output[:, -1].sum().backward()
                norm = late.grad.norm()
                early.grad = early.grad / norm + early.detach() * norm
                gradient = llama.layers[0].input.grad.save()
                kept = norm.save()
    tape = Tape()
    tape.change["a"] = lambda g: g / tape.grads["b"].norm() + tape["a"].detach() * tape.grads["b"].norm()
    sees = {"a": "model.layers.0.output", "b": "model.layers.1.output", "in": "model.layers.0.input"}
    taped(plain_llama, PROMPTS[1], sees, tape=tape)
    tape["logits"][:, -1].sum().backward()
    close(gradient, tape.grads["in"])
    close(kept, tape.grads["b"].norm())


def test_an_edit_of_one_gradient_is_not_that_of_its_neighbour(llama: Any, plain_llama: Any) -> None:
    """torch hands one tensor to both sides of a sum."""
    with llama.trace(IDS):
        h = llama.layers[0].output
        a, b = h * 1, h * 2
        (a + b).pow(2).sum().backward()
        a.grad *= 5
        saved = [v.grad.save() for v in (a, b, h)]
    h = taped(plain_llama, IDS, {"h": "model.layers.0.output"})["h"]
    step = 2 * (h * 3)
    for found, wanted in zip(saved, (step * 5, step, step * 5 + step * 2), strict=True):
        close(found, wanted)


def test_a_buffer_is_read_and_filled_as_gradients_come(llama: Any, plain_llama: Any) -> None:
    """A read that the program has before an edit is done before it, whichever of the two torch waits for."""
    with llama.trace(IDS):
        early, late = llama.layers[0].output, llama.layers[1].output
        llama.lm_head.output[:, -1].sum().backward()
        buffer = torch.ones(2)
        shown = (buffer * late.grad.norm()).sum().save()
        buffer[0] = early.grad.norm()
        early.grad = early.grad * buffer.sum()
        gradient = llama.layers[0].input.grad.save()
    tape = Tape()
    tape.change["early"] = lambda g: g * (g.norm() + 1)
    sees = {"early": "model.layers.0.output", "late": "model.layers.1.output", "in": "model.layers.0.input"}
    taped(plain_llama, IDS, sees, tape=tape)["logits"][:, -1].sum().backward()
    close(shown, 2 * tape.grads["late"].norm())
    close(gradient, tape.grads["in"])


def test_values_of_one_backward_pass_make_the_loss_of_the_next(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h, early = llama.layers[1].output, llama.layers[0].output
        llama.lm_head.output[:, -1].sum().backward()
        weights = h.grad
        h.grad *= 2
        (weights * h).sum().backward()
        gradient = early.grad.save()
    tape = taped(plain_llama, IDS, {"early": "model.layers.0.output", "h": "model.layers.1.output"})
    tape["logits"][:, -1].sum().backward(retain_graph=True)
    (tape.grads["h"].clone() * 2 * tape["h"]).sum().backward()
    close(gradient, tape.grads["early"])


def test_names_of_gradients_are_names_of_tensors(llama: Any, plain_llama: Any) -> None:
    with llama.trace(IDS):
        h = llama.layers[0].output
        llama.lm_head.output[:, -1].sum().backward()
        g = h.grad
        copy, size = g.clone().save(), g.norm().save()
        g[:] = 0
        shown = (g + 0).save()
        h.grad = 7
        replaced, old = h.grad.save(), g.save()
    tape = taped(plain_llama, IDS, {"h": "model.layers.0.output"})
    tape["logits"][:, -1].sum().backward()
    close(copy, tape.grads["h"])
    close(size, tape.grads["h"].norm())
    assert not shown.any()
    assert not old.any()
    assert torch.equal(replaced, torch.full_like(replaced, 7))


# --- sessions ----------------------------------------------------------------------------------------------


def test_integrated_gradients_over_ten_steps(model: Any, plain: Any, name: str) -> None:
    path, steps = layer(name, 0), 10
    with model.session() as session:
        with session.trace(IDS):
            end = at(model, path).output.detach()
        total: Any = 0
        for step in range(1, steps + 1):
            with model.trace(IDS):
                at(model, path).output = end * (step / steps)
                h = at(model, path).output
                model.lm_head.output[:, -1].logsumexp(-1).sum().backward()
                total = total + h.grad
        attribution = (end * total / steps).sum(-1).save()
    with torch.no_grad():
        reached = taped_end(plain, path)
    wanted = torch.zeros_like(reached)
    for step in range(1, steps + 1):
        tape = Tape()
        point = (reached * (step / steps)).requires_grad_()
        taped(plain, IDS, {}, {path: lambda h, tape=tape, p=point: tape.see("h", p + 0)}, tape)
        tape["logits"][:, -1].logsumexp(-1).sum().backward()
        wanted = wanted + tape.grads["h"]
    close(attribution, (reached * wanted / steps).sum(-1), scale=10)


def taped_end(plain: Any, path: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = plain.get_submodule(path).register_forward_hook(lambda m, a, o: seen.append(first(o)))
    plain(input_ids=torch.tensor(IDS), use_cache=False)
    handle.remove()
    return seen[0]


def test_a_gradient_of_one_trace_is_written_in_the_next(llama: Any, plain_llama: Any) -> None:
    """One step of descent on an activation."""
    with llama.session():
        with llama.trace(IDS):
            h = llama.layers[0].output
            before = llama.lm_head.output[0, -1].softmax(-1)[7].log()
            (-before).backward()
            step = h.grad * 0.05
            before.save()
        with llama.trace(IDS):
            llama.layers[0].output -= step
            after = llama.lm_head.output[0, -1].softmax(-1)[7].log().save()
    tape = taped(plain_llama, IDS, {"h": "model.layers.0.output"})
    (-tape["logits"][0, -1].log_softmax(-1)[7]).backward()
    moved = taped(plain_llama, IDS, {}, {"model.layers.0": lambda h: h - tape.grads["h"] * 0.05})
    close(after, moved["logits"][0, -1].log_softmax(-1)[7])
    assert after > before


def test_a_loss_of_one_trace_reaches_into_an_earlier_one(llama: Any, plain_llama: Any) -> None:
    with llama.session():
        with llama.trace(PROMPTS[1]):
            source = llama.layers[0].output
            vector = source[:1, -1]
        with llama.trace(IDS):
            llama.layers[1].output[:, -1] += vector
            llama.lm_head.output[:, -1].pow(2).sum().backward()
            inner = llama.layers[1].backward_output.save()
        outer = source.grad.save()
    tape = taped(plain_llama, PROMPTS[1], {"source": "model.layers.0.output"})

    def steered(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1] += tape["source"][:1, -1]
        return tape.see("inner", h)

    taped(plain_llama, IDS, {}, {"model.layers.1": steered}, tape)
    tape["logits"][:, -1].pow(2).sum().backward()
    close(inner, tape.grads["inner"])
    close(outer, tape.grads["source"])


def test_what_a_generation_ended_with_has_gradients_in_the_next_trace(llama: Any, plain_llama: Any) -> None:
    with llama.session():
        with llama.generate(IDS, max_new_tokens=3, eos_token_id=[]):
            early = llama.layers[0].output[:, -1].clone()
        with llama.trace(IDS):
            llama.layers[0].output[:, -1] = early * 2
            llama.lm_head.output[:, -1].sum().backward()
            gradient = early.grad.save()
    with torch.no_grad():
        h = taped_end(plain_llama, "model.layers.0")[:, -1].clone()
    h.requires_grad_()

    def written(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -1] = h * 2
        return out

    taped(plain_llama, IDS, {}, {"model.layers.0": written})["logits"][:, -1].sum().backward()
    assert h.grad is not None
    close(gradient, h.grad)


def test_attribution_patching(model: Any, plain: Any, name: str) -> None:
    """(clean - corrupted) * gradient, by layer and token: an estimate of what patching would do."""
    clean, corrupted = [[5, 9, 31, 7, 22, 40]], [[5, 9, 12, 7, 22, 41]]
    paths = [f"{layer(name, i)}.mlp" for i in (0, 1)]
    with model.trace() as tracer:
        with tracer.invoke(clean):
            clean_values = [at(model, path).output for path in paths]
        with tracer.invoke(corrupted):
            values = [at(model, path).output for path in paths]
            logits = model.lm_head.output[0, -1]
            (logits[7] - logits[3]).backward()
            grads = [value.grad for value in values]
        found = [((a - b) * g).sum(-1).save() for a, b, g in zip(clean_values, values, grads, strict=True)]
    base = taped(plain, clean, {path: f"{path}.output" for path in paths})
    tape = taped(plain, corrupted, {path: f"{path}.output" for path in paths})
    (tape["logits"][0, -1, 7] - tape["logits"][0, -1, 3]).backward()
    for path, estimate in zip(paths, found, strict=True):
        close(estimate, ((base[path] - tape[path]) * tape.grads[path]).sum(-1))


# --- any program -------------------------------------------------------------------------------------------

_UNARY: list[Callable[[Any], Any]] = [lambda x: x.tanh(), lambda x: x.exp(), lambda x: x * 0.7 + 1]
_BINARY: list[Callable[[Any, Any], Any]] = [lambda a, b: a + b, lambda a, b: a * b]
_EDITS: list[Callable[[Any], Any]] = [
    lambda h: h[:, -1].mul_(2),
    lambda h: h.__setitem__((..., slice(0, 3)), 0.5),
    lambda h: h.mul_(h.mean()),
]
_INDEX = st.integers(0, 9)
_STEP = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(_UNARY), _INDEX),
    st.tuples(st.just("binary"), st.sampled_from(_BINARY), _INDEX, _INDEX),
    st.tuples(st.just("edit"), st.sampled_from(_EDITS)),
    st.tuples(st.just("replace"), st.floats(-1, 1)),
    st.tuples(st.just("change"), st.floats(-1, 1), _INDEX),
)


class Program:
    """The same lines for a trace and for plain hooks.

    Attributes:
        values: what was read and made, in order.
        changes: position of a value -> what its gradient is multiplied by on its way.
    """

    def __init__(self, kept: Callable[[int, Any], Any] = lambda index, value: value) -> None:
        self._kept = kept
        self.values: list[Any] = []
        self.changes: dict[int, float] = {}

    def keep(self, value: Any) -> Any:
        self.values.append(self._kept(len(self.values), value))
        return self.values[-1]

    def at_site(self, h: Any, steps: list[tuple[Any, ...]]) -> Any:
        """What happens at a site with the tensor ``h``; what the model goes on with."""
        h = self.keep(h)
        for what, how, *rest in steps:
            operands = [self.values[index % len(self.values)] for index in rest]
            if what in ("unary", "binary"):
                self.keep(how(*operands))
            elif what == "edit":
                how(h)
            elif what == "replace":
                h = self.keep(h * how + 1)
            else:
                self.changes[rest[0] % len(self.values)] = how
        return h

    def loss(self, end: Any) -> Any:
        return sum((value.tanh().mean() for value in self.values), end.pow(2).mean())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.tuples(st.lists(_STEP, max_size=5), st.lists(_STEP, max_size=5)),
    several=st.booleans(),
)
def test_random_programs(
    models: Any, tiny_models: Any, steps: tuple[list[Any], list[Any]], several: bool
) -> None:
    """The gradient of every value, some changed on their way, is that of the same lines in plain hooks."""
    model, plain = models["llama"], tiny_models["llama"]
    prompts = PROMPTS[:2] if several else [IDS]
    found = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                program = Program()
                for number in (0, 1):
                    model.layers[number].output = program.at_site(model.layers[number].output, steps[number])
                with program.loss(model.lm_head.output).backward():
                    for index, factor in program.changes.items():
                        program.values[index].grad *= factor
                    found.append([value.grad.save() for value in program.values])
    for ids, grads in zip(prompts, found, strict=True):
        tape = Tape()
        wanted = Program(lambda index, value, tape=tape: tape.see(str(index), value))  # type: ignore[misc]
        edits = {
            f"model.layers.{number}": lambda h, number=number, w=wanted: w.at_site(h.clone(), steps[number])
            for number in (0, 1)
        }
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            taped(plain, ids, {}, edits, tape)
            for index, factor in wanted.changes.items():
                tape.change[str(index)] = lambda g, factor=factor: g * factor  # type: ignore[misc]
            wanted.loss(tape["logits"]).backward()
        for index, gradient in enumerate(grads):
            close(gradient, tape.grads[str(index)])


# --- what is run, and what stays ---------------------------------------------------------------------------


@contextlib.contextmanager
def runs_of(module: torch.nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def test_the_forward_ends_after_the_last_value_that_is_needed(llama: Any, plain_llama: Any) -> None:
    with runs_of(plain_llama.get_submodule("model.layers.1")) as later:
        with llama.trace(IDS):
            h = llama.model.embed_tokens.output
            llama.layers[0].output.pow(2).sum().backward()
            gradient = h.grad.save()
    assert not later
    tape = taped(plain_llama, IDS, {"h": "model.embed_tokens.output", "end": "model.layers.0.output"})
    tape["end"].pow(2).sum().backward()
    close(gradient, tape.grads["h"])


def test_a_backward_pass_that_nothing_is_read_of_does_not_run(llama: Any) -> None:
    modes: set[bool] = set()
    engine = llama._target(None).engine
    handle = engine.model.model.layers[0].register_forward_hook(lambda *_: modes.add(torch.is_grad_enabled()))
    try:
        with llama.trace(IDS):
            llama.lm_head.output.sum().backward()
            llama.layers[0].output.save()
    finally:
        handle.remove()
    assert modes == {False}


def test_nothing_is_kept_between_jobs(llama: Any, plain_llama: Any) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    handle = plain_llama.model.layers[0].mlp.register_forward_hook(
        lambda m, a, o: kept.append(weakref.ref(o))
    )
    gc.collect()
    gc.disable()  # no help: what is dropped must be gone at once
    try:
        with llama.session():
            for _ in range(2):
                with llama.trace(IDS):
                    h = llama.layers[0].output
                    h[:, 0] *= 2
                    h.grad *= 2
                    llama.lm_head.output.pow(2).sum().backward()
                    saved = h.grad.save()
                    llama.layers[0].mlp.output.grad.norm().save()
        assert len(kept) == 2
        assert [ref() for ref in kept] == [None, None]
        with contextlib.suppress(PellucidError), llama.trace(IDS):
            h = llama.layers[0].mlp.output
            h.grad[:] = torch.linalg.inv(h.grad[..., None] * torch.zeros(32))[..., 0]
            llama.lm_head.output.pow(2).sum().backward()
            llama.layers[0].input.grad.save()
    finally:
        gc.enable()
        handle.remove()
    gc.collect()  # an error's traceback is the caller's
    assert len(kept) == 3
    assert kept[2]() is None
    assert saved.grad_fn is None
    assert all(p.grad is None for p in plain_llama.parameters())


def test_a_failing_op_inside_a_backward_pass_names_its_line(llama: Any) -> None:
    with pytest.raises(PellucidError, match=r"test_gradients.py:\d+: torch.linalg.cholesky failed"):
        with llama.trace(IDS):
            h = llama.layers[0].output
            h.grad *= torch.linalg.cholesky(-h.grad[0, :, :6].abs()).sum()
            llama.lm_head.output.sum().backward()
            llama.layers[0].input.grad.save()


# --- the graph ---------------------------------------------------------------------------------------------


def test_the_graph_prints_and_reads_back(llama: Any) -> None:
    with llama.trace(IDS) as tracer:
        h = llama.layers[0].output
        llama.lm_head.output.sum().backward()
        h.grad = h.grad * 2
        llama.layers[0].input.grad.save()
    graph = tracer.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    assert show(graph) == (
        'trace "llama":\n'
        "    invoke 0: [[5, 9, 31, 7, 22, 40]]\n"
        "    v0 = model.layers.0.output\n"
        "    v1 = lm_head.output\n"
        "    v2 = torch.sum(v1)\n"
        "    v2.backward()\n"
        "    v4 = v0.grad  # backward 0\n"
        "    v5 = v4 * 2\n"
        "    v0.grad = v5  # backward 0\n"
        "    v7 = model.layers.0.input[0][0]\n"
        "    v8 = v7.grad  # backward 0\n"
        "    save(v8, 'saved_0')\n"
    )


# --- mistakes ----------------------------------------------------------------------------------------------


def refuses(model: Any, error: type[Exception], match: str, body: Callable[[], Any]) -> None:
    with pytest.raises(error, match=rf"test_gradients.py:\d+: .*{match}"), model.trace(IDS):
        body()


def test_mistakes_are_named_with_their_line(llama: Any) -> None:
    layers, head = llama.layers, llama.lm_head

    def no_backward() -> None:
        layers[0].output.grad.save()

    def later_value() -> None:
        layers[0].output.sum().backward()
        layers[1].output.grad.save()

    def apart() -> None:
        aside = layers[0].output * 2
        head.output.sum().backward()
        aside.grad.save()

    def integers() -> None:
        head.output.argmax(-1).grad.save()

    def integer_loss() -> None:
        head.output.argmax().backward()

    def many_numbers() -> None:
        head.output.backward()

    def wrong_start() -> None:
        head.output.backward(torch.ones(3))

    def too_early() -> None:
        g = layers[1].output.grad
        layers[0].output = layers[0].output + g
        head.output.sum().backward()
        head.output.save()

    def wrong_shape() -> None:
        layers[0].output.grad = torch.zeros(3)

    def wrong_dtype() -> None:
        layers[0].output.grad = head.output.argmax(-1)[..., None] * torch.ones(1, 6, 32, dtype=torch.int64)

    def backwards() -> None:
        late, early = layers[1].output, layers[0].output
        head.output.sum().backward()
        late.grad = early.grad
        layers[0].input.grad.save()

    def edited_late() -> None:
        late, early = layers[1].output, layers[0].output
        head.output.sum().backward()
        late.grad[:] = early.grad
        layers[0].input.grad.save()

    def of_itself() -> None:
        g = layers[0].output.grad
        g.sum().backward()
        g.save()

    def second_order() -> None:
        h = layers[0].output
        head.output.sum().backward()
        h.grad.pow(2).sum().backward()
        h.grad.save()

    name = r"model.layers.{}.output"
    refuses(llama, GradientError, "there is no backward pass for this gradient", no_backward)
    loss = r"has no gradient: the loss, the value of torch.sum, does not depend on it"
    refuses(llama, GradientError, f"{name.format(1)} {loss}", later_value)
    refuses(llama, GradientError, f"the value of torch.mul {loss}", apart)
    refuses(llama, GradientError, r"the value is \[1, 6\] int64: only floating types", integers)
    refuses(llama, GradientError, "the loss is .*int64: only floating types", integer_loss)
    refuses(llama, ShapeError, r"the loss has shape \[1, 6, 99\]; backward\(\) starts at one", many_numbers)
    refuses(
        llama, ShapeError, r"takes the loss's shape: it is \[1, 6, 99\], and it was given \[3\]", wrong_start
    )
    refuses(
        llama,
        OrderError,
        rf"{name.format(0)} is written with a value that needs the gradient of {name.format(1)}.*"
        "gradients exist only once the forward pass has ended",
        too_early,
    )
    refuses(llama, ShapeError, r"a gradient has its value's shape: it is \[1, 6, 32\].*\[3\]", wrong_shape)
    refuses(llama, ShapeError, r"shape and dtype: it is float32, and it was given int64", wrong_dtype)
    refuses(
        llama,
        OrderError,
        rf"the gradient of {name.format(1)} is set to a value that needs the gradient of {name.format(0)}",
        backwards,
    )
    refuses(
        llama,
        OrderError,
        rf"this edits the gradient of {name.format(1)} in place, but can run only after the backward pass",
        edited_late,
    )
    refuses(
        llama, OrderError, "this loss needs the gradient of .*, which its own backward pass makes", of_itself
    )
    refuses(llama, GradientError, f"{name.format(0)} {loss}", second_order)
    refuses(llama, NotYetError, "create_graph", lambda: head.output.sum().backward(create_graph=True))
    refuses(llama, NotYetError, "no inputs", lambda: head.output.sum().backward(inputs=[head.output]))
    refuses(llama, GradientError, "output is no single tensor.*", lambda: layers[0].self_attn.backward_output)


def test_the_gradient_of_another_invoke_is_an_error_not_zeros(either: Any, name: str) -> None:
    match = r"test_gradients.py:\d+: .* \(invoke 1\) has no gradient: the loss, the value of torch.sum"
    with pytest.raises(GradientError, match=match), either.trace() as tracer:
        with tracer.invoke(IDS):
            either.lm_head.output.sum().backward()
        with tracer.invoke(PROMPTS[1]):
            other = at(either, layer(name, 0)).output
        tracer._recorder.backward = 0
        other.grad.save()


def test_a_generation_has_no_gradients(llama: Any) -> None:
    with pytest.raises(GradientError, match=r"test_gradients.py:\d+: a generation has no gradients"):
        with llama.generate(IDS, max_new_tokens=3):
            llama.layers[0].output.grad.save()
    with pytest.raises(GradientError, match=r"test_gradients.py:\d+: a generation has no gradients"):
        with llama.generate(IDS, max_new_tokens=3) as tracer, tracer.iter[:]:
            llama.lm_head.output.sum().backward()


# --- remote ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from service import running_service

    with running_service({"llama": tiny_folders["llama"]}, tmp_path_factory.mktemp("grads")) as url:
        yield url


@pytest.mark.xdist_group("gradients-service")
@pytest.mark.timeout(400)
def test_the_same_remote(service: str, plain_llama: Any, llama: Any) -> None:
    remote = pellucid.LanguageModel("llama", remote=service)
    found, graphs = [], []
    for model in (remote, llama):
        with model.session() as session:
            with model.trace() as tracer:
                saved = []
                for ids in PROMPTS:
                    with tracer.invoke(ids):
                        h = model.layers[0].output
                        h[:, -1] *= 2
                        h.grad *= 0.5
                        model.lm_head.output[:, -1].pow(2).sum().backward()
                        saved += [h.grad, model.layers[0].backward_input.save()]
            total = sum(g.norm() for g in saved).save()
        found.append([*saved[1::2], total])
        graphs.append(session.graph.to_json())
    for one, other in zip(*found, strict=True):
        close(one, other)
    assert graphs[0] == graphs[1]
    with pytest.raises(GradientError, match=r"test_gradients.py:\d+: .*does not depend on it"):
        with remote.trace(IDS):
            remote.layers[0].output.sum().backward()
            remote.layers[1].output.grad.save()
    assert plain_llama is not None

"""Experiments, each written twice: in Pellucid's language, and with plain hooks.

``body`` runs inside an invoke and returns saved values by name; ``reference`` computes the same for one
batch of ids alone. Both get an ``Arch``, which names the parts of one architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from references import capture, first, forward, with_first

Saved = dict[str, Any]


@dataclass(frozen=True)
class Arch:
    """Where one architecture keeps its parts."""

    layers: str
    mlp: str
    attention: str
    out_proj: str
    norm: str
    head: str
    embed: str
    heads: int

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"


@dataclass(frozen=True)
class Experiment:
    name: str
    body: Callable[[Any, Arch], Saved]
    reference: Callable[[torch.nn.Module, Arch, torch.Tensor], Saved]


EXPERIMENTS: list[Experiment] = []


def at(model: Any, path: str) -> Any:
    """The module proxy at a dotted path, by attribute access and indexing as a user writes it."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def experiment(reference: Callable[[torch.nn.Module, Arch, torch.Tensor], Saved]) -> Any:
    def register(body: Callable[[Any, Arch], Saved]) -> Callable[[Any, Arch], Saved]:
        EXPERIMENTS.append(Experiment(body.__name__, body, reference))
        return body

    return register


def logits(model: torch.nn.Module, ids: torch.Tensor, **hooks: Any) -> torch.Tensor:
    return forward(model, ids, **hooks).logits


# --- reads -------------------------------------------------------------------------------------------------


@experiment(lambda m, a, ids: {"h": capture(m, ids, a.layer(1))})
def save_a_layer(model: Any, arch: Arch) -> Saved:
    return {"h": at(model, arch.layer(1)).output.save()}


@experiment(lambda m, a, ids: {"h": capture(m, ids, a.layer(1), "input")})
def save_the_input_of_a_layer(model: Any, arch: Arch) -> Saved:
    return {"h": at(model, arch.layer(1)).input.save()}


@experiment(
    lambda m, a, ids: {
        "mlp": capture(m, ids, f"{a.layer(0)}.{a.mlp}"),
        "attention": capture(m, ids, f"{a.layer(1)}.{a.attention}"),
    }
)
def save_inside_layers(model: Any, arch: Arch) -> Saved:
    attention = at(model, f"{arch.layer(1)}.{arch.attention}").output[0].save()
    return {"attention": attention, "mlp": at(model, f"{arch.layer(0)}.{arch.mlp}").output.save()}


@experiment(lambda m, a, ids: {"logits": logits(m, ids), "p": logits(m, ids)[:, -1].softmax(-1)})
def save_logits_and_probabilities(model: Any, arch: Arch) -> Saved:
    out = at(model, arch.head).output
    return {"logits": out.save(), "p": out[:, -1].softmax(-1).save()}


@experiment(lambda m, a, ids: {"logits": logits(m, ids)})
def save_a_field_of_the_models_output(model: Any, arch: Arch) -> Saved:
    return {"logits": model.output.logits.save()}


@experiment(lambda m, a, ids: {"d": capture(m, ids, a.layer(1)) - capture(m, ids, a.layer(0))})
def read_two_layers_in_reverse(model: Any, arch: Arch) -> Saved:
    later = at(model, arch.layer(1)).output
    return {"d": (later - at(model, arch.layer(0)).output).save()}


def _statistics(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    h = capture(m, ids, a.layer(1))
    top = h.topk(3, dim=-1)
    return {
        "values": top.values,
        "indices": top.indices,
        "normed": torch.nn.functional.layer_norm(h, h.shape[-1:]),
        "gram": torch.einsum("btd,bsd->bts", h, h),
        "cat": torch.cat([h, -h], dim=-1).std(dim=-1),
        "positive": (h > 0).sum(),
        "kept": h[h > 0].mean(),
        "scores": torch.where(h > 0, h, torch.zeros_like(h)).norm(dim=-1),
    }


@experiment(_statistics)
def compute_on_a_layer(model: Any, arch: Arch) -> Saved:
    h = at(model, arch.layer(1)).output
    top = h.topk(3, dim=-1)
    return {
        "values": top.values.save(),
        "indices": top.indices.save(),
        "normed": torch.nn.functional.layer_norm(h, h.shape[-1:]).save(),
        "gram": torch.einsum("btd,bsd->bts", h, h).save(),
        "cat": torch.cat([h, -h], dim=-1).std(dim=-1).save(),
        "positive": (h > 0).sum().save(),
        "kept": h[h > 0].mean().save(),
        "scores": torch.where(h > 0, h, torch.zeros_like(h)).norm(dim=-1).save(),
    }


def _lens(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    found = {}
    for index in (0, 1):
        h = capture(m, ids, a.layer(index))
        with torch.no_grad():
            found[f"layer{index}"] = m.get_submodule(a.head)(m.get_submodule(a.norm)(h))[:, -1]
    return found


@experiment(_lens)
def logit_lens(model: Any, arch: Arch) -> Saved:
    norm, head = at(model, arch.norm), at(model, arch.head)
    return {f"layer{i}": head(norm(at(model, arch.layer(i)).output))[:, -1].save() for i in (0, 1)}


@experiment(
    lambda m, a, ids: {
        "first": capture(m, ids, a.layer(1))[:, 0],
        "last": capture(m, ids, a.layer(1))[:, -1],
        "some": capture(m, ids, a.layer(1))[:, [0, 2]],
        "middle": capture(m, ids, a.layer(1))[:, 1:-1],
        "gram": torch.einsum("btd,bsd->bts", *[capture(m, ids, a.layer(1))] * 2).mean(-1)[:, 1],
        "turned": capture(m, ids, a.layer(1)).transpose(1, 2)[:, :, 1],
        "t()": capture(m, ids, a.layer(1))[0].t(),
    }
)
def index_tokens_of_a_layer(model: Any, arch: Arch) -> Saved:
    h = at(model, arch.layer(1)).output
    return {
        "first": h.t[0].save(),
        "last": h.token[-1].save(),
        "some": h.token[[0, 2]].save(),
        "middle": h.t[1:-1].save(),
        "gram": torch.einsum("btd,bsd->bts", h, h).mean(-1).t[1].save(),
        "turned": h.transpose(1, 2).t[1].save(),
        "t()": h[0, :].t().save(),
    }


# --- writes ------------------------------------------------------------------------------------------------


def _edit(path: Callable[[Arch], str], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def reference(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
        def after(output: Any) -> Any:
            return with_first(output, change(first(output)))

        return {"logits": logits(m, ids, after={path(a): after})}

    return reference


def _set(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@experiment(_edit(lambda a: f"{a.layer(1)}.{a.mlp}", torch.zeros_like))
def zero_an_mlp_in_place(model: Any, arch: Arch) -> Saved:
    at(model, f"{arch.layer(1)}.{arch.mlp}").output[:] = 0
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: f"{a.layer(1)}.{a.mlp}", torch.zeros_like))
def zero_an_mlp_by_replacement(model: Any, arch: Arch) -> Saved:
    at(model, f"{arch.layer(1)}.{arch.mlp}").output = 0
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: h * 0.5 + 1))
def scale_and_shift_a_layer(model: Any, arch: Arch) -> Saved:
    layer = at(model, arch.layer(0))
    layer.output = layer.output * 0.5 + 1
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: h * 3))
def augmented_assignment_on_a_site(model: Any, arch: Arch) -> Saved:
    at(model, arch.layer(0)).output *= 3
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: _set(h, (slice(None), -1, slice(2, 6)), 9.0)))
def edit_a_slice(model: Any, arch: Arch) -> Saved:
    at(model, arch.layer(0)).output[:, -1, 2:6] = 9.0
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: _set(h, (slice(None), 0), h[:, 0] * 2)))
def augmented_assignment_on_a_slice(model: Any, arch: Arch) -> Saved:
    at(model, arch.layer(0)).output[:, 0] *= 2
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: _set(h, (..., slice(0, 4)), -h[..., :4])))
def edit_through_a_view(model: Any, arch: Arch) -> Saved:
    view = at(model, arch.layer(0)).output.transpose(0, 1)[..., :4]
    view.neg_()
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: f"{a.layer(1)}.{a.attention}", torch.zeros_like))
def zero_a_tuple_output(model: Any, arch: Arch) -> Saved:
    at(model, f"{arch.layer(1)}.{arch.attention}").output[0][:] = 0
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: f"{a.layer(1)}.{a.attention}", lambda h: h * 2))
def rebuild_a_tuple_output(model: Any, arch: Arch) -> Saved:
    attention = at(model, f"{arch.layer(1)}.{arch.attention}")
    attention.output = (attention.output[0] * 2, *attention.output[1:])
    return {"logits": at(model, arch.head).output.save()}


STEERING = torch.linspace(-1, 1, 5)


@experiment(_edit(lambda a: a.embed, lambda h: _set(h, (..., slice(0, 5)), h[..., :5] + STEERING)))
def steer_with_a_tensor_of_the_users(model: Any, arch: Arch) -> Saved:
    at(model, arch.embed).output[..., :5] += STEERING
    return {"logits": at(model, arch.head).output.save()}


def _input_edit(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * 0.5, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] * 0.5}

    return {"logits": logits(m, ids, before={a.layer(1): before})}


@experiment(_input_edit)
def replace_the_input_of_a_layer(model: Any, arch: Arch) -> Saved:
    layer = at(model, arch.layer(1))
    layer.input = layer.input * 0.5
    return {"logits": at(model, arch.head).output.save()}


def _head_ablation(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0].clone()
        x.view(*x.shape[:2], a.heads, -1)[:, :, 1] = 0
        return (x, *args[1:]), kwargs

    return {"logits": logits(m, ids, before={f"{a.layer(1)}.{a.attention}.{a.out_proj}": before})}


@experiment(_head_ablation)
def ablate_a_head_through_a_view(model: Any, arch: Arch) -> Saved:
    x = at(model, f"{arch.layer(1)}.{arch.attention}.{arch.out_proj}").input
    x.view(x.shape[0], x.shape[1], arch.heads, -1)[:, :, 1] = 0
    return {"logits": at(model, arch.head).output.save()}


def _patch_forwards(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    early = capture(m, ids, a.layer(0))
    return {"logits": logits(m, ids, after={a.layer(1): lambda out: with_first(out, early)})}


@experiment(_patch_forwards)
def carry_an_early_layer_to_a_late_one(model: Any, arch: Arch) -> Saved:
    at(model, arch.layer(1)).output = at(model, arch.layer(0)).output
    return {"logits": at(model, arch.head).output.save()}


def _first_and_last(h: torch.Tensor) -> torch.Tensor:
    return _set(_set(h, (slice(None), 0), 1.5), (slice(None), -1, slice(0, 3)), 9.0)


@experiment(_edit(lambda a: a.layer(0), _first_and_last))
def edit_tokens_of_a_layer(model: Any, arch: Arch) -> Saved:
    h = at(model, arch.layer(0)).output
    h.t[0] = 1.5
    h.token[-1][:, :3] = 9.0
    return {"logits": at(model, arch.head).output.save()}


@experiment(_edit(lambda a: a.layer(0), lambda h: _set(h, (slice(None), [0, 2]), h[:, [0, 2]] * 2)))
def augmented_assignment_on_tokens(model: Any, arch: Arch) -> Saved:
    at(model, arch.layer(0)).output.t[[0, 2]] *= 2
    return {"logits": at(model, arch.head).output.save()}


# --- names are names of tensors ----------------------------------------------------------------------------


def _before_and_after(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    old = capture(m, ids, a.layer(0))
    new = logits(m, ids, after={a.layer(0): lambda out: with_first(out, first(out) * 2)})
    return {"old": old, "new": old * 2, "logits": new}


@experiment(_before_and_after)
def a_replacement_leaves_the_old_name_alone(model: Any, arch: Arch) -> Saved:
    layer = at(model, arch.layer(0))
    old = layer.output
    layer.output = 2 * old
    return {"old": old.save(), "new": layer.output.save(), "logits": at(model, arch.head).output.save()}


def _zeroed(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    old = capture(m, ids, a.layer(0))
    return {"copy": old, "doubled": old * 2, "after": torch.zeros_like(old)}


@experiment(_zeroed)
def an_edit_in_place_shows_through_and_a_clone_keeps_the_old_value(model: Any, arch: Arch) -> Saved:
    h = at(model, arch.layer(0)).output
    copy, doubled = h.clone().save(), (h * 2).save()
    h[:] = 0
    return {"copy": copy, "doubled": doubled, "after": (h + 0).save()}


def _older_version(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    old = capture(m, ids, a.layer(0))
    zeroed = {a.layer(0): lambda out: with_first(out, torch.zeros_like(first(out)))}
    late = capture(m, ids, a.layer(1))
    seen: list[torch.Tensor] = []
    forward(m, ids, after={**zeroed, a.layer(1): lambda out: seen.append(first(out).clone())})
    assert not torch.equal(late, seen[0])
    return {"mixed": old + seen[0]}


@experiment(_older_version)
def an_older_version_wanted_later_is_kept(model: Any, arch: Arch) -> Saved:
    h = at(model, arch.layer(0)).output
    mixed = h + at(model, arch.layer(1)).output
    h[:] = 0
    return {"mixed": mixed.save()}


def _buffer(m: torch.nn.Module, a: Arch, ids: torch.Tensor) -> Saved:
    buffer = torch.zeros(3)
    buffer[0] = capture(m, ids, a.layer(0)).mean()
    buffer[2] = capture(m, ids, a.layer(1)).mean()
    return {"buffer": buffer}


@experiment(_buffer)
def a_buffer_is_filled_as_the_model_goes(model: Any, arch: Arch) -> Saved:
    buffer = torch.zeros(3).save()
    buffer[0] = at(model, arch.layer(0)).output.mean()
    buffer[2] = at(model, arch.layer(1)).output.mean()
    return {"buffer": buffer}

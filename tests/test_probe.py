"""The card a probe makes of a resident model, against what plain hooks see of the same model."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pellucid_shared.card import (
    Call,
    ModelCard,
    OpaqueLeaf,
    PlainLeaf,
    Structure,
    TensorLeaf,
    leaf_at,
    leaves,
)
from pellucid_shared.errors import InputError, NotFoundError
from pellucid_worker.loader import load
from pellucid_worker.probe import probe
from tiny_models import HEADS, HIDDEN, LAYERS, NAMES, VOCAB, tiny_folder, tiny_model

#: Rows and tokens that the probe itself does not use.
BATCH, TOKENS = 4, 9
LAYER_PATHS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma3": "model.layers",
    "qwen3": "model.layers",
    "mixtral": "model.layers",
}


@pytest.fixture(scope="module")
def cards(tiny_models: dict[str, PreTrainedModel]) -> dict[str, ModelCard]:
    return {name: probe(model, id=name) for name, model in tiny_models.items()}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclasses.dataclass
class Seen:
    """One call as a plain hook saw it; ``value`` is ((args, kwargs), output)."""

    module: str
    inputs: Any
    output: Any = None


def watch(model: torch.nn.Module, **arguments: Any) -> tuple[list[Seen], list[tuple[str, str]]]:
    """A forward pass under plain hooks: the calls in order of entry, and (module, kind) in order of event."""
    calls: list[Seen] = []
    events: list[tuple[str, str]] = []
    handles = []
    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
            events.append((path, "input"))
            calls.append(Seen(path, (args, kwargs)))

        def after(_: Any, args: Any, output: Any, path: str = path) -> None:
            events.append((path, "output"))
            next(c for c in reversed(calls) if c.module == path).output = output

        handles += [module.register_forward_pre_hook(before, with_kwargs=True)]
        handles += [module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls, events


def prompt(batch: int = BATCH, tokens: int = TOKENS) -> torch.Tensor:
    return torch.arange(batch * tokens).reshape(batch, tokens) % VOCAB


def at(value: Any, path: tuple[int | str, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def tensors(calls: tuple[Call, ...], seen: list[Seen]) -> Iterator[tuple[TensorLeaf, Any]]:
    """Each tensor the card has, and what a hook found in its place."""
    for call, real in zip(calls, seen, strict=True):
        for kind, value in (("input", real.inputs), ("output", real.output)):
            for path, leaf in leaves(call.structure(kind)):
                if isinstance(leaf, TensorLeaf):
                    yield leaf, at(value, path)


def output(card: ModelCard, module: str) -> Structure:
    return card.call_index[module, 0].output


# --- what is called ----------------------------------------------------------------------------------------


def test_calls_and_events_are_in_the_models_own_order(tiny_models: Any, cards: Any, name: str) -> None:
    calls, events = watch(tiny_models[name], input_ids=prompt(), use_cache=False)
    card = cards[name]
    assert [c.module for c in card.prefill] == [c.module for c in calls]
    clock = {c.enter: (c.module, "input") for c in card.prefill}
    clock |= {c.exit: (c.module, "output") for c in card.prefill}
    assert [clock[i] for i in range(len(clock))] == events


def test_a_module_that_is_called_twice_has_numbered_calls(cards: Any) -> None:
    calls = [c for c in cards["gemma3"].prefill if c.module == "model.rotary_emb"]
    assert [c.call for c in calls] == [0, 1]
    assert calls[0].exit < calls[1].enter


def test_the_module_tree_is_the_models(tiny_models: Any, cards: Any, name: str) -> None:
    model, card = tiny_models[name], cards[name]
    assert [(m.path, m.class_name) for m in card.modules] == [
        (path, type(module).__name__) for path, module in model.named_modules()
    ]
    own = {
        f"{m.path}.{key}".lstrip("."): (leaf.shape, leaf.dtype)
        for m in card.modules
        for key, leaf in m.parameters.items()
    }
    wanted = model.named_parameters(remove_duplicate=False)
    assert own == {key: (tuple(p.shape), "float32") for key, p in wanted}
    assert len(card.children[LAYER_PATHS[name]]) == LAYERS
    assert card.parameters == sum(p.numel() for p in model.parameters())


def test_the_card_states_class_sizes_and_source(tiny_models: Any, name: str) -> None:
    model = tiny_models[name]
    card = probe(model, id="mine", source="somewhere", has_tokenizer=True)
    assert (card.id, card.source, card.has_tokenizer) == ("mine", "somewhere", True)
    assert (card.class_name, card.dtype, card.vocab_size) == (type(model).__name__, "float32", VOCAB)
    assert card.max_tokens == 128
    assert hasattr(model, card.base_model_prefix)
    assert card.config["model_type"] == model.config.model_type
    assert set(card.versions) == {"accelerate", "pellucid", "torch", "transformers"}
    assert ModelCard.model_validate_json(card.model_dump_json()) == card


# --- what they take and give -------------------------------------------------------------------------------


def test_shapes_hold_at_sizes_the_probe_did_not_use(tiny_models: Any, cards: Any, name: str) -> None:
    calls, _ = watch(tiny_models[name], input_ids=prompt(), use_cache=False)
    known = 0
    for leaf, tensor in tensors(cards[name].prefill, calls):
        spec = leaf.spec(BATCH, TOKENS)
        if spec is not None:
            assert (spec.shape, f"torch.{spec.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
            known += 1
    assert known > 40


def test_leaves_of_one_number_are_one_tensor_or_all_of_it_in_the_model(
    tiny_models: Any, cards: Any, name: str
) -> None:
    calls, _ = watch(tiny_models[name], input_ids=prompt(), use_cache=False)
    by_number: dict[int, set[Any]] = {}
    by_object: dict[Any, set[int]] = {}
    for leaf, tensor in tensors(cards[name].prefill, calls):
        assert leaf.object is not None
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        by_number.setdefault(leaf.object, set()).add(place)
        by_object.setdefault(place, set()).add(leaf.object)
    assert all(len(found) == 1 for found in (*by_number.values(), *by_object.values()))


def test_a_layers_output_is_the_next_ones_input(cards: Any, name: str) -> None:
    card, path = cards[name], LAYER_PATHS[name]
    made, taken = output(card, f"{path}.0"), card.call_index[f"{path}.1", 0].args[0]
    assert isinstance(made, TensorLeaf)
    assert isinstance(taken, TensorLeaf)
    assert made.object == taken.object
    assert made.shape == ("batch", "tokens", HIDDEN)


def test_tuples_stay_tuples_and_bare_tensors_bare(cards: Any) -> None:
    for name, attention in (("llama", "self_attn"), ("gpt2", "attn"), ("gpt_neox", "attention")):
        layer = f"{LAYER_PATHS[name]}.0"
        found = output(cards[name], f"{layer}.{attention}")
        assert found.leaf == "tuple"
        assert isinstance(leaf_at(found, (0,)), TensorLeaf)
        assert leaf_at(found, (1,)) == PlainLeaf(value="None")
        assert isinstance(output(cards[name], layer), TensorLeaf)
    whole = output(cards["llama"], "")
    assert whole.leaf == "dict"
    assert whole.class_name == "CausalLMOutputWithPast"
    assert whole.items["logits"] == TensorLeaf(shape=("batch", "tokens", VOCAB), dtype="float32", object=1)


def test_attention_weights_have_their_axes_where_the_model_makes_them() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    weights = leaf_at(output(probe(model, id="m"), "model.layers.0.self_attn"), (1,))
    assert isinstance(weights, TensorLeaf)
    assert weights.shape == ("batch", HEADS, "tokens", "tokens")
    assert not weights.packable()


def test_flat_rows_and_axes_that_follow_nothing_are_told_apart(cards: Any) -> None:
    router = cards["mixtral"].call_index["model.layers.0.mlp.gate", 0]
    assert router.args[0].shape == ("rows", HIDDEN)
    assert router.args[0].packable()
    assert leaf_at(router.output, (2,)) == TensorLeaf(
        shape=("rows", 2), dtype="int64", object=leaf_at(router.output, (2,)).object
    )
    routed = cards["mixtral"].call_index["model.layers.0.mlp.experts.act_fn", 0]
    assert routed.args[0].shape is None  # how many rows an expert gets depends on the data


def test_axes_without_a_batch_are_not_packable(cards: Any) -> None:
    cosine = leaf_at(output(cards["llama"], "model.rotary_emb"), (0,))
    assert isinstance(cosine, TensorLeaf)
    assert (cosine.shape, cosine.packable()) == ((1, "tokens", HIDDEN // HEADS), False)


def test_a_decode_step_takes_one_token_and_its_cache_is_opaque(cards: Any, name: str) -> None:
    card = cards[name]
    assert [c.module for c in card.decode] == [c.module for c in card.prefill]
    root = card.decode[0]
    assert root.kwargs["past_key_values"] == OpaqueLeaf(class_name="DynamicCache")
    assert leaf_at(root.output, ("past_key_values",)) == OpaqueLeaf(class_name="DynamicCache")
    logits = leaf_at(root.output, ("logits",))
    assert isinstance(logits, TensorLeaf)
    assert logits.shape == ("batch", 1, VOCAB)


def test_the_prefill_has_no_cache(cards: Any, name: str) -> None:
    for call in cards[name].prefill:
        for kind in ("input", "output"):
            assert not any(isinstance(leaf, OpaqueLeaf) for _, leaf in leaves(call.structure(kind)))


# --- what packs --------------------------------------------------------------------------------------------


class Changed(LlamaForCausalLM):
    """A model whose logits are changed once more on their way out."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **more: Any) -> Any:
        found = super().forward(input_ids=input_ids, position_ids=position_ids, **more)
        found.logits = self.change(found.logits)
        return found

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class LooksAtAllTokens(Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + logits.mean(dim=1, keepdim=True)


class NotANumberPastTheFirst(Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, 14:] = torch.nan
        return logits


class FailsOnLongRows(Changed):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] > 11:
            raise ValueError("too long")
        return logits


class TakesNoPositions(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        return CausalLMOutput(logits=super().forward(input_ids=input_ids, use_cache=False).logits)


def made(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(copy.deepcopy(tiny_model("llama").config)).eval()


def test_models_whose_invokes_agree_with_alone_pack(cards: Any, name: str) -> None:
    assert cards[name].packs
    assert probe(made(Changed), id="m").packs


@pytest.mark.parametrize(
    "kind", [LooksAtAllTokens, NotANumberPastTheFirst, FailsOnLongRows, TakesNoPositions]
)
def test_models_whose_invokes_do_not_agree_are_not_packed(kind: type[PreTrainedModel]) -> None:
    model = made(kind)
    own = model.config._attn_implementation
    assert not probe(model, id="m").packs
    assert model.config._attn_implementation == own


def test_a_model_without_a_cache_has_no_decode_phase() -> None:
    card = probe(made(TakesNoPositions), id="m")
    assert card.decode == ()
    assert card.prefill


# --- the model is left as it was ---------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    hooks = {
        path: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for path, m in model.named_modules()
    }
    weights: Mapping[str, torch.Tensor] = {**model.state_dict(), **dict(model.named_buffers())}
    return {
        "hooks": hooks,
        "weights": {key: tensor.clone() for key, tensor in weights.items()},
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "gradients": torch.is_grad_enabled(),
        "random": torch.get_rng_state(),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    return bool(before == after)


def test_probing_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name)
    ids = prompt(2, 5)
    with torch.no_grad():
        logits = model(ids).logits
    before = state_of(model)
    probe(model, id="m")
    after = state_of(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_a_model_that_fails_under_the_probe_keeps_no_hooks() -> None:
    class Broken(Changed):
        def change(self, logits: torch.Tensor) -> torch.Tensor:
            raise ValueError("never")

    model = made(Broken)
    before = state_of(model)
    with pytest.raises(ValueError, match="never"):
        probe(model, id="m")
    assert same(before, state_of(model))


# --- identity ----------------------------------------------------------------------------------------------


def test_one_folder_loaded_twice_has_one_card_wherever_it_lies(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    first, again, moved = (load(f, id="m").card for f in (folder, folder, elsewhere))
    assert first == again
    assert moved == first.model_copy(update={"source": str(elsewhere)})


def test_the_fingerprint_tells_weights_config_dtype_and_attention_apart() -> None:
    def changed(change: Any) -> str:
        model = tiny_model("llama")
        change(model)
        return probe(model, id="m").fingerprint

    def weights(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight += 1e-3

    def config(model: Any) -> None:
        model.config.rms_norm_eps = 1e-3

    changes = {
        "nothing": lambda model: None,
        "weights": weights,
        "config": config,
        "dtype": lambda model: model.to(torch.bfloat16),
        "attention": lambda model: model.set_attn_implementation("eager"),
    }
    found = {what: changed(change) for what, change in changes.items()}
    assert len(set(found.values())) == len(changes)
    assert found["nothing"] == changed(lambda model: None)
    assert len(found["nothing"]) == 64


def test_a_model_in_half_precision_says_so() -> None:
    card = probe(tiny_model("llama").to(torch.bfloat16), id="m")
    layer = output(card, "model.layers.0")
    assert isinstance(layer, TensorLeaf)
    assert (card.dtype, layer.dtype, card.packs) == ("bfloat16", "bfloat16", True)


# --- loading -----------------------------------------------------------------------------------------------


def test_loading_tells_how_far_it_is(tiny_folders: dict[str, Path]) -> None:
    told: list[float] = []
    engine = load(tiny_folders["gpt2"], id="mine", progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert (engine.card.id, engine.card.source) == ("mine", str(tiny_folders["gpt2"]))
    assert not engine.model.training
    assert not any(p.requires_grad for p in engine.model.parameters())


def test_a_folder_without_a_tokenizer_is_not_given_one(tiny_folders: dict[str, Path], name: str) -> None:
    engine = load(tiny_folders[name])
    assert (engine.tokenizer, engine.tokenizer_json, engine.card.has_tokenizer) == (None, None, False)


def test_loading_in_another_dtype(tiny_folders: dict[str, Path]) -> None:
    assert load(tiny_folders["llama"], dtype="bfloat16").card.dtype == "bfloat16"


def test_what_cannot_be_loaded_is_said_in_one_line(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no folder .*/nowhere; give a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"there is no dtype 'float33'; try float32"):
        load(tiny_folders["llama"], dtype="float33")
    broken = shutil.copytree(tiny_folders["llama"], tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(InputError, match="is not a causal language model"):
        load(broken)
    empty = shutil.copytree(tiny_folders["llama"], tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        load(empty)

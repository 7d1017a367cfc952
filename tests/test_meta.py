"""Cards of models whose weights are not there: the same as those of the loaded models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from pellucid import LanguageModel
from pellucid_shared.card import ModelCard, TensorLeaf, leaves
from pellucid_shared.errors import (
    InputError,
    NotFoundError,
    OrderError,
    ShapeError,
    ValueNotReadyError,
)
from pellucid_worker import loader
from pellucid_worker.meta import Unknown, WeightsNeededError, meta_card, without_numbers
from pellucid_worker.probe import probe
from references import capture
from tiny_models import HIDDEN, NAMES, VOCAB

CONFIGS = Path(__file__).parent / "configs"
IDS = [[5, 9, 31, 7, 2, 40]]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within this test no weights may be read."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(loader, "_model", refuse)


def known_without_weights(card: ModelCard) -> dict[str, Any]:
    """What a card says that does not take numbers to know."""
    inside = {"__all__": {"body", "shared"}}
    return card.model_dump(
        exclude={"packs": True, "fingerprint": True, "bodies": True, "prefill": inside, "decode": inside}
    )


# --- the same card -----------------------------------------------------------------------------------------


def test_the_card_is_that_of_the_loaded_model(tiny_folders: dict[str, Path], name: str) -> None:
    loaded = loader.load(tiny_folders[name], id="m").card
    found = meta_card(str(tiny_folders[name]), id="m")
    assert known_without_weights(found) == known_without_weights(loaded)
    assert (found.packs, found.fingerprint) == (None, "meta")
    assert loaded.packs is True


def test_an_attention_that_returns_its_weights_is_followed(tiny_folders: dict[str, Path], name: str) -> None:
    model = loader.load(tiny_folders[name], id="m").model
    model.set_attn_implementation("eager")  # type: ignore[operator]
    bare = loader.without_weights(tiny_folders[name])
    bare.set_attn_implementation("eager")  # type: ignore[operator]
    without_numbers(bare)
    found, wanted = probe(bare, id="m", weights=False), probe(model, id="m")
    assert known_without_weights(found) == known_without_weights(wanted)


def test_experts_that_are_called_one_by_one_are_followed(tiny_folders: dict[str, Path]) -> None:
    """How many rows an expert gets is a matter of numbers; all other shapes are the loaded model's."""

    def shapes(card: ModelCard) -> list[Any]:
        return [
            (c.module, c.call, path, getattr(leaf, "shape", None))
            for c in card.prefill
            for path, leaf in leaves(c.output)
            if not c.module.endswith("experts.act_fn")
        ]

    model = loader.load(tiny_folders["mixtral"], id="m").model
    bare = loader.without_weights(tiny_folders["mixtral"])
    without_numbers(bare)
    for each in (model, bare):
        each.config._experts_implementation = "eager"  # type: ignore[union-attr]
    found, wanted = probe(bare, id="m", weights=False), probe(model, id="m")
    assert shapes(found) == shapes(wanted)
    assert sum(c.module == "model.layers.0.mlp.experts.act_fn" for c in found.prefill) > 1


def test_another_dtype(tiny_folders: dict[str, Path], name: str) -> None:
    loaded = loader.load(tiny_folders[name], id="m", dtype="bfloat16").card
    found = meta_card(str(tiny_folders[name]), id="m", dtype="bfloat16")
    assert known_without_weights(found) == known_without_weights(loaded)
    assert found.dtype == "bfloat16"


def test_what_is_no_model_is_said_as_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no folder .*/nowhere; give a folder"):
        meta_card(str(tmp_path / "nowhere"), id="m")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        meta_card(str(tmp_path), id="m")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(InputError, match="is not a causal language model"):
        meta_card(str(tmp_path), id="m")
    with pytest.raises(InputError, match="there is no dtype 'float33'"):
        meta_card(str(CONFIGS / "gpt2-xl"), id="m", dtype="float33")


# --- large models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "parameters", "layers", "sites"),
    [
        (
            "gpt2-xl",
            1_557_611_200,
            48,
            {"transformer.h.47.mlp.c_fc": ("batch", "tokens", 6400), "lm_head": ("batch", "tokens", 50257)},
        ),
        (
            "qwen3-8b",
            8_190_735_360,
            36,
            {"model.layers.35.self_attn.q_norm": ("batch", "tokens", 32, 128)},
        ),
        (
            "mixtral-8x7b",
            46_702_792_704,
            32,
            {"model.layers.31.mlp": ("batch", "tokens", 4096), "model.layers.0.mlp.experts": ("rows", 4096)},
        ),
    ],
)
def test_sizes_of_large_models(folder: str, parameters: int, layers: int, sites: Any) -> None:
    card = meta_card(str(CONFIGS / folder), id="m")
    assert card.parameters == parameters
    blocks = "transformer.h" if folder == "gpt2-xl" else "model.layers"
    assert len(card.children[blocks]) == layers
    for path, shape in sites.items():
        found = card.call_index[path, 0].output
        assert isinstance(found, TensorLeaf)
        assert found.shape == shape
    assert len(card.decode) == len(card.prefill)


_SCAN_70B = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
import pellucid
from pellucid_shared.errors import PellucidError

model = pellucid.LanguageModel(sys.argv[1], remote=False)
ids = list(range(1, 12))
told = {"tree": repr(model), "parameters": model.card.parameters}
with model.scan([ids, ids]):
    middle = model.model.layers[40].output
    told["middle"] = [list(middle.shape), str(middle.dtype)]
    model.model.layers[79].mlp.output[:, -1] = middle[:, -1] @ middle[0, :].T @ middle[0, :]
    told["logits"] = list(model.lm_head(model.model.norm(middle)).shape)
    try:
        middle + model.model.layers[0].mlp.gate_proj.output
    except PellucidError as error:
        told["error"] = str(error)
try:
    with model.scan(ids):
        model.model.layers[3].output = model.model.layers[4].output
except PellucidError as error:
    told["order"] = str(error)
told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(told))
"""


@pytest.mark.timeout(300)
def test_a_70b_model_is_scanned_under_4_gib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCAN_70B, str(CONFIGS / "llama-3.1-70b")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["parameters"] == 70_553_706_496
    assert told["middle"] == [[2, 11, 8192], "torch.bfloat16"]
    assert told["logits"] == [2, 11, 128256]
    assert "[2, 11, 8192] and [2, 11, 28672] do not broadcast" in told["error"]
    assert "model.layers.3.output is written with a value that needs model.layers.4.output" in told["order"]
    assert "(0-79): 80 x LlamaDecoderLayer -> [batch, tokens, 8192] bfloat16" in told["tree"]
    assert told["peak"] < 4 * 2**30


# --- a model of the user's that is not loaded --------------------------------------------------------------


def test_scan_tree_and_names_load_nothing(tiny_folders: Any, never_loaded: None, name: str) -> None:
    model: Any = LanguageModel(tiny_folders[name], remote=False, rename={"lm_head": "head"})
    assert "-> [batch, tokens, 99] float32" in repr(model)
    assert model.card.base_model_prefix in dir(model)
    assert model.config.vocab_size == VOCAB
    assert model.tokenizer is None
    with model.scan(IDS):
        logits = model.head.output.save()
        assert logits.shape == (1, 6, VOCAB)
        with pytest.raises(ShapeError, match="do not broadcast"):
            _ = logits + torch.zeros(5)
    with pytest.raises(ValueNotReadyError, match="scan"):
        _ = logits + 1


def test_a_scan_takes_it_that_invokes_share_a_pass(tiny_folders: Any, never_loaded: None) -> None:
    model: Any = LanguageModel(tiny_folders["llama"], remote=False)
    with model.scan() as tracer:
        with tracer.invoke(IDS):
            model.model.layers[0].output[:] = 0
            last = model.model.layers[0].output[:, -1]
        with tracer.invoke([[1, 2, 3]]):
            model.model.layers[1].output[:, -1] = last
    with pytest.raises(OrderError), model.scan() as tracer:
        with tracer.invoke(IDS):
            late = model.model.layers[1].output
        with tracer.invoke([[1, 2, 3]]):
            model.model.layers[0].output[:] = late[:, -1]


def test_generation_is_scanned(tiny_folders: Any, never_loaded: None) -> None:
    model: Any = LanguageModel(tiny_folders["mixtral"], remote=False)
    with model.scan(IDS):
        pass
    assert model.card.decode_index["lm_head", 0].output.shape == ("batch", 1, VOCAB)


def test_the_first_run_loads_and_the_card_stays_what_it_was(
    tiny_folders: dict[str, Path], tiny_models: dict[str, PreTrainedModel], name: str
) -> None:
    model: Any = LanguageModel(tiny_folders[name], remote=False)
    early, tree = model.card, repr(model)
    path = next(p for p, _ in model.named_modules() if p.endswith(".1.mlp"))
    with model.trace(IDS):
        found = model.get(f"{path}.output").save()
    torch.testing.assert_close(found, capture(tiny_models[name], torch.tensor(IDS), path))
    assert early.fingerprint == "meta"
    assert len(model.card.fingerprint) == 64
    assert known_without_weights(model.card) == known_without_weights(early)
    assert repr(model) == tree


def test_dispatch_loads_at_once(tiny_folders: dict[str, Path]) -> None:
    assert LanguageModel(tiny_folders["llama"], remote=False, dispatch=True).card.packs is True


def test_a_folder_without_weights_is_scanned_and_not_run(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    model: Any = LanguageModel(folder, remote=False)
    with model.scan(IDS):
        assert model.model.layers[0].output.shape == (1, 6, HIDDEN)
    with pytest.raises(NotFoundError, match="cannot be loaded"), model.trace(IDS):
        model.model.layers[0].output.save()


class LooksAtNumbers(LlamaForCausalLM):
    """A model that goes another way where a hidden state is changed in shape, in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits.unsqueeze_(0).squeeze_(0)
        return found


def test_what_cannot_be_followed_is_loaded_and_says_so(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_its_own(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.__class__ = LooksAtNumbers
        return model

    build = loader.without_weights
    monkeypatch.setattr("pellucid_worker.meta.without_weights", of_its_own)
    with pytest.raises(WeightsNeededError, match="cannot be followed without its weights"):
        meta_card(str(tiny_folders["llama"]), id="m")
    model: Any = LanguageModel(tiny_folders["llama"], remote=False)
    with pytest.warns(UserWarning, match="cannot be followed without its weights .*; it is loaded now"):
        assert model.card.packs is True


def test_quantized_weights_are_needed(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsNeededError, match="is quantized, so its modules are known once it is loaded"):
        meta_card(str(folder), id="m")


# --- tensors without numbers -------------------------------------------------------------------------------


def unknown(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return Unknown(torch.empty(shape, dtype=dtype, device="meta"))


def test_numbers_stay_unknown_and_whole_numbers_are_drawn() -> None:
    x = unknown(3, 4)
    assert isinstance(x @ unknown(4, 5), Unknown)
    assert isinstance(torch.zeros(3, 4) + x, Unknown)
    values, indices = x.topk(2)
    assert isinstance(values, Unknown)
    assert type(indices) is torch.Tensor
    assert 0 <= int(indices.min()) <= int(indices.max()) < 4
    assert type(x > 0) is torch.Tensor
    assert isinstance(float(x.sum()), float)
    assert x[torch.tensor([True, False, True])].shape == (2, 4)
    assert x.nonzero().shape[1] == 2


def test_edits_in_place_keep_the_object() -> None:
    x, mask = unknown(3, 4), torch.zeros(3, 4)
    assert x.add_(1) is x
    mask[1:] = x[1:]
    assert type(mask) is torch.Tensor
    with pytest.raises(NotImplementedError, match="changes the shape"):
        x.unsqueeze_(0)
    with pytest.raises(RuntimeError):
        x @ unknown(5, 5)


def test_tied_parameters_stay_one(tiny_folders: dict[str, Path]) -> None:
    model = loader.without_weights(tiny_folders["gpt2"])
    without_numbers(model)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]

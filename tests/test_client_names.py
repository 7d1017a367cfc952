"""Aliases of modules, modules and sites by path, and what a model says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from client_fixtures import CardModel
from pellucid import LanguageModel
from pellucid_shared.errors import IndexOutOfRangeError, InputError, PellucidError, UnknownModuleError
from references import capture

IDS = [[5, 9, 31, 7]]


@pytest.fixture
def plain(tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models["gpt2"]


@pytest.fixture
def model(plain: PreTrainedModel) -> Any:
    return LanguageModel("gpt2", model=plain, rename={"transformer.h": "layers"})


def test_both_names_of_a_module_work_also_for_what_is_below_it(model: Any, plain: Any) -> None:
    model.rename({"mlp": "feed_forward", "transformer": "body"})
    old = model.transformer.h[1].mlp.c_fc
    for new in (
        model.layers[1].feed_forward.c_fc,
        model.body.layers[1].mlp.c_fc,
        model.transformer.layers[-1].feed_forward.c_fc,
        model["body"]["layers"]["1"]["feed_forward"]["c_fc"],
        model.h[1].mlp.c_fc,
    ):
        assert new == old
        assert new.path == "transformer.h.1.mlp.c_fc"
    with model.trace(IDS) as tracer:
        saved = model.layers[1].feed_forward.output.save()
    torch.testing.assert_close(saved, capture(plain, torch.tensor(IDS), "transformer.h.1.mlp"))
    assert tracer.graph.nodes[0].site.module == "transformer.h.1.mlp", "a graph has the model's own names"


def test_aliases_are_shown_completed_and_keep_to_their_model(model: Any, plain: Any) -> None:
    model.rename({"mlp": "feed_forward"})
    assert "(h, layers): ModuleList" in repr(model)
    assert "(mlp, feed_forward): GPT2MLP -> [batch, tokens, 32] float32" in repr(model.layers[0])
    assert {"layers", "h", "transformer", "rename", "get", "tokenizer"} <= set(dir(model))
    assert {"feed_forward", "mlp"} <= set(dir(model.layers[0]))
    assert "layers" in dir(model.transformer)
    assert set(model.children) == {"transformer", "lm_head"}
    assert not hasattr(LanguageModel("gpt2", model=plain), "layers")


def test_a_module_may_have_several_aliases_and_an_alias_one_of_its_own(model: Any) -> None:
    model.rename({"layers": "blocks"})
    model.rename({"blocks.0": "bottom", "layers": "blocks"})  # said twice, it is one
    assert model.blocks == model.layers == model.h
    assert model.bottom == model.layers.bottom == model.layers[0]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"transformer.hh": "x"}, UnknownModuleError, r"no module 'transformer.hh' to be renamed. Nearest: "),
        ({"": "x"}, UnknownModuleError, "no module '' to be renamed"),
        ({"lm_head": "transformer"}, InputError, "transformer is a module of the model already"),
        ({"lm_head": "h"}, InputError, "'lm_head' cannot be called 'h': h is a module of the model already"),
        ({"lm_head": "layers"}, InputError, r"layers is transformer.h already"),
        ({"mlp": "attn"}, InputError, r"transformer.h.0.attn is a module of the model already"),
        ({"lm_head": "output"}, InputError, "every module has a 'output' of its own"),
        ({"lm_head": "trace"}, InputError, "every module has a 'trace' of its own"),
        ({"lm_head": "a.b"}, InputError, "an alias is one name, as it is written after a dot; found 'a.b'"),
        ({"lm_head": "class"}, InputError, "an alias is one name"),
        ({"lm_head": 3}, InputError, "found 3"),
        (["lm_head"], InputError, 'names are given as {"path": "alias"}'),
    ],
)
def test_aliases_that_cannot_be_say_why_at_the_users_line(
    model: Any, names: Any, error: type[PellucidError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        model.rename({"ln_1": "norm", **names} if isinstance(names, dict) else names)
    assert str(caught.value).startswith(f"{__file__}:")
    assert not hasattr(model.layers[0], "norm"), "all of them, or none"


def test_names_given_to_a_model_are_checked_when_its_card_is_first_read(plain: Any) -> None:
    wrong = LanguageModel("gpt2", model=plain, rename={"hh": "blocks"})  # line of the fault
    with pytest.raises(UnknownModuleError, match="'hh' to be renamed") as caught:
        _ = wrong.lm_head
    with open(__file__) as file:
        line = next(i for i, text in enumerate(file, 1) if text.endswith("# line of the fault\n"))
    assert str(caught.value).startswith(f"{__file__}:{line}:")


def test_modules_and_sites_are_looked_up_by_path(model: Any, plain: Any) -> None:
    assert model.get("transformer.h.1.mlp") == model.get("layers.-1.mlp") == model.get("h.1").get("mlp")
    with model.trace(IDS):
        output = model.get("layers.1.output").save()
        given = model.get("transformer.h.1.input").save()
        every = model.get("h.1").get("inputs")
        assert len(every) == 2
    torch.testing.assert_close(output, capture(plain, torch.tensor(IDS), "transformer.h.1"))
    torch.testing.assert_close(given, capture(plain, torch.tensor(IDS), "transformer.h.1", "input"))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("layers.0.mpl", UnknownModuleError, "'transformer.h.0.mpl'. Nearest: transformer.h.0.mlp"),
        ("layers.7.output", IndexOutOfRangeError, r"transformer.h\[7\] is out of range"),
        ("layers.0.trace", UnknownModuleError, "no module or parameter 'transformer.h.0.trace'"),
        ("layers.0.output.mlp", UnknownModuleError, "no module or parameter 'transformer.h.0.output'"),
        ("", InputError, "looked up by its path"),
        (3, InputError, "looked up by its path"),
    ],
)
def test_paths_that_lead_nowhere_say_so(
    model: Any, path: Any, error: type[PellucidError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        model.get(path)
    assert str(caught.value).startswith(f"{__file__}:")


def test_a_child_that_is_called_output_is_not_hidden_from_its_path() -> None:
    from hand_card import hand_card
    from pellucid_shared.card import ModuleInfo

    card = hand_card()
    own = ModuleInfo(path="unused.output", class_name="Linear")
    at = next(i for i, m in enumerate(card.modules) if m.path == "unused") + 1
    model: Any = CardModel(card.model_copy(update={"modules": (*card.modules[:at], own, *card.modules[at:])}))
    assert model.get("unused.output").path == "unused.output"


def test_a_config_is_read_by_attribute_also_inside() -> None:
    from hand_card import hand_card

    inner = {"model_type": "tiny_text", "hidden_size": 8}
    config = {"text_config": inner, "rope_parameters": {"rope_theta": 1.0}, "layers": 2}
    model = CardModel(hand_card().model_copy(update={"config": config}))
    assert model.config.text_config.hidden_size == 8
    assert model.config.rope_parameters["rope_theta"] == 1.0
    assert model.config.layers == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.config.nothing


def test_the_config_has_every_name_that_transformers_has(model: Any, plain: Any) -> None:
    assert model.config.hidden_size == plain.config.hidden_size == 32
    assert model.config.num_hidden_layers == plain.config.num_hidden_layers

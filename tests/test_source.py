"""``module.source``: values inside modules, against plain transformers under eager attention.

The reference is a ``TorchFunctionMode`` of this file's own that looks for one function of torch while one
module runs, or the arithmetic written out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pellucid
from pellucid_shared.card import ModelCard
from pellucid_shared.errors import ExecutionError, GraphError, OrderError, PellucidError, SiteError
from pellucid_shared.flat import flatten
from pellucid_shared.graph import Graph
from pellucid_shared.lint import lint
from pellucid_shared.show import show
from pellucid_shared.storage import shares_pass
from pellucid_shared.values import Site, decode, encode
from pellucid_worker.inside import Watch
from references import capture, forward
from service import running_service
from tiny_models import HEADS, HIDDEN, NAMES

IDS = [[5, 9, 31, 7, 2, 40]]
#: Prompts of different lengths; one is a batch of two rows.
PROMPTS: list[list[list[int]]] = [
    IDS,
    [[11, 3, 8]],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]],
]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}

#: Given the result of the function that is looked for, returns None or what takes its place.
Change = Callable[[torch.Tensor], "torch.Tensor | None"]


class Look(TorchFunctionMode):
    """Sees one kind of call while ``where`` runs and no child of it does; changes what it gives."""

    def __init__(self, where: torch.nn.Module, wanted: Callable[[Any, Any], bool], change: Change) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self._wanted, self._change, self._depth = wanted, change, 0
        self._handles = [
            where.register_forward_pre_hook(self._set(1)),
            where.register_forward_hook(self._set(0)),
        ]
        for child in where.children():
            self._handles.append(child.register_forward_pre_hook(self._set(0)))
            self._handles.append(child.register_forward_hook(self._set(1)))

    def _set(self, depth: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._depth = depth

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth and self._wanted(func, args):
            self.seen.append(result.clone())
            changed = self._change(result)
            return result if changed is None else changed
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()


def softmax(func: Any, args: Any) -> bool:
    return func is torch.nn.functional.softmax


def residual_add(func: Any, args: Any) -> bool:
    return func.__name__ in ("add", "__add__") and all(
        isinstance(a, torch.Tensor) and a.shape[-1:] == (HIDDEN,) and a.ndim == 3 for a in args
    )


def keep(_: torch.Tensor) -> None:
    return None


def first_only(change: Change) -> Change:
    """``change`` for the first call alone."""
    left = [change]
    return lambda value: left.pop()(value) if left else None


def looked(
    model: Any,
    path: str,
    wanted: Callable[[Any, Any], bool],
    ids: list[list[int]],
    change: Change = keep,
    mask: Any = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the calls that were looked for gave, and the logits."""
    with Look(model.get_submodule(path), wanted, change) as look:
        logits = forward(model, torch.tensor(ids), mask=mask).logits
    return look.seen, logits


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    return {
        name: pellucid.LanguageModel(name, model=model, remote=False) for name, model in tiny_models.items()
    }


@pytest.fixture(scope="module")
def eagers(tiny_models: Any) -> dict[str, Any]:
    """Plain models that were told to use eager attention, by transformers' own means."""
    found = {name: copy.deepcopy(model) for name, model in tiny_models.items()}
    for model in found.values():
        model.set_attn_implementation("eager")
    return found


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(models: Any, name: str) -> Any:
    return models[name]


@pytest.fixture
def eager(eagers: Any, name: str) -> Any:
    return eagers[name]


@pytest.fixture
def plain(tiny_models: Any, name: str) -> Any:
    return tiny_models[name]


@pytest.fixture
def llama(models: Any) -> Any:
    return models["llama"]


def block_path(name: str, layer: int = 0) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{layer}"


def attention_path(name: str, layer: int = 0) -> str:
    return f"{block_path(name, layer)}.{ATTENTION.get(name, 'self_attn')}"


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def implementations(model: Any) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


@pytest.fixture(autouse=True)
def left_as_found(tiny_models: Any) -> Iterator[None]:
    """No mode stays on, no hook stays in, and attention is what it was."""
    yield
    assert torch._C._len_torch_function_stack() == 0
    for model in tiny_models.values():
        assert implementations(model) == {"sdpa"}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_probabilities_are_read(model: Any, eager: Any, name: str, layer: int) -> None:
    (wanted,), logits = looked(eager, attention_path(name, layer), softmax, IDS)
    with model.trace(IDS):
        found = model.get(attention_path(name, layer)).source.softmax_0.output.save()
        out = model.lm_head.output.save()
    assert found.shape == (1, HEADS, 6, 6)
    assert torch.equal(found, wanted)
    assert torch.equal(out, logits)


def test_attention_probabilities_are_those_of_queries_and_keys(models: Any, tiny_models: Any) -> None:
    """GPT-2 has no rotation: softmax(q k / sqrt(d)) below the diagonal, from c_attn's own output."""
    path = attention_path("gpt2")
    qkv = capture(tiny_models["gpt2"], torch.tensor(IDS), f"{path}.c_attn")
    q, k, v = (x.view(1, 6, HEADS, 8).transpose(1, 2) for x in qkv.split(HIDDEN, dim=2))
    hidden = torch.ones(6, 6).triu(1).bool()
    scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(hidden, -math.inf)
    gpt2 = models["gpt2"]
    with gpt2.trace(IDS):
        found = gpt2.get(path).source.softmax_0.output.save()
        mixed = gpt2.get(path).source.matmul_1.output.save()
    close(found, scores.softmax(-1))
    close(mixed, scores.softmax(-1) @ v)


def without_a_head(probabilities: torch.Tensor) -> torch.Tensor:
    changed = probabilities.clone()
    changed[:, 1] = 0
    return changed


@pytest.mark.parametrize("how", ["in place", "replaced", "where it is used"])
def test_one_heads_pattern_is_zeroed(model: Any, eager: Any, name: str, how: str) -> None:
    _, wanted = looked(eager, attention_path(name), softmax, IDS, without_a_head)
    assert (wanted - forward(eager, torch.tensor(IDS)).logits).abs().max() > 1e-4
    with model.trace(IDS):
        source = model.get(attention_path(name)).source
        if how == "in place":
            source.softmax_0.output[:, 1] = 0
        elif how == "replaced":
            changed = source.softmax_0.output.clone()
            changed[:, 1] = 0
            source.softmax_0.output = changed
        else:
            source.matmul_1.input[:, 1] = 0
        after = source.dropout_0.output.save()
        logits = model.lm_head.output.save()
    assert (after[:, 1] == 0).all()
    close(after[:, [0, 2, 3]].sum(-1), torch.ones(1, 3, 6))
    assert torch.equal(logits, wanted)


def test_several_invokes_of_different_lengths_each_edit_their_own(model: Any, eager: Any, name: str) -> None:
    found, kept = [], []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                probabilities = model.get(attention_path(name)).source.softmax_0.output
                kept.append(probabilities.clone().save())
                probabilities[:, 1] = 0
                found.append(model.lm_head.output.save())
        with tracer.invoke(PROMPTS[1]):
            untouched = model.lm_head.output.save()
    for ids, before, logits in zip(PROMPTS, kept, found, strict=True):
        (wanted, *_), changed = looked(eager, attention_path(name), softmax, ids, without_a_head)
        close(before, wanted)
        close(logits, changed)
    close(untouched, forward(eager, torch.tensor(PROMPTS[1])).logits)


def test_padded_rows_attend_to_their_own_tokens(models: Any, eagers: Any) -> None:
    rows = [[5, 9, 31], [7, 2, 40, 8, 4]]
    padded = torch.tensor([[0, 0, 5, 9, 31], rows[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for name in ("llama", "gpt2"):
        (wanted,), _ = looked(eagers[name], attention_path(name), softmax, padded.tolist(), mask=mask)
        with models[name].trace(rows):
            found = models[name].get(attention_path(name)).source.softmax_0.output.save()
        close(found[0, :, 2:], wanted[0, :, 2:])
        close(found[1], wanted[1])
        assert (found[0, :, 2:, :2] == 0).all()


def test_scores_before_the_softmax(models: Any, eagers: Any) -> None:
    (wanted,), _ = looked(eagers["llama"], attention_path("llama"), softmax, IDS)
    llama = models["llama"]
    with llama.trace(IDS):
        scores = llama.model.layers[0].self_attn.source.softmax_0.input.save()
        raw = llama.model.layers[0].self_attn.source.matmul_0.output.save()
    close(scores.softmax(-1), wanted)
    close(
        raw / math.sqrt(8) + torch.full((6, 6), -math.inf).triu(1),
        scores.masked_fill(scores < -1e30, -math.inf),
    )


def test_only_traces_that_look_into_attention_run_eager(llama: Any, tiny_models: Any) -> None:
    """The attention module's second output is there under eager attention only."""
    with llama.trace(IDS):
        llama.model.layers[0].source.add_0.output.save()
        fused = llama.lm_head.output.save()
    assert torch.equal(fused, forward(tiny_models["llama"], torch.tensor(IDS)).logits)


# --- the residual stream -----------------------------------------------------------------------------------


def test_the_first_residual_add_is_read_and_written(model: Any, plain: Any, name: str) -> None:
    def doubled_at_the_end(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed[:, -1] *= 2
        return changed

    path = block_path(name)
    (before, *_), wanted = looked(plain, path, residual_add, IDS, first_only(doubled_at_the_end))
    with model.trace(IDS):
        value = model.get(path).source.add_0.output
        kept = value.clone().save()
        value[:, -1] *= 2
        logits = model.lm_head.output.save()
    assert torch.equal(kept, before)
    assert torch.equal(logits, wanted)
    with model.trace(IDS):
        site = model.get(path).source.add_0
        site.output = doubled_at_the_end(kept)
        replaced = model.lm_head.output.save()
    assert torch.equal(replaced, wanted)


def test_the_first_residual_add_is_what_it_says(models: Any, tiny_models: Any) -> None:
    ids = torch.tensor(IDS)
    for name in ("llama", "qwen3", "mixtral", "gpt2"):
        stream = capture(tiny_models[name], ids, block_path(name), "input")
        attended = capture(tiny_models[name], ids, attention_path(name))
        with models[name].trace(IDS):
            source = models[name].get(block_path(name)).source
            total = source.add_0.output.save()
            left, right = source.add_0.inputs[0][:2]
            parts = pellucid.save([left, right])
        assert torch.equal(total, stream + attended)
        assert torch.equal(parts[0] + parts[1], total)


def test_invokes_that_read_the_residual_stream_share_a_pass(model: Any, plain: Any, name: str) -> None:
    path = block_path(name, 1)
    with model.trace() as tracer:
        kept, found = [], []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                value = model.get(path).source.add_0.output
                kept.append(value.clone().save())
                model.get(path).source.add_0.output = value * 3
                found.append(model.lm_head.output.save())
    assert shares_pass(flatten(tracer.graph), 0, model.card)
    for ids, before, logits in zip(PROMPTS, kept, found, strict=True):
        (wanted, *_), changed = looked(plain, path, residual_add, ids, first_only(lambda v: v * 3))
        close(before, wanted)
        close(logits, changed)


def test_a_value_of_one_invoke_is_written_in_another(llama: Any, tiny_models: Any) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(IDS):
            taken = llama.model.layers[0].source.add_0.output[:, -1]
        with tracer.invoke([[11, 3, 8]]):
            llama.model.layers[0].source.add_0.output[:, -1] = taken
            logits = llama.lm_head.output.save()
    (other, *_), _ = looked(tiny_models["llama"], block_path("llama"), residual_add, IDS)

    def put(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed[:, -1] = other[:, -1]
        return changed

    _, wanted = looked(tiny_models["llama"], block_path("llama"), residual_add, [[11, 3, 8]], first_only(put))
    close(logits, wanted)


def test_the_product_of_an_activation(llama: Any, tiny_models: Any) -> None:
    """Between act_fn and down_proj; its input is edited, and what the child module takes shows it."""
    taken = capture(tiny_models["llama"], torch.tensor(IDS), "model.layers.0.mlp.down_proj", "input")
    with llama.trace(IDS):
        mlp = llama.model.layers[0].mlp
        product = mlp.source.mul_0.output.clone().save()
        mlp.source.mul_0.output = mlp.source.mul_0.output * 0
        given = mlp.down_proj.input.save()
    assert torch.equal(product, taken)
    assert (given == 0).all()


def test_the_argument_of_a_call_is_replaced(llama: Any, tiny_models: Any) -> None:
    with llama.trace(IDS):
        mlp = llama.model.layers[0].mlp
        up = mlp.up_proj.output.save()
        mlp.source.mul_0.input = torch.ones(1, 6, 64)
        product = mlp.source.mul_0.output.save()
    assert torch.equal(product, up)


# --- what it means -----------------------------------------------------------------------------------------


def warned(model: Any, body: Callable[[], Any], ids: Any = IDS) -> Any:
    """What a trace with this body gives, which saves what is edited in place on another line."""
    with pytest.warns(UserWarning, match="is saved here and edited in place"):
        return traced(model, body, ids)


def traced(model: Any, body: Callable[[], Any], ids: Any) -> Any:
    with model.trace(ids):
        return body()


def test_one_tensor_under_several_names(llama: Any, tiny_models: Any) -> None:
    """add_0's output is what the norm behind it takes: an edit by one name shows by the other."""

    def body() -> Any:
        block = llama.model.layers[0]
        total = block.source.add_0.output.save()
        kept = block.source.add_0.output.clone().save()
        block.post_attention_layernorm.input[:] = 0
        return total, kept, llama.lm_head.output.save()

    total, kept, logits = warned(llama, body)
    assert (total == 0).all()
    (before, *_), wanted = looked(
        tiny_models["llama"], block_path("llama"), residual_add, IDS, first_only(torch.zeros_like)
    )
    assert torch.equal(kept, before)
    assert torch.equal(logits, wanted)


def test_a_view_shows_an_edit_of_what_it_is_a_view_of(llama: Any) -> None:
    def body() -> Any:
        attention = llama.model.layers[0].self_attn
        queries = attention.q_proj.output.save()
        attention.source.view_0.output[:] = 0
        llama.lm_head.output.save()
        return queries

    assert (warned(llama, body) == 0).all()


@pytest.mark.filterwarnings("ignore:.*is saved here and edited in place")
def test_names_of_one_memory_do_not_share_a_pass(models: Any) -> None:
    """GPT-2's c_fc gives a view of what addmm made; each invoke sees its edit by both names."""
    gpt2 = models["gpt2"]
    found = []
    with gpt2.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                source = gpt2.transformer.h[0].mlp.c_fc.source
                found.append(source.addmm_0.output.save())
                source.view_1.output[:] = 0
                gpt2.lm_head.output.save()
    assert not shares_pass(flatten(tracer.graph), 0, gpt2.card)
    assert all((value == 0).all() for value in found)


def test_reads_run_in_the_models_order_whatever_the_programs(llama: Any, tiny_models: Any) -> None:
    with llama.trace(IDS):
        block = llama.model.layers[0]
        late = block.source.add_1.output
        early = block.source.add_0.output
        grown = (late - early).save()
        written = block.mlp.output.save()
    close(grown, written)


def test_a_write_that_comes_too_late_names_both(llama: Any) -> None:
    with pytest.raises(
        OrderError, match=r"layers\.0\.source\.add_0\.output is written .*layers\.0\.mlp\.output"
    ):
        with llama.trace(IDS):
            block = llama.model.layers[0]
            block.source.add_0.output = block.mlp.output
    with pytest.raises(
        OrderError, match=r"test_source\.py:\d+: .*source\.softmax_0\.inputs\[0\]\[0\] is written"
    ):
        with llama.trace(IDS):
            source = llama.model.layers[0].self_attn.source
            source.softmax_0.input = source.softmax_0.output
    with pytest.raises(OrderError, match=r"edits model\.layers\.0\.source\.add_0\.output in place"):
        with llama.trace(IDS):
            total = llama.model.layers[0].source.add_0.output
            total += llama.model.layers[1].source.add_0.output


def test_what_comes_in_time_between_children_is_written(llama: Any) -> None:
    """The second add's argument may use what the MLP gave, its first input what the block was given."""
    with llama.trace(IDS):
        block = llama.model.layers[0]
        block.source.add_1.input = block.mlp.output * 2
        total = block.output.save()
        given = block.mlp.output.save()
    close(total, given * 3)


def test_one_invokes_pattern_is_given_to_another(llama: Any, eagers: Any) -> None:
    """They run one after another, so what the first made is there for the second, and not the other way."""
    other = [[1, 2, 3, 4, 5, 6]]
    with llama.trace() as tracer:
        with tracer.invoke(IDS):
            pattern = llama.model.layers[0].self_attn.source.softmax_0.output
        with tracer.invoke(other):
            llama.model.layers[0].self_attn.source.softmax_0.output = pattern
            logits = llama.lm_head.output.save()
    (taken, *_), _ = looked(eagers["llama"], attention_path("llama"), softmax, IDS)
    _, wanted = looked(eagers["llama"], attention_path("llama"), softmax, other, lambda _: taken)
    assert torch.equal(logits, wanted)
    with (
        pytest.raises(OrderError, match="can run only after the model has moved on"),
        llama.trace() as tracer,
    ):
        with tracer.invoke(IDS):
            pattern = llama.model.layers[0].self_attn.source.softmax_0.output
        with tracer.invoke(other):
            pattern *= llama.model.layers[0].self_attn.source.softmax_0.output


def test_applied_modules_are_not_counted(llama: Any, tiny_models: Any) -> None:
    """A lens, and a watched child, applied between two calls: theirs are none of the pass's calls."""
    with llama.trace(IDS):
        block = llama.model.layers[0]
        total = block.source.add_0.output
        total_then = total.clone().save()
        product = block.mlp.source.mul_0.output.save()
        taken = block.mlp.down_proj.input.save()
        lens = llama.lm_head(llama.model.norm(total)).save()
        inner = block.mlp(total).save()
        second = block.source.add_1.output.save()
        whole = block.output.save()
    assert lens.shape == (1, 6, 99)
    with torch.no_grad():
        assert torch.equal(product, taken)
        assert torch.equal(inner, tiny_models["llama"].model.layers[0].mlp(total_then))
    assert torch.equal(second, whole)


def test_operations_at_a_childs_site_are_not_the_modules_calls(llama: Any, tiny_models: Any) -> None:
    """An addition written at the MLP's output runs while the block does; add_1 is still the block's own."""
    with llama.trace(IDS):
        block = llama.model.layers[0]
        block.mlp.output = block.mlp.output + block.mlp.output
        second = block.source.add_1.output.save()
        whole = block.output.save()
    assert torch.equal(second, whole)


# --- generation --------------------------------------------------------------------------------------------


def generated(
    model: Any, path: str, wanted: Any, change: Change = keep
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.tensor(IDS)
    with Look(model.get_submodule(path), wanted, change) as look, torch.no_grad():
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return result, look.seen


def test_attention_in_each_step(model: Any, eager: Any, name: str) -> None:
    if name == "gemma3":
        with pytest.raises(SiteError, match=r"step of generation after the first differs"):
            with model.generate(IDS, max_new_tokens=4) as tracer, tracer.iter[1]:
                model.get(attention_path(name)).source.softmax_0.output.save()
        return
    wanted, seen = generated(eager, attention_path(name), softmax, without_a_head)
    with model.generate(IDS, max_new_tokens=4, eos_token_id=[]) as tracer:
        with tracer.iter[:]:
            probabilities = model.get(attention_path(name)).source.softmax_0.output
            kept = probabilities.clone().save()
            probabilities[:, 1] = 0
        ids = tracer.result.save()
    assert ids.tolist() == wanted.tolist()
    assert [tuple(k.shape) for k in kept] == [(1, HEADS, 6, 6), *((1, HEADS, 1, n) for n in (7, 8, 9))]
    for found, reference in zip(kept, seen, strict=True):
        close(found, reference)


def test_the_residual_stream_in_each_step(model: Any, plain: Any, name: str) -> None:
    path = block_path(name)
    wanted, seen = generated(plain, path, residual_add)
    with model.generate(max_new_tokens=4, eos_token_id=[]) as tracer:
        with tracer.invoke(IDS):
            with tracer.iter[:]:
                kept = model.get(path).source.add_0.output.save()
            ids = tracer.result.save()
        with tracer.invoke(PROMPTS[1]):
            with tracer.iter[:]:
                model.get(path).source.add_0.output[:] = 0
    assert ids.tolist() == wanted.tolist()
    each = len(seen) // 4
    for found, reference in zip(kept, seen[::each], strict=True):
        close(found, reference)


# --- names -------------------------------------------------------------------------------------------------


def test_calls_are_listed_with_shapes(llama: Any) -> None:
    block = llama.model.layers[1]
    state = "[batch, tokens, 32] float32"
    assert repr(block.source) == (
        f"model.layers.1.source:\n  add_0({state}, {state}) -> {state}\n  add_1({state}, {state}) -> {state}"
    )
    listing = repr(block.self_attn.source)
    scores = "[batch, 4, tokens, tokens] float32"
    assert f"softmax_0({scores}, dim=-1, dtype=torch.float32) -> {scores}" in listing
    assert "view_0([batch, tokens, 32] float32, (batch, tokens, -1, 8)) -> [batch, tokens, 4, 8]" in listing
    assert {"softmax_0", "matmul_1"} <= set(dir(block.self_attn.source))
    assert list(block.source) == ["add_0", "add_1"]
    assert len(block.source) == 2
    assert "source" in dir(block)


def test_a_site_is_looked_up_by_path(llama: Any) -> None:
    with llama.trace(IDS):
        found = llama.get("model.layers.0.source.add_0.output").save()
        same = llama.model.layers[0].source.add_0.output.save()
    assert torch.equal(found, same)
    assert repr(llama.get("layers.0.source.add_0")) == "model.layers.0.source.add_0"


def refusal(ask: Callable[[], Any]) -> str:
    with pytest.raises(SiteError) as caught:
        ask()
    assert "test_source.py:" in str(caught.value)
    return caught.value.message


def test_a_call_that_is_not_there(llama: Any, models: Any) -> None:
    block = llama.model.layers[0]
    message = refusal(lambda: block.self_attn.source.softmx_0)
    assert message.startswith("model.layers.0.self_attn.source has no softmx_0. Nearest: softmax_0")
    assert "It calls view_0, transpose_0, view_1" in message
    assert "softmax_0" in refusal(lambda: block.self_attn.source.softmax)
    assert "are add_0, add_1" in refusal(lambda: block.source.add_2)
    assert "It calls nothing of its own" in refusal(lambda: models["gpt2"].transformer.h[0].mlp.source.add_0)
    assert "has no scaled_dot_product_attention_0" in refusal(
        lambda: block.self_attn.source.scaled_dot_product_attention_0
    )
    assert "never called" in refusal(lambda: llama.model.layers.source.add_0)
    assert not hasattr(block.source, "add_7")


def test_what_is_no_tensor_is_refused(models: Any) -> None:
    gpt2 = models["gpt2"]
    with gpt2.trace(IDS):
        source = gpt2.transformer.h[0].attn.source
        assert "size_0" not in dir(source)  # sizes are no tensors
        assert "split_0.output has no 7" in refusal_of_index(lambda: source.split_0.output[7])
        queries, *_ = source.split_0.output
        queries.save()
    assert queries.shape == (1, 6, HIDDEN)
    with gpt2.trace(IDS):
        with pytest.raises(
            PellucidError, match=r"transpose_3\.inputs\[0\]\[1\] is None and cannot be written"
        ):
            source = gpt2.transformer.h[0].attn.source
            source.transpose_3.inputs[0][1] = 5.0


def refusal_of_index(ask: Callable[[], Any]) -> str:
    with pytest.raises(PellucidError) as caught:
        ask()
    return caught.value.message


def test_a_shape_that_follows_no_rule_is_refused(models: Any) -> None:
    mixtral = models["mixtral"]
    with mixtral.trace(IDS):
        experts = mixtral.model.layers[0].mlp.experts
        with pytest.raises(SiteError, match=r"\[\?\] float32"):
            _ = experts.source.mul_0.output.foo


def test_a_call_cannot_be_assigned(llama: Any) -> None:
    with llama.trace(IDS):
        with pytest.raises(PellucidError, match=r"source\.add_0 cannot be assigned: .*add_0\.output"):
            llama.model.layers[0].source.add_0 = 1.0
        with pytest.raises(PellucidError, match=r"add_0 has no 'outputs'"):
            llama.model.layers[0].source.add_0.outputs = 1.0
        llama.lm_head.output.save()


def test_outside_a_trace_a_call_has_no_value(llama: Any) -> None:
    with pytest.raises(PellucidError, match="inside a trace"):
        _ = llama.model.layers[0].source.add_0.output


def test_a_module_that_calls_otherwise_than_it_was_probed_says_so(llama: Any) -> None:
    """With padding, positions are given, and the base model does not count them itself."""
    with llama.trace(IDS):
        counted = llama.model.source.arange_0.output.save()
    assert counted.tolist() == list(range(6))
    with pytest.raises(SiteError, match=r"test_source\.py:\d+: model calls .* where it called arange_0"):
        with llama.trace([[5, 9], [5, 9, 31]]):
            llama.model.source.arange_0.output.save()


# --- the graph ---------------------------------------------------------------------------------------------


def test_sites_in_json(llama: Any) -> None:
    with llama.trace(IDS) as tracer:
        source = llama.model.layers[0].self_attn.source
        source.matmul_1.input = source.softmax_0.output * 2
        llama.lm_head.output.save()
    graph = tracer.graph
    assert Graph.from_json(graph.to_json()) == graph
    assert (
        b'{"site":{"kind":"call","module":"model.layers.0.self_attn","path":["softmax_0"]}}'
        in graph.to_json()
    )
    assert (
        b'"kind":"call_input","module":"model.layers.0.self_attn","path":["matmul_1",0,0]' in graph.to_json()
    )
    assert "v0 = model.layers.0.self_attn.source.softmax_0.output\n" in show(graph)
    assert "model.layers.0.self_attn.source.matmul_1.inputs[0][0] = v1" in show(graph)
    site = Site("h.0", "call", ("split_0", 1), 2, 1)
    assert decode(encode(site)) == site


@pytest.mark.parametrize("path", [(), (0,)])
def test_a_site_inside_names_its_call(llama: Any, path: Any) -> None:
    with llama.trace(IDS) as tracer:
        llama.lm_head.output.save()
    node = tracer.graph.nodes[0]
    wrong = type(node)("site.get", (Site("h.0", "call", path),))
    with pytest.raises(GraphError, match="begins with the name of the call"):
        lint(Graph("m", tracer.graph.regions, (wrong,)))


def test_the_card_survives_json(llama: Any) -> None:
    card = llama.card
    again = ModelCard.model_validate_json(card.model_dump_json())
    assert again == card
    for step in (0, 1):
        for call in card.decode if step else card.prefill:
            body = card.insides.body(call)
            for inside in body.calls if body else ():
                for kind in ("call_input", "call"):
                    site = Site(call.module, kind, (inside.name,), step=step, call=call.call)
                    at = again.insides.at(step, card.insides.when(site))
                    assert (at.module, at.kind, at.call, at.name) == (
                        call.module,
                        kind,
                        call.call,
                        inside.name,
                    )


# --- the run -----------------------------------------------------------------------------------------------


def test_a_trace_without_calls_pays_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is watched")

    monkeypatch.setattr(Watch, "__init__", never)
    with llama.trace(IDS):
        llama.model.layers[0].output.save()


def test_the_mode_is_on_only_while_the_module_runs(
    llama: Any, tiny_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths: dict[str, int] = {}
    handles = [
        tiny_models["llama"]
        .get_submodule(path)
        .register_forward_pre_hook(
            lambda *_, path=path: depths.update({path: torch._C._len_torch_function_stack()})
        )
        for path in ("model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp")
    ]
    try:
        with llama.trace(IDS):
            llama.model.layers[0].source.add_1.output.save()
            llama.lm_head.output.save()
    finally:
        for handle in handles:
            handle.remove()
    assert depths == {"model.embed_tokens": 0, "model.layers.0.mlp": 1, "model.layers.1.mlp": 0}


def test_the_pass_ends_after_the_last_call_that_is_needed(llama: Any, tiny_models: Any) -> None:
    assert llama.card  # probed before the hook is there
    ran: list[str] = []
    handle = tiny_models["llama"].model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append("mlp"))
    try:
        with llama.trace(IDS):
            llama.model.layers[0].source.add_0.output.save()
    finally:
        handle.remove()
    assert ran == []


def test_a_failing_operation_at_a_call_is_that_traces_alone(llama: Any) -> None:
    with pytest.raises(
        ExecutionError, match=r"test_source\.py:\d+: torch\.linalg\.inv failed on \[1, 4, 6, 6\]"
    ):
        with llama.trace(IDS):
            probabilities = llama.model.layers[0].self_attn.source.softmax_0.output
            torch.linalg.inv(probabilities * 0).save()
    with llama.trace(IDS):
        fine = llama.model.layers[0].self_attn.source.softmax_0.output.save()
    close(fine.sum(-1), torch.ones(1, HEADS, 6))


# --- remote ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"llama": tiny_folders["llama"]}, tmp_path_factory.mktemp("source")) as url:
        yield url


@pytest.fixture(scope="module")
def there(service: str) -> Any:
    return pellucid.LanguageModel("llama", remote=service)


@pytest.mark.xdist_group("source")
def test_remote_is_what_local_is(there: Any, llama: Any, eagers: Any) -> None:
    assert repr(there.model.layers[0].self_attn.source) == repr(llama.model.layers[0].self_attn.source)
    found: dict[str, Mapping[str, Any]] = {}
    for where, model in (("there", there), ("here", llama)):
        with model.trace() as tracer:
            kept = []
            for ids in PROMPTS:
                with tracer.invoke(ids):
                    block = model.model.layers[0]
                    block.self_attn.source.softmax_0.output[:, 1] = 0
                    kept.append(pellucid.save([block.source.add_0.output, model.lm_head.output]))
        found[where] = {str(i): [v.detach() for v in pair] for i, pair in enumerate(kept)}
    for key, pair in found["here"].items():
        for own, far in zip(pair, found["there"][key], strict=True):
            close(far, own)
    for ids, key in zip(PROMPTS, found["there"], strict=True):
        close(
            found["there"][key][1],
            looked(eagers["llama"], attention_path("llama"), softmax, ids, without_a_head)[1],
        )


@pytest.mark.xdist_group("source")
def test_remote_generation_and_errors(there: Any, eagers: Any) -> None:
    wanted, _ = generated(eagers["llama"], attention_path("llama"), softmax, without_a_head)
    with there.generate(IDS, max_new_tokens=4, eos_token_id=[]) as tracer:
        with tracer.iter[:]:
            there.model.layers[0].self_attn.source.softmax_0.output[:, 1] = 0
        ids = tracer.result.save()
    assert ids.tolist() == wanted.tolist()
    with pytest.raises(SiteError, match=r"test_source\.py:\d+: model calls .* where it called arange_0"):
        with there.trace([[5, 9], [5, 9, 31]]):
            there.model.source.arange_0.output.save()
    assert "Nearest: softmax_0" in refusal(lambda: there.model.layers[0].self_attn.source.softmx_0)

"""Several prompts in one trace: each invoke sees what it would see alone, packed into one pass or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphs import Program, run
from pellucid_shared.errors import OrderError
from pellucid_shared.wire import TokenizedInvoke
from pellucid_worker.engine import Engine
from references import capture, first, forward, with_first
from tiny_models import HIDDEN, LAYERS, NAMES, tiny_model

#: Module paths by architecture: the layers, and what attends inside one.
PATHS = {
    "llama": ("model.layers", "self_attn"),
    "gpt2": ("transformer.h", "attn"),
    "gpt_neox": ("gpt_neox.layers", "attention"),
    "gemma3": ("model.layers", "self_attn"),
    "qwen3": ("model.layers", "self_attn"),
    "mixtral": ("model.layers", "self_attn"),
}
HEAD = "lm_head"
#: Different lengths; the third is a batch of two.
PROMPTS: list[list[list[int]]] = [
    [[5, 9, 31, 7, 2, 40]],
    [[11, 3, 8]],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]],
    [[42]],
]
RAGGED = [[5, 9, 31, 7, 2, 40], [11, 3, 8], [42]]


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {name: Engine.from_model(tiny_model(name), id="m") for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["packed", "one by one"])
def packs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def engine(engines: dict[str, Engine], name: str, packs: bool) -> Engine:
    whole = engines[name]
    return Engine(whole.model, None, whole.card.model_copy(update={"packs": packs}))


@contextlib.contextmanager
def passes(engine: Engine) -> Iterator[list[torch.Size]]:
    """The shape of the ids of each forward pass, by a plain hook."""
    seen: list[torch.Size] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].shape)

    handle = engine.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# --- reads and writes --------------------------------------------------------------------------------------


def test_each_invoke_reads_what_it_would_read_alone(engine: Engine, name: str, packs: bool) -> None:
    layers, attention = PATHS[name]
    sites = {"h": (f"{layers}.0", ()), "a": (f"{layers}.1.{attention}", (0,)), "logits": (HEAD, ())}
    program = Program()
    for i in range(len(PROMPTS)):
        for key, (module, path) in sites.items():
            program.save(program.get(module, path=path, invoke=i), f"{key}{i}")
    with passes(engine) as seen:
        found = run(engine, program, *PROMPTS)
    tokens = sum(len(p) * len(p[0]) for p in PROMPTS)
    assert seen == ([(1, tokens)] if packs else [(len(p), len(p[0])) for p in PROMPTS])
    for i, prompt in enumerate(PROMPTS):
        for key, (module, _) in sites.items():
            close(found[f"{key}{i}"], capture(engine.model, torch.tensor(prompt), module))


def test_each_invoke_writes_to_its_own_rows_only(engine: Engine, name: str) -> None:
    layers, attention = PATHS[name]
    program = Program()
    program.fill(program.get(f"{layers}.0", invoke=0), 0.5, (slice(None), -1))
    program.set(f"{layers}.0", program.op("torch.mul", program.get(f"{layers}.0", invoke=1), 2), invoke=1)
    program.set(f"{layers}.1.{attention}", 0, path=(0,), invoke=2)
    for i in range(len(PROMPTS)):
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    found = run(engine, program, *PROMPTS)

    def last(out: Any) -> Any:
        h = first(out).clone()
        h[:, -1] = 0.5
        return with_first(out, h)

    hooks: list[dict[str, Any]] = [
        {f"{layers}.0": last},
        {f"{layers}.0": lambda out: with_first(out, first(out) * 2)},
        {f"{layers}.1.{attention}": lambda out: with_first(out, torch.zeros_like(first(out)))},
        {},
    ]
    for i, prompt in enumerate(PROMPTS):
        close(found[f"logits{i}"], forward(engine.model, torch.tensor(prompt), after=hooks[i]).logits)


def test_names_alias_in_a_shared_pass_as_they_do_alone(engine: Engine, name: str) -> None:
    layers, _ = PATHS[name]
    program = Program()
    for i in range(2):
        h = program.get(f"{layers}.0", invoke=i)
        program.save(h, f"h{i}")
        program.fill(program.get(f"{layers}.1", "input", (0, 0), invoke=i), float(i), (slice(None), 0))
        value = program.op("torch.clone", program.get(f"{layers}.1", invoke=i))
        program.set(f"{layers}.1", value, invoke=i)
        program.op("tensor.mul_", value, -1)  # the model takes this one
        late = program.op("torch.mean", program.get(HEAD, invoke=i))
        program.fill(value, late)  # and this one comes too late for it
        program.save(value, f"value{i}")
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    found = run(engine, program, *PROMPTS[:2])
    for i, prompt in enumerate(PROMPTS[:2]):
        wanted = capture(engine.model, torch.tensor(prompt), f"{layers}.0")
        wanted[:, 0] = i
        close(found[f"h{i}"], wanted)
        hooks = {
            f"{layers}.0": lambda out, w=wanted: with_first(out, w),
            f"{layers}.1": lambda out: with_first(out, -first(out)),
        }
        logits = forward(engine.model, torch.tensor(prompt), after=hooks).logits
        close(found[f"logits{i}"], logits)
        close(found[f"value{i}"], logits.mean().expand(wanted.shape))


def test_a_value_written_to_a_site_is_the_models_tensor_there(engine: Engine, name: str) -> None:
    layers, _ = PATHS[name]
    program = Program()
    for i in range(2):
        value = program.op("torch.mul", program.get(f"{layers}.0", invoke=i), 2)
        program.set(f"{layers}.0", value, invoke=i)
        program.fill(program.get(f"{layers}.1", "input", (0, 0), invoke=i), 3.0, (slice(None), 0))
        program.save(value, f"value{i}")
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    found = run(engine, program, *PROMPTS[:2])
    for i, prompt in enumerate(PROMPTS[:2]):
        wanted = 2 * capture(engine.model, torch.tensor(prompt), f"{layers}.0")
        wanted[:, 0] = 3
        close(found[f"value{i}"], wanted)
        hooks = {f"{layers}.0": lambda out, w=wanted: with_first(out, w)}
        close(found[f"logits{i}"], forward(engine.model, torch.tensor(prompt), after=hooks).logits)


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_what_is_done_to_a_written_value_apart_from_its_site_never_reaches_the_model(engine: Engine) -> None:
    first, norm = "model.layers.0", "model.layers.1.input_layernorm"
    program = Program()
    for i in range(2):
        value = program.op("torch.mul", program.get(first, invoke=i), 2)
        program.set(first, value, invoke=i)
        late = program.op("torch.mean", program.get("model.layers.1", "input", (0, 0), invoke=i))
        program.fill(value, late)
        program.save(value, f"value{i}")
        program.save(program.get(norm, "input", (0, 0), invoke=i), f"taken{i}")
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    found = run(engine, program, *PROMPTS[:2])
    for i, prompt in enumerate(PROMPTS[:2]):
        wanted = 2 * capture(engine.model, torch.tensor(prompt), first)
        close(found[f"taken{i}"], wanted)
        close(found[f"value{i}"], wanted.mean().expand(wanted.shape))
        doubled = {first: lambda out: 2 * out}
        close(found[f"logits{i}"], forward(engine.model, torch.tensor(prompt), after=doubled).logits)


def test_values_go_from_an_invoke_to_a_later_one(engine: Engine, name: str) -> None:
    layer = f"{PATHS[name][0]}.0"
    program = Program()
    last = program.op("getitem", program.get(layer, invoke=0), (slice(None), -1))
    program.fill(program.get(layer, invoke=1), last, (slice(None), -1))
    program.save(program.get(HEAD, invoke=1), "logits")
    found = run(engine, program, *PROMPTS[:2])["logits"]
    vector = capture(engine.model, torch.tensor(PROMPTS[0]), layer)[:, -1]

    def patch(out: Any) -> Any:
        h = first(out).clone()
        h[:, -1] = vector
        return with_first(out, h)

    close(found, forward(engine.model, torch.tensor(PROMPTS[1]), after={layer: patch}).logits)


# --- what cannot share -------------------------------------------------------------------------------------


def test_a_site_that_is_no_slice_of_a_packed_one_makes_invokes_run_one_by_one(
    engines: dict[str, Engine],
) -> None:
    engine = engines["llama"]
    program = Program()
    for i in range(2):
        program.save(program.get("model.rotary_emb", path=(0,), invoke=i), f"cosine{i}")
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    with passes(engine) as seen:
        found = run(engine, program, *PROMPTS[:2])
    assert seen == [(1, 6), (1, 3)]
    for i, prompt in enumerate(PROMPTS[:2]):
        close(found[f"logits{i}"], forward(engine.model, torch.tensor(prompt)).logits)
        assert found[f"cosine{i}"].shape == (1, len(prompt[0]), 8)


def test_a_router_sees_the_rows_of_its_own_invoke(engines: dict[str, Engine]) -> None:
    engine, gate = engines["mixtral"], "model.layers.0.mlp.gate"
    program = Program()
    for i in range(len(PROMPTS)):
        program.save(program.get(gate, "input", (0, 0), invoke=i), f"rows{i}")
    with passes(engine) as seen:
        found = run(engine, program, *PROMPTS)
    assert len(seen) == 1
    for i, prompt in enumerate(PROMPTS):
        assert found[f"rows{i}"].shape == (len(prompt) * len(prompt[0]), HIDDEN)
        close(found[f"rows{i}"], capture(engine.model, torch.tensor(prompt), gate, "input"))


def test_one_by_one_a_value_cannot_go_back_to_an_earlier_invoke(
    engine: Engine, name: str, packs: bool
) -> None:
    layers, _ = PATHS[name]
    program = Program()
    vector = program.op("getitem", program.get(f"{layers}.0", invoke=1), (slice(None), -1))
    program.fill(program.get(f"{layers}.1", invoke=0), vector, (slice(None), -1))
    program.save(program.get(HEAD, invoke=0), "logits")
    if packs:
        assert run(engine, program, *PROMPTS[:2])["logits"].shape[:2] == (1, 6)
        return
    with pytest.raises(OrderError, match="can run only after the model has moved on"):
        run(engine, program, *PROMPTS[:2])
    program = Program()
    column = program.op("torch.mean", program.get(f"{layers}.0", invoke=1))
    whole = program.op("torch.mul", program.get(f"{layers}.1", invoke=0), column)
    program.set(f"{layers}.1", whole, invoke=0)
    program.save(program.get(HEAD, invoke=0), "logits")
    with pytest.raises(OrderError, match="these invokes run one after another"):
        run(engine, program, *PROMPTS[:2])


def test_only_the_invokes_that_are_needed_run_where_they_run_one_by_one(engines: dict[str, Engine]) -> None:
    engine = engines["llama"]
    program = Program()
    program.save(program.get("model.rotary_emb", path=(0,), invoke=1), "cosine")
    with passes(engine) as seen:
        run(engine, program, *PROMPTS[:3])
    assert seen == [(1, 3)]


# --- padding -----------------------------------------------------------------------------------------------


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])


@pytest.mark.parametrize("others", [[], [PROMPTS[1]]], ids=["alone", "beside another"])
def test_rows_of_different_lengths_are_seen_left_padded(
    engine: Engine, name: str, others: list[list[list[int]]]
) -> None:
    layer = f"{PATHS[name][0]}.{LAYERS - 1}"
    program = Program()
    program.save(program.get(layer), "h")
    program.save(program.get(HEAD), "logits")
    program.save(program.get(HEAD, invoke=len(others)), "last")
    found = run(engine, program, RAGGED, *others)
    ids, mask = padded(RAGGED)
    real = mask.bool()
    close(found["h"][real], capture(engine.model, ids, layer, mask=mask)[real])
    close(found["logits"][real], forward(engine.model, ids, mask=mask).logits[real])
    for row, own in enumerate(RAGGED):
        close(found["logits"][row, -len(own) :], forward(engine.model, torch.tensor([own])).logits[0])
    if others:
        close(found["last"], forward(engine.model, torch.tensor(others[0])).logits)


def test_edits_at_the_last_position_hit_every_rows_last_token(engine: Engine, name: str) -> None:
    layer = f"{PATHS[name][0]}.0"
    program = Program()
    program.fill(program.get(layer), 0.5, (slice(None), -1))
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, RAGGED)["logits"]

    def last(out: Any) -> Any:
        h = first(out).clone()
        h[:, -1] = 0.5
        return with_first(out, h)

    for row, own in enumerate(RAGGED):
        wanted = forward(engine.model, torch.tensor([own]), after={layer: last}).logits
        close(found[row, -len(own) :], wanted[0])


def test_a_mask_of_the_users_hides_tokens(engine: Engine) -> None:
    ids, mask = [[7, 7, 5, 9, 31], [7, 1, 2, 3, 4]], [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    program = Program()
    program.save(program.get(HEAD), "logits")
    found = engine.run(program.graph(), [TokenizedInvoke(ids=ids, mask=mask)], {})["logits"]
    for row, (own, bits) in enumerate(zip(ids, mask, strict=True)):
        seen = own[bits.index(1) :]
        close(found[row, -len(seen) :], forward(engine.model, torch.tensor([seen])).logits[0])


# --- modules out of order ----------------------------------------------------------------------------------


def test_a_module_applied_beside_other_invokes_attends_as_it_does_alone(
    engines: dict[str, Engine],
) -> None:
    engine = engines["llama"]
    program = Program()
    for i in range(len(PROMPTS)):
        embedded = program.get("model.embed_tokens", invoke=i)
        whole = program.apply("model", inputs_embeds=embedded)
        program.save(program.op("getitem", whole, "last_hidden_state"), f"own{i}")
        program.save(program.get(HEAD, invoke=i), f"logits{i}")
    with passes(engine) as seen:
        found = run(engine, program, *PROMPTS)
    assert len(seen) == 1
    for i, prompt in enumerate(PROMPTS):
        close(found[f"own{i}"], capture(engine.model, torch.tensor(prompt), "model.norm"))
        close(found[f"logits{i}"], forward(engine.model, torch.tensor(prompt)).logits)


def test_a_neighbours_replacement_leaves_names_of_one_tensor_one(tiny_models: Any) -> None:
    """Layer 0's output is layer 1's input: an edit of one shows in the other, whoever shares the pass."""
    engine = Engine.from_model(tiny_models["llama"], id="m")

    def program(count: int) -> Program:
        made = Program()
        hidden = made.get("model.layers.0", invoke=0)
        made.fill(made.get("model.layers.1", "input", (0, 0), invoke=0), 0.5)
        mlp = made.get("model.layers.1.mlp", invoke=0)
        made.set("model.layers.1.mlp", made.op("torch.add", mlp, hidden), invoke=0)
        made.save(hidden, "h")
        made.save(made.get("lm_head", invoke=0), "logits")
        if count > 1:
            other = made.get("model.layers.0", invoke=1)
            made.set("model.layers.0", made.op("torch.add", other, 1), invoke=1)
            made.save(made.get("lm_head", invoke=1), "other")
        return made

    alone = run(engine, program(1), [[69, 4]])
    together = run(engine, program(2), [[69, 4]], [[1, 2, 3]])
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-5)


def test_a_replacement_in_one_invoke_parts_no_names_of_another(engines: dict[str, Engine]) -> None:
    program = Program()
    program.set("model.layers.1.mlp", 0.5, "input", (0, 0), invoke=0)
    given = program.get("model.layers.1.mlp", "input", (0, 0), invoke=1)
    program.op("tensor.zero_", program.get("model.layers.1.mlp.gate_proj", "input", (0, 0), invoke=1))
    program.save(given, "given")
    found = run(engines["llama"], program, [[5, 9]], [[1, 2, 3]])
    assert torch.equal(found["given"], torch.zeros(1, 3, HIDDEN))

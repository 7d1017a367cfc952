"""What a graph means, against the same lines in plain PyTorch hooks: names of tensors, versions, writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs import Program, run
from pellucid_shared.errors import OrderError, PellucidError, ShapeError
from pellucid_shared.packing import digest
from pellucid_shared.values import TensorRef
from pellucid_worker.engine import Engine
from pellucid_worker.tensors import to_wire
from references import capture, forward
from tiny_models import HIDDEN, VOCAB, tiny_model

FIRST, SECOND, HEAD = "model.layers.0", "model.layers.1", "lm_head"
IDS = [[5, 9, 31, 7, 2, 40]]
SHAPE = (1, len(IDS[0]), HIDDEN)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_model(tiny_model("llama"), id="m")


@pytest.fixture(scope="module")
def early(engine: Engine) -> torch.Tensor:
    """The first layer's output, unedited."""
    return capture(engine.model, torch.tensor(IDS), FIRST)


@pytest.fixture(scope="module")
def late(engine: Engine) -> torch.Tensor:
    """The second layer's output, unedited."""
    return capture(engine.model, torch.tensor(IDS), SECOND)


def logits(engine: Engine, change: Callable[[torch.Tensor], Any], module: str = FIRST) -> torch.Tensor:
    """The model's logits under one plain hook."""
    found: torch.Tensor = forward(engine.model, torch.tensor(IDS), after={module: change}).logits
    return found


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


# --- when a node runs --------------------------------------------------------------------------------------


def test_sites_may_be_read_in_any_order(engine: Engine, early: torch.Tensor, late: torch.Tensor) -> None:
    program = Program()
    difference = program.op("torch.sub", program.get(SECOND), program.get(FIRST))
    program.save(difference, "d")
    close(run(engine, program, IDS)["d"], late - early)


def test_the_programs_order_holds_within_a_site(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    old = program.get(FIRST)
    program.set(FIRST, program.op("torch.mul", old, 2))
    new = program.get(FIRST)
    program.set(FIRST, program.op("torch.add", new, 1))
    for name, value in (
        ("old", old),
        ("new", new),
        ("last", program.get(FIRST)),
        ("logits", program.get(HEAD)),
    ):
        program.save(value, name)
    found = run(engine, program, IDS)
    close(found["old"], early)
    close(found["new"], 2 * early)
    close(found["last"], 2 * early + 1)
    close(found["logits"], logits(engine, lambda h: h * 2 + 1))


def test_a_read_written_after_a_write_sees_it_wherever_the_model_shows_that_tensor(engine: Engine) -> None:
    program = Program()
    program.set(FIRST, 0.5)
    program.save(program.get(SECOND, "input", (0, 0)), "h")
    assert torch.equal(run(engine, program, IDS)["h"], torch.full(SHAPE, 0.5))


# --- names are names of tensors ----------------------------------------------------------------------------


def test_an_edit_in_place_shows_in_every_name_of_the_tensor(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    h = program.get(FIRST)
    view = program.op("getitem", h, (slice(None), -1))
    copy, sum_ = program.op("torch.clone", h), program.op("torch.sum", view)
    program.fill(view, 0.0)
    for name, value in (
        ("h", h),
        ("view", view),
        ("copy", copy),
        ("sum", sum_),
        ("logits", program.get(HEAD)),
    ):
        program.save(value, name)
    found = run(engine, program, IDS)

    def edit(out: torch.Tensor) -> torch.Tensor:
        out[:, -1] = 0
        return out

    wanted = early.clone()
    wanted[:, -1] = 0
    close(found["h"], wanted)
    close(found["view"], torch.zeros(1, HIDDEN))
    close(found["copy"], early)
    close(found["sum"], early[:, -1].sum())
    close(found["logits"], logits(engine, edit))


def test_an_edit_of_the_next_layers_input_shows_in_this_layers_output(engine: Engine) -> None:
    program = Program()
    h = program.get(FIRST)
    program.save(h, "h")  # saved before the edit, shown after it
    program.fill(program.get(SECOND, "input", (0, 0)), 3.0)
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)
    assert torch.equal(found["h"], torch.full(SHAPE, 3.0))
    close(found["logits"], logits(engine, lambda h: torch.full_like(h, 3.0)))


def test_a_replacement_never_changes_what_a_name_names(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    h = program.get(FIRST)
    program.set(FIRST, 0)
    program.fill(program.get(FIRST), 7.0, (slice(None), 0))
    program.save(h, "h")
    program.save(program.get(FIRST), "new")
    found = run(engine, program, IDS)
    close(found["h"], early)
    wanted = torch.zeros(SHAPE)
    wanted[:, 0] = 7
    assert torch.equal(found["new"], wanted)


def test_a_saved_buffer_is_its_last_version(engine: Engine, early: torch.Tensor, late: torch.Tensor) -> None:
    program = Program()
    buffer = program.op("torch.zeros", [3])
    program.save(buffer, "buffer")
    program.fill(buffer, program.op("torch.mean", program.get(SECOND)), 2)
    program.fill(buffer, program.op("torch.mean", program.get(FIRST)), 0)
    program.op("tensor.add_", buffer, 1)
    close(run(engine, program, IDS)["buffer"], torch.stack([early.mean(), torch.zeros(()), late.mean()]) + 1)


def test_a_read_gets_the_version_before_it_in_the_program_whenever_it_runs(
    engine: Engine, early: torch.Tensor
) -> None:
    program = Program()
    h = program.get(FIRST)
    second = program.get(SECOND)
    before = program.op("torch.add", h, second)  # runs after the edits below
    program.op("tensor.mul_", h, 2)
    between = program.op("torch.add", h, second)
    program.op("tensor.zero_", h)
    after = program.op("torch.add", h, second)
    for name, value in (("before", before), ("between", between), ("after", after)):
        program.save(value, name)
    found = run(engine, program, IDS)
    seen: list[torch.Tensor] = []
    hooks = {FIRST: torch.zeros_like, SECOND: lambda out: seen.append(out.clone())}
    forward(engine.model, torch.tensor(IDS), after=hooks)
    close(found["before"], early + seen[0])
    close(found["between"], 2 * early + seen[0])
    close(found["after"], seen[0])


def test_a_value_edited_after_it_was_written_does_not_change_what_the_model_took(
    engine: Engine, early: torch.Tensor
) -> None:
    program = Program()
    value = program.op("torch.mul", program.get(FIRST), 2)
    program.set(FIRST, value)
    program.op("tensor.zero_", value)  # within the same event
    later = program.op("torch.mul", program.get(f"{SECOND}.input_layernorm"), 0)
    program.op("tensor.add_", value, later)
    program.op("tensor.add_", value, 5)
    program.save(value, "value")
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)
    assert torch.equal(found["value"], torch.full(SHAPE, 5.0))
    close(found["logits"], logits(engine, torch.zeros_like))


def test_an_early_value_can_be_written_to_a_late_site(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    h = program.get(FIRST)
    program.set(SECOND, h)
    program.save(h, "h")
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)
    close(found["h"], early)
    close(found["logits"], logits(engine, lambda _: early.clone(), SECOND))


def test_an_older_version_can_be_written_to_a_late_site(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    h = program.get(FIRST)
    program.set(SECOND, h)
    program.op("tensor.mul_", h, -1)  # behind the write in the program, before it in the model
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)["logits"]
    hooks = {FIRST: lambda out: out.mul_(-1), SECOND: lambda _: early.clone()}
    close(found, forward(engine.model, torch.tensor(IDS), after=hooks).logits)


def test_a_view_that_exists_only_later_still_names_the_buffer(engine: Engine) -> None:
    program = Program()
    buffer = program.op("torch.zeros", [1, 1, HIDDEN])
    view = program.op("tensor.expand_as", buffer, program.get(SECOND))
    before = program.op("torch.add", view, 1)
    program.op("tensor.add_", buffer, 2)
    for name, value in (("view", view), ("before", before), ("after", program.op("torch.add", view, 1))):
        program.save(value, name)
    found = run(engine, program, IDS)
    for name, wanted in (("view", 2.0), ("before", 1.0), ("after", 3.0)):
        assert torch.equal(found[name], torch.full(SHAPE, wanted)), name


def test_what_torch_copies_of_a_later_view_keeps_the_version_it_stands_behind(engine: Engine) -> None:
    program = Program()
    buffer = program.op("torch.zeros", [1, 1, HIDDEN])
    view = program.op("tensor.expand_as", buffer, program.get(SECOND))
    copied, viewed = program.op("torch.reshape", view, (-1,)), program.op("torch.reshape", view, SHAPE)
    program.op("tensor.add_", buffer, 2)
    program.save(copied, "copied")
    program.save(viewed, "viewed")
    found = run(engine, program, IDS)
    assert torch.equal(found["copied"], torch.zeros(len(IDS[0]) * HIDDEN))
    assert torch.equal(found["viewed"], torch.full(SHAPE, 2.0))


def test_a_literal_written_to_two_sites_is_not_edited_by_way_of_one(engine: Engine) -> None:
    value = torch.linspace(-1, 1, HIDDEN).repeat(1, len(IDS[0]), 1)
    wire = to_wire(value)
    literal = TensorRef(digest(wire))
    program = Program()
    program.set(FIRST, literal)
    program.op("tensor.mul_", program.get(FIRST), 3)
    program.fill(program.op("torch.reshape", literal, (-1,)), 9.0)
    program.set(SECOND, literal)
    program.save(program.get(FIRST), "first")
    program.save(program.get(SECOND), "second")
    found = run(engine, program, IDS, tensors={digest(wire): wire})
    close(found["first"], value * 3)
    assert torch.equal(found["second"], value)


def test_a_read_names_what_was_written_before_it_in_the_model(engine: Engine) -> None:
    program = Program()
    value = program.op("torch.ones", SHAPE)
    shown = program.get(SECOND, "input", (0, 0))  # before the write in the program, behind it in the model
    program.set(FIRST, value)
    program.op("tensor.mul_", shown, 3)
    program.save(value, "value")
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)
    assert torch.equal(found["value"], torch.full(SHAPE, 3.0))
    close(found["logits"], logits(engine, lambda h: torch.full_like(h, 3.0)))


def test_a_view_of_a_whole_site_is_that_site(engine: Engine) -> None:
    program = Program()
    program.save(program.get("model.norm"), "h")
    program.fill(
        program.get(HEAD, "input", (0, 0)), 2.0
    )  # the head takes a slice of all of the norm's output
    assert torch.equal(run(engine, program, IDS)["h"], torch.full(SHAPE, 2.0))


def test_an_edit_of_an_early_site_by_way_of_a_late_one_is_an_error(engine: Engine) -> None:
    program = Program()
    program.set(SECOND, program.get(FIRST))
    program.fill(program.get(SECOND), 0.0, (slice(None), -1))
    program.save(program.get(HEAD), "logits")
    with pytest.raises(OrderError, match=r"edits model\.layers\.0\.output in place.*\.clone\(\)"):
        run(engine, program, IDS)


# --- what a write takes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 0.25, True])
def test_a_number_fills_the_site(engine: Engine, number: float) -> None:
    program = Program()
    program.set(FIRST, number)
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)["logits"]
    close(found, logits(engine, lambda h: torch.full_like(h, float(number))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floating_values_are_cast_to_the_sites_dtype(engine: Engine, dtype: torch.dtype) -> None:
    value = torch.linspace(-1, 1, HIDDEN).repeat(1, len(IDS[0]), 1).to(dtype)
    wire = to_wire(value)
    program = Program()
    program.set(FIRST, TensorRef(digest(wire)))
    program.save(program.get(FIRST), "h")
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS, tensors={digest(wire): wire})
    assert torch.equal(found["h"], value.float())
    close(found["logits"], logits(engine, lambda _: value.float()))


def test_token_ids_can_be_replaced(engine: Engine) -> None:
    program = Program()
    ids = program.get("model.embed_tokens", "input", (0, 0))
    program.set("model.embed_tokens", program.op("torch.flip", ids, [1]), "input", (0, 0))
    program.save(program.get(HEAD), "logits")
    close(run(engine, program, IDS)["logits"], forward(engine.model, torch.tensor(IDS).flip(1)).logits)


def test_a_field_of_the_models_own_output_can_be_replaced(engine: Engine) -> None:
    program = Program()
    program.set("", 1.5, "output", ("logits",))
    program.save(program.get("", "output", ("logits",)), "logits")
    assert torch.equal(run(engine, program, IDS)["logits"], torch.full((1, len(IDS[0]), VOCAB), 1.5))


def test_a_member_of_a_tuple_can_be_replaced_and_the_rest_stays(engine: Engine) -> None:
    program = Program()
    program.set(f"{SECOND}.self_attn", 0, "output", (0,))
    program.save(program.get(HEAD), "logits")
    wanted = logits(engine, lambda out: (torch.zeros_like(out[0]), *out[1:]), f"{SECOND}.self_attn")
    close(run(engine, program, IDS)["logits"], wanted)


def test_a_keyword_argument_can_be_replaced(engine: Engine) -> None:
    path = (1, "hidden_states")
    program = Program()
    program.set(
        f"{FIRST}.self_attn",
        program.op("torch.neg", program.get(f"{FIRST}.self_attn", "input", path)),
        "input",
        path,
    )
    program.save(program.get(HEAD), "logits")

    def before(args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "hidden_states": -kwargs["hidden_states"]}

    wanted = forward(engine.model, torch.tensor(IDS), before={f"{FIRST}.self_attn": before}).logits
    close(run(engine, program, IDS)["logits"], wanted)


@pytest.mark.parametrize("value", ["wide", "integers"])
def test_a_write_that_does_not_fit_is_refused(engine: Engine, value: str) -> None:
    program = Program()
    made = {"wide": ("torch.ones", [1, 6, 33]), "integers": ("torch.randint", 0, 5, list(SHAPE))}[value]
    program.set(FIRST, program.op(*made))
    program.save(program.get(HEAD), "logits")
    with pytest.raises(ShapeError, match=r"^model\.layers\.0\.output ") as caught:
        run(engine, program, IDS)
    assert caught.value.node == 1


# --- writes that cannot reach the model --------------------------------------------------------------------


def late_write(program: Program) -> None:
    program.set(FIRST, program.get(SECOND))


def late_write_of_a_computed_value(program: Program) -> None:
    scale = program.op("torch.mean", program.get(HEAD))
    program.set(FIRST, program.op("torch.mul", program.get(FIRST), scale))


def late_edit(program: Program) -> None:
    program.op("tensor.sub_", program.get(FIRST), program.get(SECOND))


def late_edit_of_a_view(program: Program) -> None:
    view = program.op("getitem", program.get(FIRST), (slice(None), -1))
    program.fill(view, program.op("torch.mean", program.get(SECOND)))


def late_edit_of_an_input(program: Program) -> None:
    program.fill(program.get(SECOND, "input", (0, 0)), program.op("torch.mean", program.get(SECOND)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (late_write, r"model\.layers\.0\.output is written with a value that needs model\.layers\.1\.output"),
        (late_write_of_a_computed_value, r"needs lm_head\.output, which the model makes only later"),
        (late_edit, r"edits model\.layers\.0\.output in place.*needs model\.layers\.1\.output.*\.clone\(\)"),
        (late_edit_of_a_view, r"edits model\.layers\.0\.output in place"),
        (late_edit_of_an_input, r"edits model\.layers\.1\.input.* in place"),
    ],
)
def test_a_write_that_comes_too_late_is_an_error(
    engine: Engine, body: Callable[[Program], None], message: str
) -> None:
    program = Program()
    body(program)
    program.save(program.get(HEAD), "logits")
    with pytest.raises(OrderError, match=message) as caught:
        run(engine, program, IDS)
    assert caught.value.node == len(program.nodes) - 3
    assert isinstance(caught.value, PellucidError)


# --- modules out of order ----------------------------------------------------------------------------------


def test_an_applied_module_runs_with_this_graphs_edits_off(engine: Engine, early: torch.Tensor) -> None:
    program = Program()
    program.fill(program.get("model.norm"), 0.0)
    lens = program.apply(HEAD, program.apply("model.norm", program.get(FIRST)))
    program.save(lens, "lens")
    program.save(program.get(HEAD), "logits")
    found = run(engine, program, IDS)
    with torch.no_grad():
        close(found["lens"], engine.model.lm_head(engine.model.model.norm(early)))
    close(found["logits"], torch.zeros(1, len(IDS[0]), VOCAB))


def test_an_applied_module_does_not_count_as_a_call(
    engine: Engine, early: torch.Tensor, late: torch.Tensor
) -> None:
    program = Program()
    program.save(program.apply("model.norm", program.get(FIRST)), "lens")
    program.save(program.get("model.norm"), "own")
    found = run(engine, program, IDS)
    with torch.no_grad():
        close(found["lens"], engine.model.model.norm(early))
        close(found["own"], engine.model.model.norm(late))


def test_the_weights_are_as_before_after_every_edit(engine: Engine) -> None:
    before = {key: value.clone() for key, value in engine.model.state_dict().items()}
    program = Program()
    for module in (FIRST, SECOND, "model.norm", HEAD):
        program.op("tensor.mul_", program.get(module), 0)
    program.save(program.get(HEAD), "logits")
    run(engine, program, IDS)
    assert all(torch.equal(before[key], value) for key, value in engine.model.state_dict().items())

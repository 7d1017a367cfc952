"""How the engine runs a graph: no more than it needs, nothing left behind, errors that name their node."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from graphs import Program, run
from pellucid_shared.errors import (
    EmptyPromptError,
    ExecutionError,
    GraphError,
    InputError,
    JobCancelledError,
    PellucidError,
    ShapeError,
    UnknownModuleError,
)
from pellucid_shared.packing import WireTensor, digest
from pellucid_shared.values import TensorRef
from pellucid_shared.wire import TokenizedInvoke
from pellucid_worker import engine as engine_module
from pellucid_worker.engine import Engine
from pellucid_worker.tensors import to_wire
from references import capture, forward
from tiny_models import HIDDEN, VOCAB, tiny_model

FIRST, SECOND, HEAD = "model.layers.0", "model.layers.1", "lm_head"
IDS = [[5, 9, 31, 7, 2, 40]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_model(tiny_model("llama"), id="m")


@contextlib.contextmanager
def counted(engine: Engine, then: Callable[[str], None] = lambda path: None) -> Iterator[Counter[str]]:
    """Calls of each module, by plain hooks; ``then`` is told of each as it begins."""
    calls: Counter[str] = Counter()

    def before(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[path] += 1
            then(path)

        return hook

    handles = [m.register_forward_pre_hook(before(path)) for path, m in engine.model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hooks(engine: Engine) -> list[tuple[str, int]]:
    found = (
        (path, len(m._forward_hooks) + len(m._forward_pre_hooks)) for path, m in engine.model.named_modules()
    )
    return [(path, count) for path, count in found if count]


def alive(shape: tuple[int, ...]) -> int:
    """Tensors of this shape that something in the process holds."""
    gc.collect()
    return sum(type(o) is torch.Tensor and tuple(o.shape) == shape for o in gc.get_objects())


def literal(tensor: torch.Tensor) -> tuple[TensorRef, dict[str, WireTensor]]:
    wire = to_wire(tensor)
    return TensorRef(digest(wire)), {digest(wire): wire}


def saving(module: str = FIRST) -> Program:
    program = Program()
    program.save(program.get(module), "h")
    return program


# --- no more than is needed --------------------------------------------------------------------------------


def test_the_pass_stops_after_the_last_site_that_is_needed(engine: Engine) -> None:
    with counted(engine) as calls:
        found = run(engine, saving(FIRST), IDS)
    assert torch.equal(found["h"], capture(engine.model, torch.tensor(IDS), FIRST))
    assert calls[f"{FIRST}.mlp.down_proj"] == 1
    assert not {path for path in calls if path.startswith((SECOND, "model.norm", HEAD))}


def test_a_site_before_a_module_stops_the_pass_before_it_runs(engine: Engine) -> None:
    program = Program()
    program.save(program.get(SECOND, "input", (0, 0)), "h")
    with counted(engine) as calls:
        found = run(engine, program, IDS)
    assert torch.equal(found["h"], capture(engine.model, torch.tensor(IDS), FIRST))
    assert calls[SECOND] <= 1
    assert not {path for path in calls if path.startswith(f"{SECOND}.")}


def test_a_graph_that_needs_no_site_runs_no_pass(engine: Engine) -> None:
    program = Program()
    program.save(program.op("torch.ones", [2, 3]), "x")
    program.get(HEAD)
    with counted(engine) as calls:
        found = run(engine, program, IDS)
    assert torch.equal(found["x"], torch.ones(2, 3))
    assert not calls


def test_nodes_that_nothing_saved_depends_on_are_not_run(engine: Engine) -> None:
    program = Program()
    program.op("torch.linalg.cholesky", program.op("torch.zeros", [3, 3]))  # it would fail
    program.set(HEAD, 0.0)
    program.fill(program.get(SECOND), 0.0)
    program.save(program.get(FIRST), "h")
    with counted(engine) as calls:
        run(engine, program, IDS)
    assert not {path for path in calls if path.startswith((SECOND, HEAD))}


def test_a_write_before_the_last_read_is_run_though_nothing_takes_its_value(engine: Engine) -> None:
    program = Program()
    program.fill(program.get(FIRST), 0.0)
    program.save(program.get(SECOND), "h")
    wanted: list[torch.Tensor] = []
    after = {FIRST: torch.zeros_like, SECOND: lambda out: wanted.append(out.clone())}
    forward(engine.model, torch.tensor(IDS), after=after)
    assert torch.equal(run(engine, program, IDS)["h"], wanted[0])


# --- nothing is left behind --------------------------------------------------------------------------------


def test_a_value_is_freed_at_its_last_use(engine: Engine) -> None:
    wide = (1, len(IDS[0]), 7 * HIDDEN)
    seen: dict[str, int] = {}
    program = Program()
    repeated = program.op("tensor.repeat", program.get(f"{FIRST}.input_layernorm"), 1, 1, 7)
    program.save(program.op("torch.sum", repeated), "early")
    middle = program.op("torch.add", program.op("torch.mean", program.get(f"{FIRST}.mlp")), 1)
    program.save(program.op("torch.mul", program.op("torch.mean", program.get(SECOND)), middle), "late")

    def then(path: str) -> None:
        if path in (f"{FIRST}.self_attn", f"{FIRST}.mlp"):
            seen[path] = alive(wide)

    with counted(engine, then):
        run(engine, program, IDS)
    assert seen == {f"{FIRST}.self_attn": 0, f"{FIRST}.mlp": 0}

    program.save(program.op("torch.mul", repeated, middle), "again")  # now it is wanted after the mlp
    with counted(engine, then):
        run(engine, program, IDS)
    assert seen == {f"{FIRST}.self_attn": 1, f"{FIRST}.mlp": 1}


def test_nothing_of_a_run_outlives_it_though_its_plan_is_kept(engine: Engine) -> None:
    tensor, tensors = literal(torch.ones(1, 6, 11 * HIDDEN))
    program = Program()
    repeated = program.op("tensor.repeat", program.get(FIRST), 1, 1, 11)
    program.save(program.op("torch.sum", program.op("torch.mul", repeated, tensor)), "sum")
    run(engine, program, IDS, tensors=tensors)
    assert alive((1, 6, 11 * HIDDEN)) == 0
    program.op("torch.linalg.cholesky", program.op("torch.zeros", [3, 3]))
    program.save(program.op("torch.linalg.cholesky", program.op("torch.zeros", [3, 3])), "never")
    with pytest.raises(ExecutionError):
        run(engine, program, IDS, tensors=tensors)
    assert alive((1, 6, 11 * HIDDEN)) == 0


def test_saved_tensors_own_their_memory(engine: Engine) -> None:
    tensor, tensors = literal(torch.arange(3.0))
    program = Program()
    h = program.get(FIRST)
    fresh = program.op("torch.add", h, 1)
    edited = program.op("tensor.add_", program.op("torch.zeros", [4]), 1)
    written = program.op("torch.mul", h, 2)
    program.set(FIRST, written)
    parts = {
        "site": h,
        "slice": program.op("getitem", h, (slice(None), -1)),
        "fresh": fresh,
        "twice": [fresh, fresh],
        "view": program.op("torch.transpose", fresh, 0, 1),
        "spread": program.op("tensor.expand", program.op("torch.zeros", [1]), 5),
        "edited": edited,
        "written": written,
        "literal": tensor,
        "applied": program.apply("model.norm", h),
        "best": program.op("torch.topk", h, 2),
    }
    for name, value in parts.items():
        program.save(value, name)
    program.save({"inside": (h, [fresh])}, "structure")
    program.save(program.get(SECOND), "after")
    found = run(engine, program, IDS, tensors=tensors)
    flat: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        else:
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    collect(found)
    assert len(flat) == 16
    assert len({t.untyped_storage().data_ptr() for t in flat}) == len(flat)
    for part in flat:
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes
    after = found["after"].clone()
    for part in flat:
        part.zero_()
    assert torch.equal(run(engine, program, IDS, tensors=tensors)["after"], after)


def test_what_is_done_to_the_models_tensor_after_a_save_does_not_show_in_it(engine: Engine) -> None:
    program = saving(FIRST)
    written = program.op("torch.ones", [1, len(IDS[0]), HIDDEN])
    program.set(SECOND, written)
    program.save(written, "written")
    program.save(program.get(HEAD), "logits")
    before = {key: value.clone() for key, value in run(engine, program, IDS).items()}

    def zero(_: Any, args: Any) -> None:
        args[0].zero_()

    handles = [engine.model.get_submodule(p).register_forward_pre_hook(zero) for p in (SECOND, "model.norm")]
    try:
        found = run(engine, program, IDS)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(found["h"], before["h"])
    assert torch.equal(found["written"], before["written"])
    assert not torch.equal(found["logits"], before["logits"])


@pytest.mark.parametrize("inputs", [[IDS], [IDS, [[1, 2]]]], ids=["alone", "packed"])
def test_hooks_and_attention_are_as_before_after_success_and_after_failure(
    engine: Engine, inputs: list[list[list[int]]]
) -> None:
    attention = engine.model.config._attn_implementation
    programs = [saving(HEAD), saving(HEAD)]
    broken = programs[1]
    zeros = broken.op("torch.mul", broken.op("getitem", broken.get(FIRST), (0, slice(0, 2), slice(0, 2))), 0)
    broken.save(broken.op("torch.linalg.cholesky", zeros), "never")
    run(engine, programs[0], *inputs)
    assert (hooks(engine), engine.model.config._attn_implementation) == ([], attention)
    with pytest.raises(ExecutionError):
        run(engine, broken, *inputs)
    assert (hooks(engine), engine.model.config._attn_implementation) == ([], attention)
    with pytest.raises(JobCancelledError):
        run(engine, programs[0], *inputs, cancelled=_set())
    assert (hooks(engine), engine.model.config._attn_implementation) == ([], attention)


def test_hooks_of_others_stay_and_are_heard(engine: Engine) -> None:
    handle = engine.model.get_submodule(FIRST).register_forward_hook(lambda *args: args[-1] * 2)
    try:
        doubled = run(engine, saving(FIRST), IDS)["h"]
        assert hooks(engine) == [(FIRST, 1)]
    finally:
        handle.remove()
    assert torch.equal(doubled, 2 * run(engine, saving(FIRST), IDS)["h"])


def test_a_run_leaves_gradients_and_random_state_alone(engine: Engine) -> None:
    program = saving(HEAD)
    program.save(program.op("torch.randn", [2]), "noise")
    state = torch.get_rng_state()
    modes: set[bool] = set()
    with counted(engine, lambda _: modes.add(torch.is_grad_enabled())):
        found = run(engine, program, IDS)
    assert modes == {False}  # nothing of the pass is kept for a backward one
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not found["h"].requires_grad


# --- errors ------------------------------------------------------------------------------------------------


def test_an_op_that_fails_names_its_node_and_what_it_met(engine: Engine) -> None:
    program = saving(FIRST)
    square = program.op("torch.mul", program.get(FIRST), 0)
    square = program.op("getitem", square, (0, slice(0, 3), slice(0, 3)))
    program.save(program.op("torch.linalg.cholesky", square), "never")
    at = len(program.nodes) - 2
    with pytest.raises(
        ExecutionError, match=r"^torch\.linalg\.cholesky failed on \[3, 3\] float32: "
    ) as caught:
        run(engine, program, IDS)
    assert caught.value.node == at
    assert "\n" not in caught.value.message


def test_a_module_that_fails_when_it_is_applied_names_its_node(engine: Engine) -> None:
    program = Program()
    program.save(program.apply(f"{FIRST}.self_attn", program.get(FIRST)), "never")  # it needs more arguments
    with pytest.raises(
        ExecutionError, match=rf"^{FIRST}\.self_attn failed on \[1, 6, 32\] float32"
    ) as caught:
        run(engine, program, IDS)
    assert caught.value.node == 1


def test_what_does_not_fit_is_said_before_anything_runs(engine: Engine) -> None:
    wrong: list[tuple[Program, type[PellucidError]]] = []
    for module, error in (("model.layers.7", UnknownModuleError), (FIRST, ShapeError)):
        program = Program()
        program.save(program.op("torch.matmul", program.get(module), program.op("torch.ones", [7])), "never")
        wrong.append((program, error))
    with counted(engine) as calls:
        for program, error in wrong:
            with pytest.raises(error) as caught:
                run(engine, program, IDS)
            assert caught.value.node in (0, 2)
    assert not calls


def test_a_model_that_fails_by_itself_says_so(engine: Engine) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no more\nof this")

    handle = engine.model.get_submodule(SECOND).register_forward_pre_hook(broken)
    try:
        with pytest.raises(
            ExecutionError, match=r"^the model failed in its forward pass: no more$"
        ) as caught:
            run(engine, saving(HEAD), IDS)
        assert caught.value.node is None
    finally:
        handle.remove()


def test_the_engine_runs_again_right_after_a_failure(engine: Engine) -> None:
    wanted = run(engine, saving(HEAD), IDS)["h"]
    broken = saving(HEAD)
    broken.fill(broken.get(FIRST), 0.0)
    broken.save(broken.op("torch.linalg.cholesky", broken.op("torch.zeros", [2, 2])), "never")
    for _ in range(2):
        with pytest.raises(ExecutionError):
            run(engine, broken, IDS)
        assert torch.equal(run(engine, saving(HEAD), IDS)["h"], wanted)


# --- cancelling --------------------------------------------------------------------------------------------


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_a_cancelled_run_ends_at_its_next_touched_site(engine: Engine) -> None:
    cancelled = threading.Event()

    def then(path: str) -> None:
        if path == f"{FIRST}.mlp":
            cancelled.set()

    program = saving(FIRST)
    program.save(program.get(HEAD), "logits")
    with counted(engine, then) as calls, pytest.raises(JobCancelledError):
        run(engine, program, IDS, cancelled=cancelled)
    assert calls[f"{FIRST}.mlp.down_proj"] == 1
    assert not {path for path in calls if path.startswith(SECOND)}
    assert torch.equal(
        run(engine, program, IDS, cancelled=threading.Event())["h"], run(engine, program, IDS)["h"]
    )


# --- plans -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each time a graph is compiled from now on."""
    seen: list[Any] = []
    compile_graph = engine_module.compile_graph

    def counting(graph: Any, *rest: Any) -> Any:
        seen.append(graph)
        return compile_graph(graph, *rest)

    monkeypatch.setattr(engine_module, "compile_graph", counting)
    engine._plans.clear()
    return seen


def test_a_graph_is_compiled_once_for_each_size(engine: Engine, compiled: list[Any]) -> None:
    for ids in ([[1, 2, 3]], [[4, 5, 6]], [[1, 2, 3]]):
        found = run(engine, saving(), ids)
        assert torch.equal(found["h"], capture(engine.model, torch.tensor(ids), FIRST))
    assert len(compiled) == 1
    assert run(engine, saving(), [[1, 2, 3], [4, 5, 6]])["h"].shape == (2, 3, HIDDEN)
    assert run(engine, saving(), [[1, 2]])["h"].shape == (1, 2, HIDDEN)
    assert len(compiled) == 3


def test_plans_are_bounded_and_the_ones_used_last_are_kept(
    engine: Engine, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_PLANS_KEPT", 2)
    one, two, three = saving(FIRST), saving(SECOND), saving(HEAD)
    for program in (one, two, one, three, one):
        run(engine, program, IDS)
    assert len(compiled) == 3
    assert len(engine._plans) == 2
    run(engine, two, IDS)
    assert len(compiled) == 4


def test_a_plan_that_is_kept_draws_on_the_tensors_of_its_own_run(engine: Engine) -> None:
    tensor, tensors = literal(torch.linspace(-1, 1, HIDDEN))
    program = Program()
    program.save(program.op("torch.add", program.get(FIRST), tensor), "x")
    wanted = capture(engine.model, torch.tensor(IDS), FIRST) + torch.linspace(-1, 1, HIDDEN)
    for _ in range(2):
        assert torch.equal(run(engine, program, IDS, tensors=tensors)["x"], wanted)
    with pytest.raises(GraphError, match="was not sent with the request") as caught:
        run(engine, program, IDS)
    assert caught.value.node == 1


# --- randomness --------------------------------------------------------------------------------------------


def test_random_ops_follow_the_seed(engine: Engine) -> None:
    program = Program()
    program.save(program.op("torch.randn", [3]), "normal")
    program.save(program.op("torch.bernoulli", program.op("torch.full", [64], 0.5)), "coins")
    program.save(program.op("torch.randn_like", program.get(FIRST)), "like")
    first, again, other = (run(engine, program, IDS, seed=seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first["normal"], torch.randn(3, generator=generator))
    assert torch.equal(first["coins"], torch.bernoulli(torch.full([64], 0.5), generator=generator))
    assert torch.equal(first["like"], torch.randn(1, 6, HIDDEN, generator=generator))


# --- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], EmptyPromptError, "invoke 0 is empty"),
        ([[]], EmptyPromptError, "invoke 0 is empty"),
        ([[1], []], EmptyPromptError, "invoke 0 is empty"),
        ([[1, VOCAB]], InputError, f"token id {VOCAB} is not in the vocabulary of m, which has {VOCAB}"),
        ([[1, -1]], InputError, "token id -1 is not in the vocabulary"),
        ([[1] * 129], InputError, "invoke 0 has 129 tokens; m takes at most 128"),
    ],
)
def test_ids_are_checked(engine: Engine, ids: list[list[int]], error: type[Exception], message: str) -> None:
    with counted(engine) as calls, pytest.raises(error, match=message):
        run(engine, saving(), ids)
    assert not calls


def test_the_longest_prompt_is_taken(engine: Engine) -> None:
    assert run(engine, saving(), [[VOCAB - 1] * 128])["h"].shape == (1, 128, HIDDEN)


@pytest.mark.parametrize("mask", [[], [[1, 1]], [[1, 1, 1], [1, 1, 1]], [[1, 2, 1]], [[0, 0, 0]]])
def test_a_mask_that_does_not_fit_its_ids_is_refused(engine: Engine, mask: list[list[int]]) -> None:
    with pytest.raises(InputError, match="invoke 0: a mask is rows of 0 and 1"):
        engine.run(saving().graph(), [TokenizedInvoke(ids=[[1, 2, 3]], mask=mask)], {})


def test_as_many_inputs_as_invokes_are_asked_for(engine: Engine) -> None:
    with pytest.raises(InputError, match="the graph has 2 invokes and 1 inputs were given"):
        engine.run(saving().graph(2), [TokenizedInvoke(ids=IDS)], {})


# --- turns -------------------------------------------------------------------------------------------------


def test_threads_take_turns(engine: Engine) -> None:
    prompts = [[[i + 1, 2 * i + 1, 3]] for i in range(8)]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        program = saving(HEAD)
        program.op("tensor.mul_", program.get(FIRST), float(index))
        found[index] = run(engine, program, prompts[index])["h"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, ids in enumerate(prompts):
        scaled = forward(engine.model, torch.tensor(ids), after={FIRST: lambda out, i=index: out * i}).logits
        torch.testing.assert_close(found[index], scaled)

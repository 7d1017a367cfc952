"""Branches and loops on the server against plain hooks with Python's own ``if``, ``for`` and ``while``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pellucid
from generating import generate
from pellucid_shared.errors import (
    GraphError,
    LimitError,
    OrderError,
    RecordingError,
    ShapeError,
    ValueNotReadyError,
)
from pellucid_shared.show import show
from references import capture, first, forward, with_first
from service import running_service
from tiny_models import NAMES

pytestmark = pytest.mark.xdist_group("control flow")

A, B, C = [[5, 9, 31, 7, 22, 40]], [[11, 3, 8]], [[4, 15, 16, 7, 2], [9, 8, 7, 6, 5]]
PROMPTS = (A, B, C)
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"llama": tiny_folders["llama"]}, tmp_path_factory.mktemp("service")) as url:
        yield url


@pytest.fixture(scope="module")
def models(tiny_models: Any) -> dict[str, pellucid.LanguageModel]:
    return {name: pellucid.LanguageModel(name, model=model) for name, model in tiny_models.items()}


@pytest.fixture(params=[*NAMES, "remote llama"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(tiny_models: Any, name: str) -> Any:
    return tiny_models[name.removeprefix("remote ")]


@pytest.fixture
def model(request: pytest.FixtureRequest, models: Any, name: str) -> Any:
    if name.startswith("remote "):
        return pellucid.LanguageModel("llama", remote=request.getfixturevalue("service"))
    return models[name]


@pytest.fixture
def llama(models: Any) -> Any:
    return models["llama"]


@pytest.fixture
def plain_llama(tiny_models: Any) -> Any:
    return tiny_models["llama"]


def path(name: str, index: int) -> str:
    return f"{LAYERS.get(name, 'model.layers')}.{index}"


def layer(model: Any, name: str, index: int) -> Any:
    for part in path(name, index).split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def close(found: Any, wanted: Any) -> None:
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def all_close(found: Any, wanted: Any) -> None:
    """The same of nested lists."""
    if isinstance(wanted, list):
        assert isinstance(found, list)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            all_close(one, other)
    elif isinstance(wanted, torch.Tensor):
        close(found, wanted)
    else:
        assert type(found) is type(wanted)
        assert found == wanted


def hook(edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], Any]:
    """A plain hook that edits the first tensor of an output in place, or replaces it by what it returns."""

    def after(output: Any) -> Any:
        h = first(output)
        changed = edit(h)
        return with_first(output, h if changed is None else changed)

    return after


def middle(plain: Any, name: str, prompts: Any = PROMPTS) -> float:
    """A number between the prompts' own, so that a flag on it holds for some of them."""
    values = sorted(float(capture(plain, torch.tensor(p), path(name, 0))[0, 0, 0]) for p in prompts)
    return (values[0] + values[-1]) / 2


# --- branches ----------------------------------------------------------------------------------------------


def branching(model: Any, name: str, tracer: Any, threshold: float) -> tuple[Any, Any, Any]:
    h = layer(model, name, 0).output
    with tracer.cond(h[0, 0, 0] > threshold):
        layer(model, name, 1).output[:, -1] *= 3
        high = layer(model, name, 1).output.norm().save()
    with tracer.cond.else_():
        layer(model, name, 1).output = layer(model, name, 1).output - h
        low = h.mean().save()
    return high, low, model.lm_head.output.save()


def branched(plain: Any, name: str, ids: Any, threshold: float) -> tuple[Any, Any, Any]:
    seen: dict[str, Any] = {}

    def zero(h: torch.Tensor) -> None:
        seen["h"] = h.clone()

    def one(h: torch.Tensor) -> torch.Tensor | None:
        if float(seen["h"][0, 0, 0]) > threshold:
            h[:, -1] *= 3
            seen["high"] = h.norm()
            return None
        seen["low"] = seen["h"].mean()
        return h - seen["h"]

    hooks = {path(name, 0): hook(zero), path(name, 1): hook(one)}
    logits = forward(plain, torch.tensor(ids), after=hooks).logits
    return seen.get("high"), seen.get("low"), logits


def agree_branched(found: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        if other is None:
            with pytest.raises(ValueNotReadyError, match="it was saved in a branch that did not run"):
                _ = one.value
        else:
            close(one, other)


def test_one_branch_runs_and_edits_the_model(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    threshold, taken = middle(plain, name), set()
    for ids in PROMPTS:
        with model.trace(ids) as tracer:
            found = branching(model, name, tracer, threshold)
        wanted = branched(plain, name, ids, threshold)
        agree_branched(found, wanted)
        taken.add(wanted[0] is None)
    assert taken == {True, False}


def test_each_invoke_has_its_own_flag(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    threshold, found = middle(plain, name), []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                found.append(branching(model, name, tracer, threshold))
    for ids, own in zip(PROMPTS, found, strict=True):
        agree_branched(own, branched(plain, name, ids, threshold))


@pytest.mark.parametrize("value", [-1.0, 0.5, 2.0, 7.0])
def test_a_chain_of_branches_takes_the_first_that_holds(llama: Any, value: float) -> None:
    with llama.trace(A) as tracer:
        x = torch.full((1,), value)
        taken = tracer.list().save()
        result = torch.zeros(2).save()
        with tracer.cond(x < 0):
            taken.append(0)
        with tracer.cond.elif_(x < 1):
            taken.append(1)
            result[0] = x[0]
        with tracer.cond.elif_(x * 0 + (x < 5)):  # a number, not a bool
            taken.append(2)
            result += x
        with tracer.cond.else_():
            taken.append(3)
    which = 0 if value < 0 else 1 if value < 1 else 2 if value < 5 else 3
    assert taken.value == [which]
    close(result, torch.tensor({1: [value, 0.0], 2: [value, value]}.get(which, [0.0, 0.0])))


def test_a_flag_of_python_decides_while_the_graph_is_written_out(llama: Any) -> None:
    with llama.trace(A) as tracer:
        with tracer.cond(True):
            one = llama.layers[0].output.save()
        with tracer.cond.else_():
            llama.layers[0].output[:] = 0
        with tracer.cond(False):
            two = llama.layers[0].output.save()
    assert one.shape == (1, 6, 32)
    assert bool(one.any())
    with pytest.raises(ValueNotReadyError, match="a branch that did not run"):
        _ = two.value


def test_branches_inside_branches(llama: Any) -> None:
    for a in (0, 1):
        for b in (0, 1):
            with llama.trace(A) as tracer:
                out = tracer.list().save()
                x, y = torch.full((), a), torch.full((), b)
                with tracer.cond(x):
                    with tracer.cond(y):
                        out.append("both")
                    with tracer.cond.else_():
                        out.append("x")
                    out.append("after")
                with tracer.cond.else_():
                    with tracer.cond(y):
                        out.append("y")
            expected = [["both", "after"] if b else ["x", "after"], ["y"] if b else []][1 - a]
            assert out.value == expected


def test_reading_early_under_a_flag_known_late(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        early = llama.layers[0].output
        late = llama.layers[1].output
        with tracer.cond(late.sum() > late.sum() - 1):
            same = (llama.layers[0].output + early).save()
    close(same, 2 * capture(plain_llama, torch.tensor(A), "model.layers.0"))


def test_an_edit_in_a_branch_is_seen_behind_it_and_not_before(llama: Any) -> None:
    for holds in (True, False):
        with llama.trace(A) as tracer:
            late = llama.layers[1].output.mean()
            x = torch.ones(3)
            before = x * 2 + llama.lm_head.output.mean() * 0  # reads x, and runs after the edit
            with tracer.cond(late * 0 == (0 if holds else 1)):
                x += 1
                x *= late * 0 + 2
            after = (x + 0).save()
            before = before.save()
        close(before, torch.full((3,), 2.0))
        close(after, torch.full((3,), 4.0 if holds else 1.0))


@pytest.mark.parametrize("holds", [True, False])
def test_what_is_carried_is_a_name_of_the_tensor_itself(llama: Any, holds: bool) -> None:
    with llama.trace(A) as tracer:
        loop = tracer.loop(1)
        x = torch.ones(3)
        named = loop.carry(torch.zeros(3))
        with loop, tracer.cond(llama.lm_head.output.mean() * 0 == (0 if holds else 1)):
            named.set(x)
        x += 1  # nothing keeps it from running early, but that the carried name may show it
        shown = (named.value * 1).save()
    close(shown, torch.full((3,), 2.0 if holds else 0.0))


def test_an_edit_waits_for_a_condition_that_names_what_it_edits(llama: Any) -> None:
    with pytest.raises(OrderError, match=r"edits model.layers.0.output in place.*needs lm_head.output"):
        with llama.trace(A) as tracer:
            loop = tracer.loop(1)
            h = llama.layers[0].output
            named = loop.carry(torch.zeros(1, 6, 32))
            with loop, tracer.cond(llama.lm_head.output.mean() > 0):
                named.set(h)
            h += 1
            named.save()


def test_a_member_first_reached_for_in_a_branch_is_there_behind_it(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        attention = llama.layers[0].self_attn.output  # a tuple; its members are read when they are used
        other = llama.layers[1].self_attn.output
        with tracer.cond(True):
            inside = attention[0].sum().save()
            llama.layers[1].self_attn.output = (attention[0] * 2, *other[1:])
        behind, old = attention[0].save(), other[0].save()
    wanted = capture(plain_llama, torch.tensor(A), "model.layers.0.self_attn")
    close(inside, wanted.sum())
    close(behind, wanted)
    close(old, capture(plain_llama, torch.tensor(A), "model.layers.1.self_attn"))


def test_select_takes_one_of_two_and_broadcasts(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        h = llama.layers[0].output
        row = tracer.select(h.sum() > h.sum() + 1, h, h[:, -1:]).save()
        number = tracer.select((h.sum() == h.sum()).reshape(1, 1), 1.5, h[0, 0]).save()
        fixed = tracer.select(False, h[0, 0], h[0, 1]).save()
        llama.layers[1].output = tracer.select(h[0, 0, 0] * 0, h, llama.layers[1].output * 2)
        logits = llama.lm_head.output.save()
    wanted = capture(plain_llama, torch.tensor(A), "model.layers.0")
    close(row, wanted[:, -1:].expand_as(wanted))
    close(number, torch.full((32,), 1.5))
    close(fixed, wanted[0, 1])
    doubled = forward(plain_llama, torch.tensor(A), after={"model.layers.1": hook(lambda h: h * 2)}).logits
    close(logits, doubled)


# --- loops -------------------------------------------------------------------------------------------------


def test_a_loop_knows_its_turn(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    saved = []
    with model.trace() as tracer:
        for ids in (A, C):
            with tracer.invoke(ids):
                h = layer(model, name, 0).output
                loop = tracer.loop(4)
                acc = loop.carry(torch.zeros(32))
                with loop as i:
                    column = h[:, i].sum(0)
                    rest = h[0, i : i + 2, 0].clone().save()
                    acc.set(acc + column * (2 * i + 1) - i // 2)
                    h[:, i, -i - 1] = i % 2
                    number = pellucid.save(i * 10)
                saved.append((acc.value.save(), rest, number, model.lm_head.output.save()))
    for ids, (total, rest, number, logits) in zip((A, C), saved, strict=True):
        seen: dict[str, Any] = {"rest": []}

        def edit(h: torch.Tensor, seen: Any = seen) -> None:
            seen["acc"] = torch.zeros(32)
            for i in range(4):
                column = h[:, i].sum(0)
                seen["rest"].append(h[0, i : i + 2, 0].clone())
                seen["acc"] = seen["acc"] + column * (2 * i + 1) - i // 2
                h[:, i, -i - 1] = i % 2

        wanted = forward(plain, torch.tensor(ids), after={path(name, 0): hook(edit)}).logits
        close(total, seen["acc"])
        all_close(rest.value, seen["rest"])
        assert number.value == [0, 10, 20, 30]
        close(logits, wanted)


def test_what_is_carried_stands_for_its_value(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        h = llama.layers[0].output[0, :]
        loop = tracer.loop(h)
        acc = loop.carry(torch.zeros(32))
        with loop as row:
            made = tracer.list()
            made.append(row.sum())
            made.append(-acc + 2 * acc)
            made.save("made")
            acc += torch.exp(row) + torch.stack([acc, acc]).mean(0)
            with tracer.cond(acc[0] > 3):
                acc.value = torch.nn.functional.relu(acc) / 2
        pellucid.save(acc, "total")
        total = (acc @ acc).save()
    wanted = capture(plain_llama, torch.tensor(A), "model.layers.0")[0, :]
    expected, lists = torch.zeros(32), []
    for row in wanted:
        lists.append([row.sum(), expected.clone()])
        expected = expected + torch.exp(row) + expected
        if expected[0] > 3:
            expected = torch.relu(expected) / 2
    close(total, expected @ expected)
    all_close(made.value, lists)


def test_a_loop_over_values_of_any_kind(llama: Any, plain_llama: Any) -> None:
    vectors = torch.arange(6.0).reshape(3, 2)
    with llama.trace(A) as tracer:
        h = llama.layers[0].output
        with tracer.loop(range(5, 0, -2)) as item:
            ranged = h[0, item].save()
        with tracer.loop([0.5, -2.0]) as item:
            floats = (h[0, 0] * item).save()
        with tracer.loop(vectors) as item:
            rows = (item + h[0, 0, :2]).save()
        with tracer.loop(h[0, :2]) as item:
            own = item.sum().save()
        with tracer.loop([llama.layers[1].output, h, h[:, :2]]) as item:
            mixed = item.mean(dim=1).save()
        with tracer.loop(0) as _:
            none = h.mean().save()
    wanted, later = (capture(plain_llama, torch.tensor(A), f"model.layers.{i}") for i in (0, 1))
    all_close(ranged.value, [wanted[0, 5], wanted[0, 3], wanted[0, 1]])
    all_close(floats.value, [wanted[0, 0] * 0.5, wanted[0, 0] * -2.0])
    all_close(rows.value, [row + wanted[0, 0, :2] for row in vectors])
    all_close(own.value, [wanted[0, 0].sum(), wanted[0, 1].sum()])
    all_close(mixed.value, [later.mean(1), wanted.mean(1), wanted[:, :2].mean(1)])
    assert none.value == []


def test_loops_inside_loops_save_lists_of_lists(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        h = llama.layers[0].output
        outer = tracer.loop(3)
        total = outer.carry(0.0)
        with outer as i:
            inner = tracer.loop([1, 2])
            product = inner.carry(h[0, i, 0])
            with inner as j:
                product.set(product * j + i)
                seen = (h[0, i, j] + 0).save()
                with tracer.cond(i == j):
                    equal = pellucid.save([i, j])
            total.set(total + product)
        total = total.save()
    wanted = capture(plain_llama, torch.tensor(A), "model.layers.0")
    expected, lists = torch.tensor(0.0), []
    for i in range(3):
        product = wanted[0, i, 0]
        lists.append([])
        for j in (1, 2):
            product = product * j + i
            lists[-1].append(wanted[0, i, j])
        expected = expected + product
    close(total, expected)
    all_close(seen.value, lists)
    assert equal.value == [[[1, 1]], [[2, 2]]]


def test_a_carried_value_is_set_in_a_branch(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    saved = []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                h = layer(model, name, 1).output
                loop = tracer.loop(3)
                best, where = loop.carry(h[0, 0].clone()), loop.carry(0)
                with loop as i:
                    with tracer.cond(h[0, i].norm() > best.value.norm()):
                        best.set(h[0, i].clone())
                        where.set(i)
                    with tracer.cond.else_():
                        kept = i.save()
                layer(model, name, 1).output[:, -1] = best
                saved.append((best.save(), where.save(), kept, model.lm_head.output.save()))
    for ids, found in zip(PROMPTS, saved, strict=True):
        seen: dict[str, Any] = {}

        def edit(h: torch.Tensor, seen: Any = seen) -> None:
            best, seen["where"], seen["kept"] = h[0, 0].clone(), 0, []
            for i in range(3):
                if h[0, i].norm() > best.norm():
                    best, seen["where"] = h[0, i].clone(), i
                else:
                    seen["kept"].append(i)
            seen["best"] = best
            h[:, -1] = best

        wanted = forward(plain, torch.tensor(ids), after={path(name, 1): hook(edit)}).logits
        close(found[0], seen["best"])
        assert int(found[1]) == seen["where"]
        assert found[2].value == seen["kept"]
        close(found[3], wanted)


# --- loops that end themselves -----------------------------------------------------------------------------


def test_a_loop_goes_on_while_its_condition_holds(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    saved = []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                h = layer(model, name, 0).output
                loop = tracer.while_(lambda: x.value.norm() < 40, max_turns=12)  # noqa: B023
                x = loop.carry(h[:, 0] * 1)
                with loop as i:
                    x.set(x * 1.7)
                    h[:, -1] *= 1.1
                    turn = i.save()
                saved.append((x.save(), turn, model.lm_head.output.save()))
    counts = set()
    for ids, found in zip(PROMPTS, saved, strict=True):
        seen: dict[str, Any] = {}

        def edit(h: torch.Tensor, seen: Any = seen) -> None:
            seen["x"], seen["turns"] = h[:, 0] * 1, 0
            while seen["x"].norm() < 40:
                seen["x"] = seen["x"] * 1.7
                h[:, -1] *= 1.1
                seen["turns"] += 1

        wanted = forward(plain, torch.tensor(ids), after={path(name, 0): hook(edit)}).logits
        close(found[0], seen["x"])
        assert found[1].value == list(range(seen["turns"]))
        close(found[2], wanted)
        counts.add(seen["turns"])
    assert min(counts) > 0


@pytest.mark.parametrize("start", [100, 7, 8])
def test_a_loop_may_not_run_at_all_or_just_to_its_bound(llama: Any, start: int) -> None:
    with llama.trace(A) as tracer:
        loop = tracer.while_(lambda: x.value < 10, max_turns=3)
        x = loop.carry(start)
        with loop as i:
            x.set(x + 1)
            turns = i.save()
        x = x.save()
    assert int(x) == max(start, 10)
    assert turns.value == list(range(max(0, 10 - start)))


def test_the_bound_is_an_error_that_names_it(llama: Any) -> None:
    with pytest.raises(LimitError, match=r"test_control_flow.py:\d+: the loop has not ended in 3 turns"):
        with llama.trace(A) as tracer:
            loop = tracer.while_(lambda: x.value < 10, max_turns=3)
            x = loop.carry(6)
            with loop:
                x.set(x + 1)
            x.save()
    with pytest.raises(LimitError, match="has not ended in 4 turns"), llama.trace(A) as tracer:
        loop = tracer.while_(max_turns=4)
        with loop as i:
            loop.until(llama.layers[0].output.sum() * 0 + i > 7)
            i.save()


def test_until_ends_a_loop_in_the_middle_of_a_turn(llama: Any, plain_llama: Any) -> None:
    with llama.trace(A) as tracer:
        h = llama.layers[0].output
        seen, passed = tracer.list().save(), tracer.list().save()
        loop = tracer.loop(6)
        total = loop.carry(0.0)
        with loop as i:
            seen.append(i)
            total.set(total + h[0, i].norm())
            loop.until(total > 12)
            passed.append(h[0, i, 0])
            with tracer.cond(i > 1):
                h[0, i] = 0
        with tracer.loop(5) as k:
            pass
        fixed = tracer.loop(5)
        with fixed as k:
            k.save("turn")
            fixed.until(k == 2)
        total, logits = total.save(), llama.lm_head.output.save()
    expected: dict[str, Any] = {"seen": [], "passed": []}

    def edit(h: torch.Tensor) -> None:
        expected["total"] = torch.tensor(0.0)
        for i in range(6):
            expected["seen"].append(i)
            expected["total"] = expected["total"] + h[0, i].norm()
            if expected["total"] > 12:
                break
            expected["passed"].append(h[0, i, 0].clone())
            if i > 1:
                h[0, i] = 0

    wanted = forward(plain_llama, torch.tensor(A), after={"model.layers.0": hook(edit)}).logits
    assert seen.value == expected["seen"]
    close(total, expected["total"])
    close(logits, wanted)
    assert len(passed) == len(expected["passed"])


def test_a_branch_that_goes_on_behind_the_end_of_its_loop_does_not_run(llama: Any) -> None:
    with llama.trace(A) as tracer:
        seen = tracer.list().save()
        loop = tracer.loop(3)
        with loop as i:
            x = torch.full((), 0.0) + i
            with tracer.cond(x > 5):
                seen.append("never")
            loop.until(x == 1)
            with tracer.cond.else_():
                seen.append(i)
    assert seen.value == [0]


# --- generation and sessions -------------------------------------------------------------------------------

N = 5


def test_branches_and_loops_in_steps_of_a_generation(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    prompts, saved = (A, B), []
    with model.generate(max_new_tokens=N, eos_token_id=[]) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                with tracer.iter[:]:
                    h = layer(model, name, 0).output
                    with tracer.cond(h[0, -1, 0] > 0):
                        layer(model, name, 1).output[:, -1] *= -2
                        high = h[:, -1, 0].save()
                    with tracer.cond.else_():
                        with tracer.loop(2) as i:
                            h[:, -1, i] += i + 1
                            low = h[0, -1, i].clone().save()
                saved.append((high, low, tracer.result.save()))
    for ids, (high, low, result) in zip(prompts, saved, strict=True):
        seen: dict[str, Any] = {"high": [], "low": [], "flag": False}

        def zero(step: int, h: torch.Tensor, seen: Any = seen) -> torch.Tensor:
            h = h.clone()
            seen["flag"] = bool(h[0, -1, 0] > 0)
            if seen["flag"]:
                seen["high"].append(h[:, -1, 0].clone())
            else:
                seen["low"].append([])
                for i in range(2):
                    h[:, -1, i] += i + 1
                    seen["low"][-1].append(h[0, -1, i].clone())
            return h

        def one(step: int, h: torch.Tensor, seen: Any = seen) -> torch.Tensor:
            h = h.clone()
            if seen["flag"]:
                h[:, -1] *= -2
            return h

        hooks = {path(name, 0): zero, path(name, 1): one}
        wanted = generate(plain, torch.tensor(ids), at=hooks, max_new_tokens=N, eos_token_id=None)
        assert torch.equal(result, wanted)
        all_close(high.value, seen["high"])
        all_close(low.value, seen["low"])


def test_a_generation_that_ends_early_leaves_out_the_branches_of_later_steps(
    llama: Any, plain_llama: Any
) -> None:
    free = generate(plain_llama, torch.tensor(A), max_new_tokens=6, eos_token_id=None)
    with llama.generate(A, max_new_tokens=6, eos_token_id=int(free[0, 6 + 2])) as tracer:
        grown = tracer.list().save()
        with tracer.iter[:]:
            h = llama.layers[0].output
            loop = tracer.loop(2)
            acc = loop.carry(h[0, -1, 0])
            with loop as i:
                with tracer.cond(h.sum() == h.sum()):
                    acc.set(acc + i)
                    ran = i.save()
            with tracer.cond(h.sum() != h.sum()):
                never = h.save()
                grown.append("never")
            with tracer.cond.else_():
                grown.append(acc.value)
            carried = acc.save()
        result = tracer.result.save()
    assert result.shape == (1, 9)
    assert ran.value == [[0, 1]] * 3
    assert never.value == []
    assert len(carried) == len(grown) == 3
    all_close(grown.value, carried.value)


def test_each_turn_of_a_session_has_its_own_traces(model: Any, plain: Any, name: str) -> None:
    name = name.removeprefix("remote ")
    with model.session() as session:
        loop = session.loop(3)
        vector = loop.carry(torch.zeros(32))
        with loop as i:
            with model.trace(A):
                layer(model, name, 0).output[:, -1] += vector.value
                h = layer(model, name, 1).output[0, i]
                norms = h.norm().save()
            with model.trace() as tracer:
                with tracer.invoke(B):
                    other = layer(model, name, 1).output[0, -1]
                with tracer.invoke(C):
                    both = (other + h).mean().save()
            vector.set(vector * 0.5 + h)
        last = (vector + 1).save()
        with session.iter([0.5, 2.0]) as factor, session.trace(B):
            layer(model, name, 0).output *= factor
            logits = model.lm_head.output[:, -1].save()
    expected: dict[str, Any] = {"norms": [], "both": [], "vector": torch.zeros(32)}
    other = capture(plain, torch.tensor(B), path(name, 1))[0, -1]
    for i in range(3):
        seen: list[torch.Tensor] = []

        def add(h: torch.Tensor) -> None:
            h[:, -1] += expected["vector"]

        def keep(h: torch.Tensor, seen: Any = seen) -> None:
            seen.append(h.clone())

        forward(plain, torch.tensor(A), after={path(name, 0): hook(add), path(name, 1): hook(keep)})
        h = seen[0][0, i]
        expected["norms"].append(h.norm())
        expected["both"].append((other + h).mean())
        expected["vector"] = expected["vector"] * 0.5 + h
    all_close(norms.value, expected["norms"])
    all_close(both.value, expected["both"])
    close(last, expected["vector"] + 1)
    wanted = [
        forward(plain, torch.tensor(B), after={path(name, 0): hook(lambda h, f=f: h * f)}).logits[:, -1]
        for f in (0.5, 2.0)
    ]
    all_close(logits.value, wanted)


# --- mistakes ----------------------------------------------------------------------------------------------


def test_a_flag_known_after_the_write_it_guards_is_an_error(llama: Any) -> None:
    line = r"test_control_flow.py:\d+: "
    late = "under a condition that needs model.layers.1.output, which the model makes only later"
    with pytest.raises(OrderError, match=line + "model.layers.0.output is written " + late):
        with llama.trace(A) as tracer:
            with tracer.cond(llama.layers[1].output.sum() > 0):
                llama.layers[0].output = 0.0
            llama.lm_head.output.save()
    with pytest.raises(OrderError, match=r"it needs model.layers.1.output\. Its condition can use only"):
        with llama.trace(A) as tracer:
            with tracer.cond(llama.layers[1].output.sum() > 0):
                llama.layers[0].output[:] = 0
            llama.lm_head.output.save()
    with pytest.raises(OrderError, match="Edit a copy instead"), llama.trace(A) as tracer:
        with tracer.cond(llama.layers[0].output.sum() > 0):
            llama.layers[0].output[:] = llama.layers[1].output
        llama.lm_head.output.save()


def test_what_is_made_inside_is_not_used_outside(llama: Any) -> None:
    with pytest.raises(GraphError, match=r"test_control_flow.py:\d+: .*which one branch alone makes"):
        with llama.trace(A) as tracer:
            with tracer.cond(llama.layers[0].output.sum() > 0):
                inside = llama.layers[0].output * 2
            (inside + 1).save()
    with pytest.raises(GraphError, match="which one branch alone makes"), llama.trace(A) as tracer:
        with tracer.cond(llama.layers[0].output.sum() > 0):
            inside = llama.layers[0].output * 2
        with tracer.cond.else_():
            inside.save()
    with pytest.raises(GraphError, match=r"which a loop makes in each turn; carry it"):
        with llama.trace(A) as tracer:
            with tracer.loop(2):
                inside = llama.layers[0].output * 2
            inside.save()


def test_mistakes_in_writing_are_named_at_their_line(llama: Any) -> None:
    with llama.generate(A, max_new_tokens=2) as tracer:
        h = llama.layers[0].output
        with pytest.raises(ShapeError, match=r"py:\d+: a condition is one element, found shape \[1, 6, 32\]"):
            tracer.cond(h > 0).__enter__()
        with pytest.raises(RecordingError, match="elif_ and else_ continue a branch"):
            tracer.cond.else_().__enter__()
        with tracer.cond(True):
            with pytest.raises(RecordingError, match="open the steps first"), tracer.iter[:]:
                pass
            with pytest.raises(RecordingError, match="elif_ and else_ continue a branch"):
                tracer.cond.else_().__enter__()
        with tracer.cond.else_():
            pass
        with pytest.raises(RecordingError, match="elif_ and else_ continue a branch"):
            tracer.cond.else_().__enter__()
        loop = tracer.loop(3)
        acc = loop.carry(h[0, 0])
        with pytest.raises(RecordingError, match="used in its block, and behind it"):
            acc.set(h[0, 1])
        with loop as i:
            with pytest.raises(
                ShapeError, match=r"keeps its shape and dtype: \[32\] float32 was given \[6, 32\]"
            ):
                acc.set(h[0, :])
            with pytest.raises(RecordingError, match="made before its block"):
                loop.carry(h)
            with pytest.raises(RecordingError, match=r"Python cannot branch on it; write `with tracer.cond"):
                _ = 1 if i == 2 else 0
            with pytest.raises(RecordingError, match="or write a Python loop"):
                _ = [1, 2, 3][i]
            with pytest.raises(RecordingError, match="or write a Python loop"):
                _ = llama.layers[i]
            with tracer.cond(i == 1), pytest.raises(RecordingError, match=r"until\(\) stands in the body"):
                loop.until(True)
        with pytest.raises(RecordingError, match="nothing ends this loop"):
            with tracer.while_(max_turns=3):
                pass
        with pytest.raises(RecordingError, match="so it is a function"):
            tracer.while_(h.sum() > 0, max_turns=3)  # type: ignore[arg-type]
        for over in (2.5, "text", None):
            with pytest.raises(RecordingError, match="a loop takes a number of turns"):
                tracer.loop(over)
        with pytest.raises(RecordingError, match="write a Python loop over the traces"):
            tracer.loop(["a", "b"])
        for ask in (lambda: bool(h.sum() > 0), lambda: 1 if h.sum() else 0):
            with pytest.raises(RecordingError, match=r"`with tracer.cond\(flag\):`.*tracer.while_"):
                ask()
        with pytest.raises(RecordingError, match=r"several elements .* use .any"):
            bool(h > 0)
        with pytest.raises(RecordingError, match=r"tracer.while_"):
            range(h.sum())  # type: ignore[call-overload]
        assert len(list(h[0, :])) == 6
    with llama.trace() as tracer:
        with tracer.invoke(A):
            llama.layers[0].output.save()
        with tracer.loop(2), pytest.raises(RecordingError, match="an invoke cannot be opened inside"):
            with tracer.invoke(B):
                pass


def test_a_turn_that_does_not_fit_is_an_error_at_its_line(llama: Any) -> None:
    with pytest.raises(GraphError, match=r"test_control_flow.py:\d+: getitem: index 6 is out of range"):
        with llama.trace(A) as tracer, tracer.loop(8) as i:
            llama.layers[0].output[0, i].save()


def test_a_graph_written_out_too_long_is_refused(llama: Any) -> None:
    with pytest.raises(
        LimitError, match=r"has 6002000 nodes once its bodies are written out .* at most 1000000"
    ):
        with llama.trace(A) as tracer, tracer.loop(2000), tracer.loop(1000):
            llama.layers[0].output.save()


# --- as a file ---------------------------------------------------------------------------------------------


def test_the_graph_prints_and_reads_back(llama: Any) -> None:
    with llama.session() as session:
        with session.loop(2), session.trace(A) as tracer:
            h = llama.layers[0].output
            loop = tracer.while_(lambda: x.value < 3, max_turns=4)
            x = loop.carry(0.0)
            with loop as i:
                x.set(h[0, i:, 0].sum() * 0 + 5)
                loop.until(i == 1)
            with tracer.cond(h.sum() > 0):
                h[:] = 0
            with tracer.cond.elif_(h.sum() > 1):
                h.save("h")
            with tracer.cond.else_():
                x.save("x")
    graph = session.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    assert pellucid.Graph.from_json(graph.to_json()).to_json() == graph.to_json()
    assert show(graph) == (
        "for each of 2 turns:\n"
        "    v0 = the turn\n"
        '    trace "llama":\n'
        "        invoke 0: [[5, 9, 31, 7, 22, 40]]\n"
        "        v1 = model.layers.0.output\n"
        "        for each of at most 4 turns:\n"
        "            v2 = carry(0.0) before the first turn\n"
        "            v3 = v2.value\n"
        "            v4 = v3 < 3\n"
        "            v5 = flag(v4)\n"
        "            end the loop unless v5\n"
        "            v7 = the turn\n"
        "            v8 = v1[0, v7:, 0]\n"
        "            v9 = torch.sum(v8)\n"
        "            v10 = v9 * 0\n"
        "            v11 = v10 + 5\n"
        "            v2.value = v11\n"
        "            v13 = v7 == 1\n"
        "            v14 = flag(v13)\n"
        "            end the loop if v14\n"
        "        v16 = torch.sum(v1)\n"
        "        v17 = v16 > 0\n"
        "        v18 = flag(v17)\n"
        "        if v18:\n"
        "            v1[:] = 0; v19 = v1\n"
        "        v20 = torch.sum(v1)\n"
        "        v21 = v20 > 1\n"
        "        v22 = flag(v21)\n"
        "        elif v22:\n"
        "            save(v1, 'h')\n"
        "        else:\n"
        "            v24 = v2.value\n"
        "            save(v24, 'x')\n"
    )

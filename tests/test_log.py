"""``tracer.log``: one line each time the run comes by, with what tensors are like and never all of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import pellucid
from generating import captured, generate
from pellucid_shared.errors import GraphError, SiteError
from pellucid_shared.graph import LOG
from pellucid_shared.lint import lint
from pellucid_shared.logs import MAX_ELEMENTS, line
from pellucid_shared.show import show
from pellucid_shared.wire import TokenizedInvoke
from pellucid_worker.logs import Teller
from references import capture

IDS = [[5, 9, 31, 7, 22, 40]]
SHORT = [[7, 8, 9]]
NO_EOS: dict[str, Any] = {"eos_token_id": []}


@pytest.fixture(scope="module")
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


def told(model: Any, graph: pellucid.Graph, *prompts: Any) -> list[dict[str, Any]]:
    """The log events of a graph that is run again."""
    events: list[dict[str, Any]] = []
    inputs = [TokenizedInvoke(ids=ids) for ids in prompts]

    def notify(kind: str, data: dict[str, Any]) -> None:
        if kind == "log":
            events.append(data)

    model._target(None).engine.run(graph, inputs, {}, notify=notify)
    return events


def test_a_line_says_what_a_tensor_is_like(model: Any, plain: Any, capsys: Any) -> None:
    with model.trace(IDS) as tracer:
        h = model.layers[1].output
        tracer.log("hidden", h, 3, h.norm(), sep=" | ")
    wanted = capture(plain, torch.tensor(IDS), "model.layers.1")
    said = capsys.readouterr().out
    assert said.startswith(f"hidden | <[1, 6, 32] float32 mean {wanted.mean():.5g} std {wanted.std():.5g} ")
    assert said.endswith(f", ...> | 3 | {wanted.norm():.5g}\n")
    [event] = told(model, tracer.graph, IDS)
    assert (event["trace"], event["invoke"], event["step"]) == (0, 0, 0)
    assert event["text"] + "\n" == said
    label, tensor, number, norm = event["parts"]
    assert (label, number) == ("hidden", 3)
    assert norm["tensor"]["values"] == [wanted.norm().item()]
    found = tensor["tensor"]
    assert (found["shape"], found["dtype"]) == ([1, 6, 32], "float32")
    assert found["values"] == wanted.flatten()[:MAX_ELEMENTS].tolist()
    for name in ("mean", "std", "min", "max"):
        assert found[name] == pytest.approx(getattr(wanted, name)().item())


def test_text_numbers_and_structures(model: Any, capsys: Any) -> None:
    with model.trace(IDS) as tracer:
        ids = model.input
        tracer.print("ids", {"some": ids[0, :2], "none": None}, [1, True], 2.5, torch.tensor([1.5, 2.5]), int)
    some = "<[2] int64 mean 7 std 2.8284 min 5 max 9: 5, 9>"
    mine = "<[2] float32 mean 2 std 0.70711 min 1.5 max 2.5: 1.5, 2.5>"
    assert capsys.readouterr().out == (
        f"ids {{'some': {some}, 'none': None}} [1, True] 2.5 {mine} <class 'int'>\n"
    )


def test_lines_come_in_the_order_they_are_written(model: Any, capsys: Any) -> None:
    with model.trace() as tracer:
        for name, ids in (("a", IDS), ("b", SHORT)):
            with tracer.invoke(ids):
                tracer.log(name, 1)
                late = model.lm_head.output
                tracer.log(name, 2, late.mean())
                tracer.log(name, 3, model.layers[0].output.mean())
                tracer.log(name, 4)
    lines = capsys.readouterr().out.splitlines()
    for name in "ab":
        assert [text.split()[1] for text in lines if text.startswith(name)] == ["1", "2", "3", "4"]


def test_a_line_shows_the_version_of_its_place_in_the_program(model: Any, plain: Any, capsys: Any) -> None:
    with model.trace(IDS) as tracer:
        last = model.lm_head.output
        h = model.layers[0].output
        tracer.log(h[0, 0, 0], last[0, 0, 0])
        h[:] = 0
        tracer.log(h[0, 0, 0])
    first = capture(plain, torch.tensor(IDS), "model.layers.0")[0, 0, 0]
    before, after = capsys.readouterr().out.splitlines()
    assert before.split()[0] == f"{first:.5g}"
    assert after == "0"


@pytest.mark.parametrize("prompts", [[IDS], [IDS, SHORT]], ids=["one", "two"])
def test_a_body_for_steps_logs_once_a_step(model: Any, plain: Any, prompts: Any, capsys: Any) -> None:
    with model.generate(max_new_tokens=4, **NO_EOS) as tracer:
        for number, ids in enumerate(prompts):
            with tracer.invoke(ids), tracer.all():
                tracer.log(f"invoke {number}:")
                tracer.log(number, model.layers[1].output[:, -1].sum())
    lines = capsys.readouterr().out.splitlines()
    events = told(model, tracer.graph, *prompts)
    assert [event["text"] for event in events] == lines
    for number, ids in enumerate(prompts):
        own = [event for event in events if event["invoke"] == number]
        assert [event["step"] for event in own] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [event["text"] for event in own[::2]] == [f"invoke {number}:"] * 4
        wanted = captured(plain, torch.tensor(ids), "model.layers.1", max_new_tokens=4, eos_token_id=None)
        for event, h in zip(own[1::2], wanted, strict=True):
            [found] = event["parts"][1]["tensor"]["values"]
            assert found == pytest.approx(h[:, -1].sum().item(), abs=1e-4)


def test_words_alone_come_as_their_step_begins(model: Any, capsys: Any) -> None:
    with model.generate(IDS, max_new_tokens=3, **NO_EOS) as tracer:
        for step in tracer.iter[:]:
            tracer.log(f"step {step} begins")
    assert capsys.readouterr().out.splitlines() == [f"step {i} begins" for i in range(3)]


def test_a_generation_that_ends_early_logs_the_steps_that_ran(model: Any, plain: Any, capsys: Any) -> None:
    free = generate(plain, torch.tensor(IDS), max_new_tokens=5, eos_token_id=None)
    with model.generate(IDS, max_new_tokens=5, eos_token_id=int(free[0, 7])) as tracer, tracer.all():
        tracer.log("step", model.lm_head.output.shape[1])
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(SiteError, match="the generation ended after 2 steps"):
        with model.generate(IDS, max_new_tokens=5, eos_token_id=int(free[0, 7])) as tracer, tracer.iter[4]:
            tracer.log("never")


def test_sessions_log_between_their_traces(model: Any, capsys: Any) -> None:
    with model.session() as session:
        with model.trace(IDS) as tracer:
            total = model.layers[0].output.sum()
            tracer.log("in the first")
        session.log("after the first", total)
        with model.trace(SHORT) as tracer:
            tracer.log("in the second", total)
    lines = capsys.readouterr().out.splitlines()
    assert [text.rpartition(" ")[0] for text in lines] == ["in the", "after the first", "in the second"]


def test_a_log_alone_is_reason_enough_to_run_and_no_more_runs_than_it_needs(model: Any, plain: Any) -> None:
    ran: list[str] = []
    handles = [
        plain.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in ("model.layers.0", "model.layers.1")
    ]
    with model.trace(IDS) as tracer:
        tracer.log(model.layers[0].output.sum())
    for handle in handles:
        handle.remove()
    assert ran == ["model.layers.0"]


# --- bounds and odd values ---------------------------------------------------------------------------------


def test_what_json_cannot_spell_is_text(model: Any) -> None:
    seen: list[dict[str, Any]] = []
    teller = Teller(lambda kind, data: seen.append(data))
    values = [
        torch.tensor([float("nan"), 1.0]),
        torch.tensor([float("inf"), -1.0], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor(2**62 + 1),
        math.inf,
    ]
    teller.log(0, None, values, " ")
    json.dumps(seen, allow_nan=False)
    nan, inf, complex_, empty, bools, large, number = seen[0]["parts"]
    assert nan["tensor"]["mean"] == "nan"
    assert inf["tensor"]["values"] == ["inf", -1.0]
    assert complex_["tensor"] == {"shape": [1], "dtype": "complex64", "values": ["1+2j"]}
    assert empty["tensor"] == {"shape": [0, 3], "dtype": "float32", "values": []}
    assert (bools["tensor"]["mean"], bools["tensor"]["max"], bools["tensor"]["values"]) == (
        0.5,
        1,
        [True, False],
    )
    assert large["tensor"]["max"] == 2**62 + 1
    assert number == "inf"
    assert line(seen[0]["parts"][3:4]) == "<[0, 3] float32: >"


def test_at_most_so_many_lines_are_told(monkeypatch: Any) -> None:
    monkeypatch.setattr("pellucid_worker.logs.MAX_LOGS", 3)
    seen: list[str] = []
    teller = Teller(lambda kind, data: seen.append(data["text"]))
    for number in range(10):
        teller.log(0, None, [number], " ")
    assert seen == ["0", "1", "2", "3 lines were logged; the rest of this job's are left out"]


def test_mistakes_are_named(model: Any) -> None:
    with pytest.raises(GraphError, match=r"test_log.py:\d+: .*a log has 1 to 64 parts, found 0"):
        with model.trace(IDS) as tracer:
            tracer.log()
    with pytest.raises(GraphError, match=r"test_log.py:\d+: .*a log has 1 to 64 parts, found 65"):
        with model.trace(IDS) as tracer:
            tracer.log(list(range(65)))
    with model.trace(IDS) as tracer:
        tracer.log("x" * 2000)
    assert tracer.graph.nodes[0].args[1] == "x" * 1000


def test_a_log_prints_and_reads_back_and_is_checked(model: Any, capsys: Any) -> None:
    with model.generate(max_new_tokens=3, **NO_EOS) as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke(SHORT), tracer.iter[1]:
            tracer.log("x", model.layers[0].output, sep="")
    graph = tracer.graph
    assert pellucid.Graph.from_json(graph.to_json()) == graph
    assert "log('x', v0, sep='') (invoke 1)\n" in show(graph)
    log = graph.nodes[1]
    assert log.op == LOG
    site = log.site
    for args, kwargs, match in [
        ((replace(site, module="lm_head"), "x"), {}, "tied to where a pass begins"),
        ((site, "x"), {"end": ""}, "and sep, a string"),
        ((site, "x" * 1001), {}, "strings have at most 1000 characters"),
        ((site, slice(1)), {}, "a log takes values"),
        (("x",), {}, "log takes a site first"),
        ((replace(site, step=5), "x"), {}, "step 6"),
    ]:
        with pytest.raises(GraphError, match=match):
            lint(replace(graph, nodes=(graph.nodes[0], replace(log, args=args, kwargs=kwargs))))

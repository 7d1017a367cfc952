"""``pellucid.Model`` over torch modules of many kinds, against plain hooks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pellucid
from hand_card import hand_card
from pellucid import LanguageModel, Model
from pellucid_shared.errors import (
    ExecutionError,
    InputError,
    NotYetError,
    OrderError,
    RecordingError,
    ShapeError,
    UnknownModuleError,
)
from pellucid_shared.graph import Graph

Edit = Callable[[Any], Any]


def hooked(module: nn.Module, edits: dict[str, Edit], *args: Any, **kwargs: Any) -> Any:
    """The module's output under plain forward hooks; what an edit of an output returns replaces it."""
    handles = []
    for path, edit in edits.items():
        own = module.get_submodule(path)
        handles.append(own.register_forward_hook(lambda _, args, output, edit=edit: edit(output)))
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def outputs(module: nn.Module, path: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What a module below returned in each of its calls."""
    found: list[Any] = []
    hooked(module, {path: lambda output: found.append(output)}, *args, **kwargs)
    return found


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(64, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.flat(self.pool(self.act(self.norm(self.conv(x))))))


class Recurrent(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Any) -> Any:
        hidden, (last, _) = self.rnn(x)
        return {"all": self.head(hidden), "last": last}


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Halves(nn.Module):
    def forward(self, x: Any) -> Pair:
        return Pair(*x.chunk(2, dim=-1))


class Nested(nn.Module):
    """Two inputs, one by keyword; a block that is called twice, a module without parameters, a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {"first": nn.Linear(4, 4), "second": nn.Sequential(nn.Linear(4, 4), nn.Tanh())}
        )
        self.halves = Halves()

    def forward(self, x: Any, *, bias: Any) -> Any:
        h = self.inner["second"](self.inner["second"](self.inner["first"](x)))
        pair = self.halves(h + bias)
        return pair.left * pair.right, {"sum": pair.left + pair.right}


class MinusMean(nn.Module):
    """Its rows are not independent of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        h = self.linear(x)
        return h - h.mean(0, keepdim=True)


class OneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.linear(x.reshape(2, 3, 4)).reshape(6, 4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8)


# --- one input ---------------------------------------------------------------------------------------------


def test_sites_are_read_and_written() -> None:
    net, x = Convolutional().eval(), image(3)
    model: Any = Model(net)
    with model.trace(x):
        assert model.conv.output.shape == (3, 4, 8, 8)
        model.conv.output[:, 1] = 0
        model.flat.output = model.flat.output * 2
        pooled, y = model.pool.output.save(), model.output.save()

    def zero(output: Any) -> None:
        output[:, 1] = 0

    wanted = hooked(net, {"conv": zero, "flat": lambda output: output * 2}, x)
    torch.testing.assert_close(y, wanted)
    assert type(y) is torch.Tensor
    pools: list[Any] = []
    hooked(net, {"conv": zero, "pool": lambda output: pools.append(output)}, x)
    torch.testing.assert_close(pooled, pools[0])


def test_a_view_of_a_site_shows_its_edits_as_in_torch() -> None:
    net, x = Convolutional().eval(), image(2)
    model: Any = Model(net)
    kept: list[Any] = []

    def double(output: Any) -> None:
        output *= 2

    hooked(net, {"pool": lambda output: kept.append(output), "flat": double}, x)
    with pytest.warns(UserWarning, match="edited in place"), model.trace(x):  # noqa: PT031
        before = model.pool.output.clone().save()
        pooled = model.pool.output.save()
        model.flat.output *= 2
        model.output.save()
    torch.testing.assert_close(pooled, kept[0])
    torch.testing.assert_close(before * 2, pooled)


def test_modules_that_work_in_place_are_one_tensor() -> None:
    net, x = Convolutional().eval(), image(2)
    model: Any = Model(net)
    with model.trace(x):
        negative = (model.norm.output < 0).any().save()
        model.act.output[:] = 1
        model.output.save()
    assert bool(negative)
    leaves = [model.card.call_index[path, 0].output for path in ("norm", "act")]
    assert leaves[0].object == leaves[1].object


def test_structures_keywords_and_repeated_calls() -> None:
    net, x, bias = Nested().eval(), torch.randn(3, 4), torch.randn(3, 4)
    model: Any = Model(net, name="nested", rename={"inner.second": "twice"})
    with model.trace(x, bias=bias) as tracer:
        first = model.inner["first"].output.save()
        once = model.twice.output.save()
        model.halves.output.left = model.halves.output.left * 3
        right = model.halves.output.right.save()
        product, named = model.output
        pellucid.save([product, named["sum"]])
        given = model.inputs[1]["bias"].save()
        changed = model.twice(x)
        changed.save()
    assert tracer.graph.model == "nested"
    torch.testing.assert_close(first, outputs(net, "inner.first", x, bias=bias)[0])
    torch.testing.assert_close(once, outputs(net, "inner.second", x, bias=bias)[0])
    torch.testing.assert_close(changed, net.inner["second"](x).detach())
    torch.testing.assert_close(given, bias)
    wanted = hooked(net, {"halves": lambda p: Pair(p.left * 3, p.right)}, x, bias=bias)
    torch.testing.assert_close(product, wanted[0])
    torch.testing.assert_close(named["sum"], wanted[1]["sum"])
    torch.testing.assert_close(right, outputs(net, "halves", x, bias=bias)[0].right)
    assert [c.call for c in model.card.prefill if c.module == "inner.second"] == [0, 1]


def test_tuples_and_lists_of_tensors_are_arguments() -> None:
    class Sums(nn.Module):
        def forward(self, pair: Any, more: Any) -> Any:
            return pair[0] + pair[1] + sum(more.values())

    a, b, c = (torch.randn(2, 3) for _ in range(3))
    model: Any = Model(Sums())
    with model.trace((a, b), {"c": c}):
        model.inputs[0][0][1] = 0
        y = model.output.save()
    torch.testing.assert_close(y, a + c)
    torch.testing.assert_close(model.trace([a, b], {"c": c}, trace=False), a + b + c)


def test_the_users_tensors_and_module_are_left_as_they_were() -> None:
    net, x = Convolutional(), image(2)
    net.train()
    before, state, random = x.clone(), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    model: Any = Model(net)
    with model.trace(x):
        model.input[:] = 0
        y = model.output.save()
    torch.testing.assert_close(y, net(torch.zeros_like(x)).detach())
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_probe_leaves_state_and_random_numbers_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.runs += 1
            return x + torch.rand(4)

    net, x = Counts(), torch.randn(2, 4)
    torch.manual_seed(5)
    found = Model(net).trace(x, trace=False)
    torch.manual_seed(5)
    torch.testing.assert_close(found, x + torch.rand(4))
    assert net.runs.item() == 1  # type: ignore[operator]


def test_a_trace_has_random_numbers_of_its_own() -> None:
    model: Any = Model(nn.Linear(4, 4))
    found = []
    for seed in (3, 3, 4):
        with model.trace(torch.ones(2, 4), seed=seed):
            found.append((model.output + torch.randn(2, 4)).save())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_tree_before_and_after_the_first_input() -> None:
    model: Any = Model(Convolutional())
    assert repr(model).splitlines()[0] == "Convolutional: Convolutional"
    assert "(conv): Conv2d" in repr(model)
    assert {"conv", "head"} <= set(dir(model))
    model.trace(image(2), trace=False)
    assert "(conv): Conv2d -> [batch, 4, 8, 8] float32" in repr(model)
    with pytest.raises(UnknownModuleError, match=r"has no module or parameter 'con'\. Nearest: conv"):
        _ = model.con


def test_a_scan_runs_no_graph() -> None:
    model: Any = Model(Convolutional())
    with model.scan(image(2)):
        h = model.conv.output
        assert h.shape == (2, 4, 8, 8)
        with pytest.raises(ShapeError, match="do not broadcast"):
            _ = h + torch.zeros(7)
    with pytest.raises(OrderError), model.trace(image(2)):
        model.conv.output[:] = model.pool.output.mean()


def test_a_session_and_a_cache() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), torch.randn(2, 4)
    model: Any = Model(net)
    with model.session() as session:
        with session.trace(x):
            h = model[1].output
        with model.trace(x * 2):
            model[0].output = h
            y = model.output.save()
    torch.testing.assert_close(y, net(x).tanh().detach())
    with model.trace(x) as tracer:
        cache = tracer.cache()
    torch.testing.assert_close(cache["0"].output, net[0](x).detach())


def test_modules_of_a_sequence_are_applied_to_part_of_it() -> None:
    net, x = Recurrent(batch_first=True).eval(), torch.randn(3, 5, 4)
    model: Any = Model(net)
    with model.trace(x):
        hidden = model.rnn.output[0]
        last = model.head(hidden[:, -1]).save()
        with pytest.raises(ShapeError, match=r"head takes \[..., 6\] and was given \[3, 5, 4\]"):
            model.head(model.rnn.input)
    torch.testing.assert_close(last, hooked(net, {}, x)["all"][:, -1])
    assert model.card.call_index["rnn", 0].output.items[0].shape == ("batch", "tokens", 6)


# --- several inputs ----------------------------------------------------------------------------------------


def seen_rows(net: nn.Module, block: Callable[[], Any]) -> list[int]:
    """Sizes of axis 0 of the passes that a trace takes; the probe's own runs are over."""
    rows: list[int] = []
    handle = net.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    try:
        block()
    finally:
        handle.remove()
    return rows


def two(model: Any, a: Any, b: Any, edited: str, taken: str) -> tuple[Any, Any]:
    """Outputs of two invokes: the first is edited in place, the second takes rows of the first's."""
    with model.trace() as tracer:
        with tracer.invoke(a):
            module = model.get(edited)
            module.output[:, 0] = 0
            rows = model.get(taken).output[: b.shape[0]]
            first = model.output.save()
        with tracer.invoke(b):
            model.get(taken).output = rows * 2
            second = model.output.save()
    return first, second


def test_invokes_share_a_pass_on_the_batch_axis() -> None:
    net, a, b = (
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).eval(),
        torch.randn(3, 4),
        torch.randn(2, 4),
    )
    model: Any = Model(net)
    model.trace(a, trace=False)
    found: list[Any] = []
    assert seen_rows(net, lambda: found.extend(two(model, a, b, "0", "1"))) == [5]

    def zero(output: Any) -> None:
        output[:, 0] = 0

    kept: list[Any] = []
    wanted = hooked(net, {"0": zero, "1": lambda h: kept.append(h.clone())}, a)
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], hooked(net, {"1": lambda h: kept[0][:2] * 2}, b))


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (MinusMean(), [torch.randn(3, 4), torch.randn(2, 4)]),
        (OneSize(), [torch.randn(6, 4), torch.randn(6, 4)]),
        (Recurrent(batch_first=False), [torch.randn(5, 2, 4), torch.randn(3, 2, 4)]),
    ],
    ids=["rows depend on each other", "one size", "axis 0 is time"],
)
def test_what_cannot_share_runs_alone(net: nn.Module, inputs: list[Any]) -> None:
    model: Any = Model(net.eval())
    model.trace(inputs[0], trace=False)
    found: list[Any] = []

    def block() -> None:
        with model.trace() as tracer:
            for x in inputs:
                with tracer.invoke(x):
                    found.append(pellucid.save(model.output))

    assert seen_rows(net, block) == [len(x) for x in inputs]
    assert model.card.packs is False
    for value, x in zip(found, inputs, strict=True):
        wanted = hooked(net, {}, x)
        for key in wanted if isinstance(wanted, dict) else (...,):
            torch.testing.assert_close(value[key], wanted[key])


def test_sites_with_the_batch_elsewhere_run_alone() -> None:
    net = Recurrent(batch_first=True).eval()
    a, b = torch.randn(3, 5, 4), torch.randn(2, 5, 4)
    model: Any = Model(net)
    model.trace(a, trace=False)
    assert model.card.packs is True
    found: dict[str, Any] = {}

    def read(*path: str) -> None:
        with model.trace() as tracer:
            for name, x in (("a", a), ("b", b)):
                with tracer.invoke(x):
                    value = model.output[path[0]]
                    found[path[0] + name] = value.save()

    assert seen_rows(net, lambda: read("all")) == [5]
    assert seen_rows(net, lambda: read("last")) == [3, 2]
    for name, x in (("a", a), ("b", b)):
        torch.testing.assert_close(found[f"all{name}"], hooked(net, {}, x)["all"])
        torch.testing.assert_close(found[f"last{name}"], hooked(net, {}, x)["last"])


def test_two_views_of_one_memory_run_alone() -> None:
    net, a, b = Convolutional().eval(), image(2), image(1)
    model: Any = Model(net)
    model.trace(a, trace=False)
    kept: list[Any] = []

    def block(*modules: str) -> None:
        with model.trace() as tracer:
            for x in (a, b):
                with tracer.invoke(x):
                    read = [model.get(path).output for path in modules]
                    read[-1][:, 0] = 0
                    kept.append(pellucid.save([*read, model.output]))

    assert seen_rows(net, lambda: block("flat")) == [3]
    assert seen_rows(net, lambda: block("pool", "flat")) == [2, 1]

    def zero(output: Any) -> None:
        output[:, 0] = 0

    for x, flat, both in ((a, kept[0], kept[2]), (b, kept[1], kept[3])):
        pools: list[Any] = []
        wanted = hooked(net, {"pool": lambda p, own=pools: own.append(p), "flat": zero}, x)
        torch.testing.assert_close(flat[1], wanted)
        torch.testing.assert_close(both[2], wanted)
        torch.testing.assert_close(both[0], pools[0])


def test_constants_that_differ_run_alone() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Any, scale: Any) -> Any:
            return x * scale

    net, x = Scaled(), torch.randn(3, 4)
    model: Any = Model(net)
    for scales, rows in (((2.0, 2.0), [6]), ((2.0, 3.0), [3, 3])):
        found: list[Any] = []
        model.trace(x, torch.tensor(1.0), trace=False)

        given = [torch.tensor(scale) for scale in scales]

        def block(given: list[Any] = given, found: list[Any] = found) -> None:
            with model.trace() as tracer:
                for scale in given:
                    with tracer.invoke(x, scale):
                        found.append(model.output.save())

        assert seen_rows(net, block) == rows
        for value, scale in zip(found, scales, strict=True):
            torch.testing.assert_close(value, x * scale)


def test_inputs_are_cut_inside_the_trace() -> None:
    net, x = nn.Linear(4, 2).eval(), torch.randn(4, 4)
    model: Any = Model(net)
    with model.trace() as tracer:
        with tracer.invoke(x[:3]):
            first = model.output.save()
        with tracer.invoke(x[3:]):
            second = model.output.save()
    torch.testing.assert_close(torch.cat([first, second]), net(x).detach())


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_card_is_made_once_for_each_form() -> None:
    net, runs = nn.Linear(4, 2), []
    net.register_forward_pre_hook(lambda _, args: runs.append(tuple(args[0].shape)))
    model: Any = Model(net)
    for x in (torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 6, 4)):
        model.trace(x, trace=False)
    first = [(3, 4), (4, 4), (3, 5), (7, 4)]  # the second size of axis 1 is one that a Linear refuses
    other = [(2, 6, 4), (3, 6, 4), (2, 7, 4), (5, 6, 4)]
    assert runs == [*first, (3, 4), (5, 4), *other, (2, 6, 4)]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("text",), "model.trace of a torch module takes tensors, .*; found str 'text'"),
        (([1, 2],), "found int 1. Of a number or an array make torch.tensor"),
        (
            (torch.randn(3, 5),),
            r"Linear cannot be run on this input: mat1 and mat2 shapes cannot be multiplied",
        ),
        (((),), "was given no tensor"),
    ],
)
def test_inputs_that_cannot_be_used(given: Any, match: str) -> None:
    model: Any = Model(nn.Linear(4, 2))
    with pytest.raises(InputError, match=match) as caught, model.trace(*given):
        pass
    assert caught.value.where is not None
    assert caught.value.where.startswith(__file__)


def test_options_that_cannot_be_had() -> None:
    model: Any = Model(nn.Linear(4, 2))
    x = torch.randn(2, 4)
    for options in ({"remote": True}, {"remote": "http://somewhere:1"}, {"blocking": False}):
        with pytest.raises(InputError, match="runs in this process only"):
            model.trace(x, **options)
    with pytest.raises(InputError, match=r"model\.trace has no option 'inputs', .* Nearest: input"):
        model.trace(inputs=x)
    with pytest.raises(InputError, match="seed is a whole number"):
        model.trace(x, seed=-1)
    with pytest.raises(InputError, match="runs the module at once: give it an input"):
        model.trace(trace=False)
    with pytest.raises(InputError, match="this trace has no input"), model.trace():
        pass
    with pytest.raises(InputError, match="takes its tensors"), model.trace() as tracer:
        tracer.invoke()
    with pytest.raises(RecordingError, match="was given its input"), model.trace(x) as tracer:
        tracer.invoke(x)
    with pytest.raises(InputError, match="Model wraps a torch module, found str; LanguageModel takes a name"):
        Model("gpt2")


def test_invokes_of_other_forms_are_refused() -> None:
    model: Any = Model(nn.Linear(4, 2))
    a, b = torch.zeros(2, 4), torch.zeros(2, 3, 4)
    match = r"this input is \[batch, 3, 4\] float32, and the first of this job \[batch, 4\] float32"
    with pytest.raises(InputError, match=match), model.trace() as tracer:
        with tracer.invoke(a):
            model.output.save()
        with tracer.invoke(b):
            pass


def test_a_value_is_no_input() -> None:
    model: Any = Model(nn.Linear(4, 4))
    x = torch.ones(1, 4)
    match = "is a value of this trace: make inputs before the block"
    with pytest.raises(InputError, match=match), model.trace() as tracer:
        with tracer.invoke(x):
            h = model.output
        with tracer.invoke(h):
            pass
    with pytest.raises(InputError, match=match), model.trace() as tracer, tracer.invoke(torch.ones(1, 4)):
        pass


def test_a_failing_op_names_its_line() -> None:
    model: Any = Model(nn.Linear(4, 4))
    with (
        pytest.raises(ExecutionError, match=r"torch\.linalg\.cholesky failed"),
        model.trace(torch.randn(4, 4)),
    ):
        torch.linalg.cholesky(-(model.output @ model.output.T)).save()


def test_the_graph_is_a_file_and_a_server_refuses_it() -> None:
    from pellucid_server.admission import admit

    model: Any = Model(nn.Linear(4, 4), name="m")
    x = torch.randn(2, 4)
    with model.trace(x) as tracer:
        model.output.save()
    graph, literals = tracer.experiment.graph, tracer.experiment.literals
    assert Graph.from_json(graph.to_json()) == graph
    assert set(literals) == graph.literals()
    assert len(literals) == 1
    assert "invoke 0: tensor<" in str(tracer.experiment)
    served: Any = type("Served", (), {"card": hand_card()})()
    with pytest.raises(
        InputError, match="calls a torch module with tensors, which runs in its user's process"
    ):
        admit(graph, served, literals)


@pytest.mark.parametrize("tensors", [{}, {"args": []}, {"args": [3]}, {"kwargs": []}, {"more": []}, []])
def test_inputs_that_are_none_are_no_graph(tensors: Any) -> None:
    region = {"kind": "trace", "invokes": [{"tensors": tensors}]}
    with pytest.raises(pellucid.errors.GraphError):
        Graph.from_object({"version": 1, "model": "m", "regions": [region], "nodes": []})


def test_other_kinds_of_models_are_still_to_come() -> None:
    with pytest.raises(NotYetError, match="Model, for any torch module"):
        _ = pellucid.EncoderModel
    assert LanguageModel is not Model

"""The graph: canonical bytes, hash, limits, lint, printing."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid_shared.errors import EmptyPromptError, GraphError, LimitError, SiteError, UnknownOpError
from pellucid_shared.graph import APPLY, GET, SAVE, SET, Graph, Invoke, Node, Trace
from pellucid_shared.lint import lint
from pellucid_shared.regions import Cond, Loop, Outside
from pellucid_shared.show import show
from pellucid_shared.specs import DTYPES
from pellucid_shared.values import Device, DType, ModuleRef, Ref, Site, TensorRef, decode, encode

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INT = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**31)
SLICE = st.builds(slice, *[st.none() | INT] * 3)
SITE = st.builds(
    Site,
    TEXT,
    st.sampled_from(["output", "input"]),
    st.lists(COUNT | TEXT, max_size=3).map(tuple),
    COUNT,
    COUNT,
    COUNT,
)
LEAF = (
    st.none()
    | st.booleans()
    | INT
    | st.floats()
    | TEXT
    | st.complex_numbers()
    | st.just(...)
    | SLICE
    | SITE
    | st.builds(Ref, COUNT)
    | st.builds(TensorRef, st.binary(min_size=32, max_size=32).map(lambda b: "sha256:" + b.hex()))
    | st.builds(DType, st.sampled_from(list(DTYPES)))
    | st.builds(Device, st.sampled_from(["cpu", "cuda:1", "mps"]))
    | st.builds(ModuleRef, TEXT)
)
VALUE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
NODE = st.builds(
    Node,
    TEXT.filter(bool),
    st.lists(VALUE, max_size=4).map(tuple),
    st.dictionaries(TEXT, VALUE, max_size=3),
    st.integers(0, 3),
)
IDS = st.lists(COUNT, max_size=4)
INVOKE = st.builds(Invoke, TEXT | st.lists(TEXT, min_size=1, max_size=3) | IDS) | st.lists(
    IDS, min_size=1, max_size=3
).map(lambda rows: Invoke(rows, [[1] * len(row) for row in rows]))
GRAPH = st.builds(
    Graph,
    TEXT.filter(bool),
    st.lists(st.builds(Trace, st.lists(INVOKE, max_size=3).map(tuple)), max_size=2).map(tuple),
    st.lists(NODE, max_size=6).map(tuple),
)


def graph_of(*nodes: Node, invokes: tuple[Invoke, ...] = (Invoke("hello"),)) -> Graph:
    return Graph("m", (Trace(invokes),), nodes)


@settings(max_examples=300)
@given(GRAPH)
def test_any_graph_round_trips_byte_for_byte(graph: Graph) -> None:
    data = graph.to_json()
    again = Graph.from_json(data)
    assert again.to_json() == data
    assert again.sha256 == graph.sha256


def same(a: object, b: object) -> bool:
    """Equality that tells 1 from 1.0 from True, and 0.0 from -0.0, and finds nan equal to nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex) and isinstance(b, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@settings(max_examples=300)
@given(VALUE)
def test_any_value_round_trips_with_its_type(value: object) -> None:
    assert same(decode(json.loads(json.dumps(encode(value)))), value)


def test_same_experiment_same_bytes_whatever_the_order_of_keywords() -> None:
    a = graph_of(Node("torch.sum", (Ref(0),), {"dim": 1, "keepdim": True}))
    b = graph_of(Node("torch.sum", (Ref(0),), {"keepdim": True, "dim": 1}))
    assert a.to_json() == b.to_json()


def test_one_and_one_point_zero_and_true_hash_differently() -> None:
    hashes = {graph_of(Node("torch.add", (Ref(0), v))).sha256 for v in (1, 1.0, True)}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1e400]", "too large"),
        ("[NaN]", "NaN is not JSON"),
        ('{"a":1,"a":2}', "names a key twice"),
        ("7", "is a JSON object"),
        ("{}", "lacks model, nodes, regions, version"),
        ('{"version":2,"model":"m","regions":[],"nodes":[]}', "version 2 is not known"),
        ('{"version":1,"model":"","regions":[],"nodes":[]}', "names its model"),
        ('{"version":1,"model":"m","regions":{},"nodes":[]}', "are lists"),
        ('{"version":1,"model":"m","regions":[{"kind":"spiral","invokes":[]}],"nodes":[]}', "'spiral'"),
        ('{"version":1,"model":"\\ud800","regions":[],"nodes":[]}', "surrogate"),
        ('{"version":1,"model":"m","regions":[],"nodes":[],"x":1}', "has no x"),
    ],
)
def test_what_is_not_a_graph_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Graph.from_json(text)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ({"ref": -1}, "a ref is a node's position"),
        ({"ref": True}, "a ref is a node's position"),
        ({"nope": 1}, "unknown tag 'nope'"),
        ({"ref": 1, "slice": []}, "exactly one key"),
        ({"slice": [1, 2]}, "start, stop, step"),
        ({"slice": [1.5, None, None]}, "whole numbers or null"),
        ({"tensor": "sha256:zz"}, "64 hex digits"),
        ({"dtype": "float33"}, "unknown dtype"),
        ({"device": "toaster"}, "unknown device"),
        ({"float": "1.0"}, "tagged float"),
        ({"complex": [1, 2]}, "two floats"),
        ({"dict": [["a", 1], ["a", 2]]}, "names a key twice"),
        ({"site": {"module": "a", "kind": "output"}}, "leaves out what has its default"),
        ({"site": {"module": "a", "wat": 1}}, "has no"),
        (2**63, "64 bits"),
    ],
)
def test_a_malformed_value_names_its_node(arg: object, message: str) -> None:
    data = json.loads(graph_of(Node("torch.abs", (1,))).to_json())
    data["nodes"].append({"op": "torch.abs", "args": [arg]})
    with pytest.raises(GraphError, match=message) as caught:
        Graph.from_json(json.dumps(data))
    assert caught.value.node == 1


def test_deep_nesting_and_great_size_are_refused_before_parsing() -> None:
    with pytest.raises(LimitError, match="nested 100000 deep"):
        Graph.from_json("[" * 100_000)
    with pytest.raises(LimitError, match="bytes"):
        Graph.from_json(" " * (9 * 2**20))


def test_quotes_that_are_not_closed_are_read_once() -> None:
    """A pattern that looks at the rest of the text anew at each quote needs minutes for this."""
    for body in ('\\"' * 500_000, '"' * 500_001, '"\\' * 500_000):
        with pytest.raises(GraphError):
            Graph.from_json(body)


GET0, GET1 = (Node(GET, (Site("h.0"),), {}, region) for region in (0, 1))


def flow(*parts: Any, before: tuple[Node, ...] = ()) -> Graph:
    """Nodes behind a read, which is node 0, and a flag taken of it; and the regions 1, 2, ..."""
    regions = [part for part in parts if not isinstance(part, Node)]
    nodes = [part for part in parts if isinstance(part, Node)]
    flag = Node("cond.flag", (Ref(0),))
    return Graph("m", (Trace((Invoke("a"),)), *regions), (GET0, *before, flag, *nodes))


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (Graph("m", (), ()), GraphError, "a graph has a trace"),
        (graph_of(invokes=()), GraphError, "at least one invoke"),
        (graph_of(invokes=(Invoke(""),)), EmptyPromptError, "invoke 0 is empty"),
        (graph_of(invokes=(Invoke("a"), Invoke([[1], []]))), EmptyPromptError, "invoke 1 is empty"),
        (graph_of(invokes=(Invoke([[1, 2]], [[0, 0]]),)), GraphError, "hides every token"),
        (graph_of(Node("torch.ads", (1,))), UnknownOpError, "torch.abs"),
        (graph_of(Node("torch.abs", (Ref(0),))), GraphError, "not before it"),
        (graph_of(GET0, Node(SAVE, (Ref(0),)), Node("torch.abs", (Ref(1),))), GraphError, "yields none"),
        (graph_of(Node(GET, (Site("h.0", invoke=1),))), SiteError, "in invoke 1"),
        (graph_of(Node(GET, (Site("h.0", step=1),))), SiteError, "at step 1"),
        (graph_of(Node(GET, (1,))), GraphError, "takes a site first"),
        (graph_of(Node(APPLY, (1,))), GraphError, "takes a module first"),
        (graph_of(Node("torch.abs", (Site("h.0"),))), GraphError, "where a value stands"),
        (graph_of(Node(SAVE, ([ModuleRef("h")],))), GraphError, "where a value stands"),
        (graph_of(Node(SET, (Site("h.0"), "x"))), GraphError, "a tensor or a number"),
        (graph_of(Node(SET, (Site("h.0"),))), GraphError, "takes 2 arguments"),
        (graph_of(GET0, Node(SAVE, (Ref(0), ""))), GraphError, "a saved name"),
        (graph_of(GET0, Node(SAVE, (Ref(0), "a")), Node(SAVE, (Ref(0), "a"))), GraphError, "saved twice"),
        (graph_of(Node("torch.abs", (1,), {}, 3)), GraphError, "region 3"),
        (flow(Cond(0, 0)), GraphError, "a branch on node 0, which is no flag"),
        (flow(Cond(0, None)), GraphError, "a branch without a flag that continues none"),
        (flow(Cond(0, 1), Cond(0, None, 3)), GraphError, "continues region 3, which is no earlier branch"),
        (flow(Cond(1, 1)), GraphError, "region 1 stands in region 1, which is no earlier one"),
        (flow(Cond(0, 2), before=(Node(SAVE, (Ref(0),), {}, 1),)), GraphError, "whose flag is not before it"),
        (flow(Cond(0, 1), GET1, Node(SAVE, (Ref(2),))), GraphError, "which one branch alone makes"),
        (flow(Loop(0, 2), GET1, Node(SAVE, (Ref(2),))), GraphError, "which a loop makes in each turn"),
        (flow(Loop(0, 10**7)), LimitError, "at most 1000000 turns"),
        (flow(*(Loop(i, 2) for i in range(40))), LimitError, "nested deeper than 32"),
        (flow(Loop(0, 2), GET1, GET0, GET1), GraphError, "region 1 do not follow each other"),
        (flow(Node("loop.index")), GraphError, "loop.index stands in a loop"),
        (flow(Node("loop.until", (Ref(1),))), GraphError, "stands in the body of a loop itself"),
        (flow(Node("loop.until", (Ref(0),), {}, 1), Loop(0, 2)), GraphError, "loop.until takes a flag"),
        (flow(Node("loop.until", (Ref(1),), {}, 1), Loop(0, 2)), GraphError, "taken in the same turn"),
        (flow(Node("torch.abs", (Ref(1),))), GraphError, "a flag is for branches and loops"),
        (flow(Node("carry.get", (Ref(0),))), GraphError, "carry.get takes a carry first"),
        (flow(Node("carry.get", ())), GraphError, "carry.get takes 1 arguments"),
        (flow(GET1, Node("carry.new", (Ref(2),), {}, 1), Loop(0, 2)), GraphError, "before its first turn"),
        (
            flow(Node("carry.new", (1,), {}, 1), Node("torch.abs", (Ref(2),)), Loop(0, 2)),
            GraphError,
            "carry.get gives its value",
        ),
        (flow(Node("flow.bound", (1,))), UnknownOpError, "flow.bound"),
        (flow(Trace((Invoke("a"),), parent=0)), GraphError, "which is no loop of a session"),
        (flow(Outside(), Cond(1, 1)), GraphError, "a branch on node 1, which is no flag taken beside it"),
        (flow(Outside(), Node(GET, (Site("h.0"),), {}, 1)), GraphError, "stands outside all traces"),
    ],
)
def test_lint_states_each_invariant(graph: Graph, error: type[GraphError], message: str) -> None:
    with pytest.raises(error, match=message):
        lint(graph)


def test_a_valid_graph_passes_lint() -> None:
    lint(
        graph_of(
            GET0, Node("torch.mul", (Ref(0), 2)), Node(SET, (Site("h.0"), Ref(1))), Node(SAVE, (Ref(0),))
        )
    )


def test_a_graph_prints_as_readable_code() -> None:
    graph = graph_of(
        GET0,
        Node("getitem", (Ref(0), (slice(None), -1))),
        Node("torch.mul", (Ref(1), 2.0)),
        Node("setitem", (Ref(0), (slice(None), slice(1, None, 2)), Ref(2))),
        Node(APPLY, (ModuleRef("lm_head"), Ref(2))),
        Node("torch.softmax", (Ref(4),), {"dim": -1, "dtype": DType("float64")}),
        Node(SAVE, ([Ref(5)], "p")),
    )
    assert show(graph) == (
        'trace "m":\n'
        "    invoke 0: 'hello'\n"
        "    v0 = h.0.output\n"
        "    v1 = v0[:, -1]\n"
        "    v2 = v1 * 2.0\n"
        "    v0[:, 1::2] = v2; v3 = v0\n"
        "    v4 = lm_head(v2)\n"
        "    v5 = torch.softmax(v4, dim=-1, dtype=torch.float64)\n"
        "    save([v5], 'p')\n"
    )

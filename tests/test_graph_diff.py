"""What differs between two graphs: every difference shows, and only differences do."""

from __future__ import annotations

from hypothesis import given, settings

from pellucid_shared.diff import diff
from pellucid_shared.graph import GET, SAVE, SET, Graph, Invoke, Node, Trace
from pellucid_shared.values import Device, Ref, Site, TensorRef
from test_graph import GRAPH, graph_of

H = Node(GET, (Site("h.0"),))
DOUBLE = Node("torch.mul", (Ref(0), 2.0))
WRITE = Node(SET, (Site("h.0"), Ref(1)))
KEEP = Node(SAVE, (Ref(1),))
BASE = graph_of(H, DOUBLE, WRITE, KEEP)


@settings(max_examples=200)
@given(GRAPH, GRAPH)
def test_there_is_a_line_exactly_where_the_bytes_differ(a: Graph, b: Graph) -> None:
    assert diff(a, a) == []
    assert bool(diff(a, b)) == (a.to_json() != b.to_json())


def test_a_changed_line_is_the_only_one_shown() -> None:
    other = graph_of(H, Node("torch.mul", (Ref(0), 3.0)), WRITE, KEEP)
    assert diff(BASE, other) == ["- v1 = v0 * 2.0", "+ v1 = v0 * 3.0"]


def test_a_line_more_does_not_make_those_below_it_differ() -> None:
    more = graph_of(
        Node(GET, (Site("embed"),)),
        H,
        Node("torch.mul", (Ref(1), 2.0)),
        Node(SET, (Site("h.0"), Ref(2))),
        Node(SAVE, (Ref(2),)),
    )
    assert diff(BASE, more) == ["+ v0 = embed.output"]
    assert diff(more, BASE) == ["- v0 = embed.output"]


def test_the_same_words_about_another_value_differ() -> None:
    a = graph_of(H, Node(GET, (Site("h.1"),)), Node("torch.exp", (Ref(0),)), Node(SAVE, (Ref(2),)))
    b = graph_of(H, Node(GET, (Site("h.1"),)), Node("torch.exp", (Ref(1),)), Node(SAVE, (Ref(2),)))
    assert diff(a, b) == ["- v2 = torch.exp(v0)", "+ v2 = torch.exp(v1)"]


def test_models_and_inputs_are_shown_in_full() -> None:
    text = "a" * 200
    a = Graph("m", (Trace((Invoke(text + "b"), Invoke([1]))),), BASE.nodes)
    b = Graph("n", (Trace((Invoke(text + "c"), Invoke([1]), Invoke([[2]], [[1]]))),), BASE.nodes)
    assert diff(a, b) == [
        "- model 'm'",
        "+ model 'n'",
        f"- invoke 0: {text + 'b'!r}",
        f"+ invoke 0: {text + 'c'!r}",
        "+ invoke 2: [[2]], mask [[1]]",
    ]


def test_what_code_does_not_show_is_shown_as_json() -> None:
    named = graph_of(H, DOUBLE, WRITE, Node(SAVE, (Ref(1), "saved_0")))
    assert diff(BASE, named) == [
        '- {"args":[{"ref":1}],"op":"save"}',
        '+ {"args":[{"ref":1},"saved_0"],"op":"save"}',
    ]
    a, b = (graph_of(Node("torch.abs", (value,))) for value in (Device("cpu"), "cpu"))
    assert len(diff(a, b)) == 2


def test_tensors_are_told_apart_by_their_bytes() -> None:
    a, b = (graph_of(Node("torch.abs", (TensorRef("sha256:" + digit * 64),))) for digit in "ab")
    assert diff(a, b) == ["- v0 = torch.abs(tensor<aaaaaaaa>)", "+ v0 = torch.abs(tensor<bbbbbbbb>)"]

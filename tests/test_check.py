"""Checking a graph against a card: sites, shapes, order; every error names its node."""

import pytest

from hand_card import HIDDEN, VOCAB, hand_card, state
from pellucid_shared.card import Call, ModuleInfo
from pellucid_shared.check import check
from pellucid_shared.errors import (
    GraphError,
    IndexOutOfRangeError,
    OpArgumentError,
    OrderError,
    ShapeError,
    SiteError,
    UnknownModuleError,
)
from pellucid_shared.graph import APPLY, GET, SAVE, SET, Graph, Invoke, Node, Trace
from pellucid_shared.lint import lint
from pellucid_shared.specs import TensorSpec
from pellucid_shared.values import ModuleRef, Ref, Site, TensorRef

B, T = 2, 5
DIGEST = "sha256:" + "0" * 64


def checked(*nodes: Node, invokes: int = 1, packs: bool = True, tensors: dict[str, TensorSpec] | None = None):
    graph = Graph("m", (Trace((Invoke([[1] * T] * B),) * invokes),), nodes)
    lint(graph)
    return check(graph, hand_card(packs=packs), [(B, T)] * invokes, tensors or {})


def get(module: str, kind: str = "output", path: tuple[int | str, ...] = (), invoke: int = 0) -> Node:
    return Node(GET, (Site(module, kind, path, invoke),))


def put(module: str, value: object, invoke: int = 0, path: tuple[int | str, ...] = ()) -> Node:
    return Node(SET, (Site(module, "output", path, invoke), value))


def test_specs_follow_the_card_and_the_rules() -> None:
    result = checked(
        get("h.0"),
        Node("getitem", (Ref(0), (slice(None), -1))),
        Node(APPLY, (ModuleRef("lm_head"), Ref(1))),
        Node("torch.softmax", (Ref(2),), {"dim": -1}),
        Node(SAVE, (Ref(3),)),
    )
    assert result.specs == (
        TensorSpec((B, T, HIDDEN)),
        TensorSpec((B, HIDDEN)),
        TensorSpec((B, VOCAB)),
        TensorSpec((B, VOCAB)),
        None,
    )
    assert result.cost.flops >= 2 * B * VOCAB * HIDDEN


def test_a_node_is_ready_at_the_latest_site_it_needs() -> None:
    result = checked(get("h.1", path=(0,)), get("embed"), Node("torch.add", (Ref(0), Ref(1))))
    assert result.timeline.ready == (6, 2, 6)


@pytest.mark.parametrize(
    ("nodes", "error", "message"),
    [
        ([get("h.2")], UnknownModuleError, "has no module 'h.2'. Nearest: h.1, h.0"),
        ([get("unused")], SiteError, "unused is never called"),
        ([Node(GET, (Site("h.0", call=1),))], SiteError, "called 1 times in a pass; call 1 was asked"),
        ([get("h.1")], SiteError, r"not a tensor of h.1's output; it has tensors at \[0\]"),
        ([get("h.1", path=(1,))], SiteError, "a DynamicCache, which is never read or written"),
        ([get("h.0", "input", (1, "mask"))], SiteError, "follows neither batch nor tokens"),
        (
            [get("h.0"), put("h.0", Ref(0)), put("lm_head", Ref(0))],
            ShapeError,
            r"\[2, 5, 50\] .* \[2, 5, 8\]",
        ),
        (
            [get("embed", "input", (0, 0)), Node(SET, (Site("embed", "input", (0, 0)), 0.5))],
            ShapeError,
            "cannot be filled with 0.5",
        ),
        ([put("h.0", TensorRef(DIGEST))], GraphError, "was not sent"),
        ([get("h.0"), Node(APPLY, (ModuleRef("lm_heed"), Ref(0)))], UnknownModuleError, "Nearest: lm_head"),
        ([get("lm_head"), Node(APPLY, (ModuleRef("lm_head"), Ref(0)))], ShapeError, r"takes \[..., 8\]"),
        ([Node(APPLY, (ModuleRef("lm_head"), 3))], OpArgumentError, "applied to no tensor"),
        ([get("h.0"), Node(APPLY, (ModuleRef("unused"), Ref(0)))], SiteError, "unused does not run"),
        ([get("h.0"), Node("getitem", (Ref(0), (0, 5)))], IndexOutOfRangeError, "5"),
        ([get("h.0"), get("lm_head"), Node("torch.add", (Ref(0), Ref(1)))], ShapeError, r"\[2, 5, 8\]"),
        ([get("h.0"), Node("torch.sum", (Ref(0),), {"dimm": 1})], OpArgumentError, "'dimm'. Nearest: dim"),
    ],
)
def test_what_does_not_fit_is_named(nodes: list[Node], error: type[GraphError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        checked(*nodes)
    assert caught.value.node == len(nodes) - 1


def test_a_write_that_needs_a_later_site_is_an_error_naming_both() -> None:
    with pytest.raises(OrderError, match=r"h.0.output is written with .* needs h.1.output\[0\]") as caught:
        checked(get("h.1", path=(0,)), put("h.0", Ref(0)))
    assert caught.value.node == 1


def test_an_in_place_edit_that_comes_too_late_suggests_a_clone() -> None:
    late = [get("h.0"), get("h.1", path=(0,)), Node("setitem", (Ref(0), 0, Ref(1)))]
    late[2] = Node("setitem", (Ref(0), ..., Ref(1)))
    with pytest.raises(OrderError, match=r"\.clone\(\)"):
        checked(*late)


def test_an_in_place_edit_of_a_view_that_comes_too_late_is_seen_as_well() -> None:
    nodes = [
        get("h.0"),
        get("h.1", path=(0,)),
        Node("getitem", (Ref(0), (slice(None), -1))),
        Node("getitem", (Ref(1), (slice(None), -1))),
        Node("setitem", (Ref(2), ..., Ref(3))),
    ]
    with pytest.raises(OrderError, match="in place"):
        checked(*nodes)


def test_what_a_module_that_returns_its_input_gives_back_is_that_very_tensor() -> None:
    drop = Call(module="drop", call=0, enter=2, exit=2, args=(state(1),), kwargs={}, output=state(1))
    card = hand_card()
    card = card.model_copy(
        update={
            "modules": (*card.modules, ModuleInfo(path="drop", class_name="Dropout")),
            "prefill": (*card.prefill, drop),
        }
    )
    nodes = (
        get("h.0"),
        Node(APPLY, (ModuleRef("drop"), Ref(0))),
        get("h.1", path=(0,)),
        Node("setitem", (Ref(1), ..., Ref(2))),
    )
    graph = Graph("m", (Trace((Invoke([[1] * T] * B),)),), nodes)
    with pytest.raises(OrderError, match=r"this edits h\.0\.output in place"):
        check(graph, card, [(B, T)], {})


def test_an_in_place_edit_of_a_clone_may_come_late() -> None:
    checked(
        get("h.0"),
        Node("torch.clone", (Ref(0),)),
        get("h.1", path=(0,)),
        Node("setitem", (Ref(1), ..., Ref(2))),
    )


def test_a_write_that_uses_an_edit_made_too_late_is_an_error() -> None:
    nodes = [
        Node("torch.zeros", ((B, T, HIDDEN),)),
        get("h.1", path=(0,)),
        Node("setitem", (Ref(0), ..., Ref(1))),
        put("h.0", Ref(0)),
    ]
    with pytest.raises(OrderError, match=r"needs h.1.output"):
        checked(*nodes)


def test_invokes_that_share_a_pass_may_exchange_values_both_ways_and_others_only_forwards() -> None:
    backwards = (get("h.0", invoke=1), put("h.0", Ref(0), invoke=0))
    assert checked(*backwards, invokes=2).timeline.packed == (True,)
    with pytest.raises(OrderError, match="one after another"):
        checked(*backwards, invokes=2, packs=False)
    forwards = (get("h.1", path=(0,), invoke=0), put("h.0", Ref(0), invoke=1))
    assert checked(*forwards, invokes=2, packs=False).timeline.packed == (False,)

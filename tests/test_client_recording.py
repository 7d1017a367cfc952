"""What a trace records: nodes, canonical arguments, sizes, and what is left out. No model runs here."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import pellucid
from client_fixtures import CardModel, refused
from pellucid._call import spellings
from pellucid._operators import BINARY, COMPARISONS, INPLACE, UNARY
from pellucid._tensor import _functions, _resolve
from pellucid_shared.errors import (
    EmptyPromptError,
    InputError,
    RecordingError,
    ShapeError,
    SiteError,
)
from pellucid_shared.graph import Graph, Invoke
from pellucid_shared.lint import lint
from pellucid_shared.show import show


def nothing(graph: Graph) -> dict[str, Any]:
    """Zeros for every saved name: these tests look at graphs."""
    return {name: torch.zeros(1) for name in graph.save_names().values()}


def written(body: Any, prompt: Any = "hello", **options: Any) -> str:
    """The nodes that ``body(model)`` records, as text, without the invokes' lines."""
    model = CardModel(answer=nothing, **options)
    with model.trace(prompt) as tracer:
        body(model)
    lint(tracer.graph)
    assert Graph.from_json(tracer.graph.to_json()) == tracer.graph
    return "\n".join(line.strip() for line in show(tracer.graph).splitlines()[2:])


def test_one_saved_layer_is_a_request_of_less_than_600_bytes() -> None:
    model = CardModel(answer=nothing)
    with model.trace("The Eiffel Tower is in the city of") as tracer:
        model.h[0].output.save()
    body = b'{"graph":' + tracer.graph.to_json() + b"}"
    assert len(body) < 600


def test_reads_writes_and_saves_become_nodes_in_program_order() -> None:
    def body(model: Any) -> None:
        h = model.h[0].output
        model.h[0].output = h * 2
        model.lm_head(model.h[1].output[0]).save("logits")

    assert written(body) == (
        "v0 = h.0.output\nv1 = v0 * 2\nh.0.output = v1\n"
        "v3 = h.1.output[0]\nv4 = lm_head(v3)\nsave(v4, 'logits')"
    )


def test_in_place_edits_write_the_value_and_nothing_twice() -> None:
    def body(model: Any) -> None:
        model.h[0].output[:, -1] = 0
        model.h[0].output[:, 0] *= 2
        model.h[0].output += 1

    assert written(body) == (
        "v0 = h.0.output\nv0[:, -1] = 0; v1 = v0\n"
        "v2 = h.0.output\nv3 = v2[:, 0]\nv4 = v3.mul_(2)\n"
        "v5 = h.0.output\nv6 = v5.add_(1)"
    )


def test_an_augmented_edit_of_gathered_elements_is_written_back() -> None:
    def body(model: Any) -> None:
        model.h[0].output[:, [0, 2]] += 1

    assert written(body).splitlines()[-1] == "v0[:, [0, 2]] = v1; v3 = v0"


def test_a_tuple_site_is_written_leaf_by_leaf_and_what_is_passed_along_is_left_alone() -> None:
    def whole(model: Any) -> None:
        model.h[1].output = (model.h[1].output[0] * 2, *model.h[1].output[1:])

    def joined(model: Any) -> None:
        old = model.h[1].output
        model.h[1].output = (old[0] * 2,) + old[1:]  # noqa: RUF005 (the old idiom)

    def member(model: Any) -> None:
        model.h[1].output[0] = model.h[1].output[0] * 2

    expected = "v0 = h.1.output[0]\nv1 = v0 * 2\nh.1.output[0] = v1"
    assert written(whole) == written(joined) == written(member) == expected


def test_a_structure_taken_before_a_replacement_keeps_what_was_there() -> None:
    def body(model: Any) -> None:
        old = model.h[1].output
        model.h[1].output[0] = 0
        pellucid.save(old[0])

    assert written(body) == "v0 = h.1.output[0]\nh.1.output[0] = 0\nsave(v0, 'saved_0')"


def test_fields_of_the_models_output_are_read_by_name_key_and_position() -> None:
    def by_name(model: Any) -> None:
        model.output.logits.save()

    def by_key(model: Any) -> None:
        model.output["logits"].save()

    def by_position(model: Any) -> None:
        model.output[0].save()

    assert written(by_name) == written(by_key) == written(by_position)
    assert written(by_name).startswith("v0 = model.output['logits']")


def test_inputs_are_the_first_argument_or_all_of_them() -> None:
    def body(model: Any) -> None:
        (first,), kwargs = model.h[1].inputs
        assert len(kwargs) == 0
        model.h[1].input = first * 0.5
        model.input.save("ids")

    assert written(body).splitlines() == [
        "v0 = h.1.input[0][0]",
        "v1 = v0 * 0.5",
        "h.1.input[0][0] = v1",
        "v3 = model.input[1]['input_ids']",
        "save(v3, 'ids')",
    ]


def test_one_meaning_has_one_spelling_however_it_was_written() -> None:
    def function(model: Any) -> None:
        torch.sum(model.h[0].output, dim=-1, dtype=None).save()

    def method(model: Any) -> None:
        model.h[0].output.sum(-1).save()

    def mixed(model: Any) -> None:
        torch.Tensor.sum(model.h[0].output, -1).save()

    assert written(function) == written(method) == written(mixed)


def test_literals_are_sent_once_and_named_by_their_bytes() -> None:
    vector = torch.linspace(-1, 1, 8, dtype=torch.bfloat16)
    model = CardModel(answer=nothing)
    with model.trace("hello") as tracer:
        h = model.h[0].output
        (h + vector).save()
        (h * vector.clone()).save()
        (h + np.ones(8, dtype=np.float32)).save()
        assert len(tracer._recorder.literals) == 2
    refs = [node.args[1] for node in tracer.graph.nodes if node.op in ("torch.add", "torch.mul")]
    assert refs[0] == refs[1] != refs[2]


def test_numbers_dtypes_and_devices_have_their_place() -> None:
    def body(model: Any) -> None:
        h = model.h[0].output
        h.to(torch.float64).to("cuda:0").to(h.device)
        h * np.float32(0.5)
        h * (1 + 2j)
        h * float("inf")

    lines = written(body).splitlines()
    assert lines[1] == "v1 = v0.to(torch.float64)"
    assert lines[2] == "v2 = v1.to('cuda:0')"
    assert lines[4:] == ["v4 = v0 * 0.5", "v5 = v0 * (1+2j)", "v6 = v0 * inf"]


def test_results_with_several_members_are_unpacked_by_place_and_by_name() -> None:
    def body(model: Any) -> None:
        h = model.h[0].output
        top = h.max(dim=-1)
        values, indices = top
        assert top.values is values
        assert top.indices is indices
        assert values.dtype is torch.float32
        assert indices.dtype is torch.int64

    assert written(body).splitlines() == [
        "v0 = h.0.output",
        "v1 = torch.max(v0, -1)",
        "v2 = v1[0]",
        "v3 = v1[1]",
    ]


def test_a_known_length_can_be_iterated_and_asked() -> None:
    model = CardModel(answer=nothing)
    with model.trace([[1, 2, 3], [4, 5, 6]]):
        h = model.h[0].output
        assert h.shape == (2, 3, 8)
        assert isinstance(h.shape, torch.Size)
        assert len(h) == h.size(0) == 2
        first, second = h
        assert first.shape == second.shape == (3, 8)
        assert (h.ndim, h.dim(), h.numel(), h.dtype) == (3, 3, 48, torch.float32)
        assert h.is_floating_point()
        assert torch.is_floating_point(h)
        assert not torch.is_complex(h)
        assert h.T.shape == (8, 3, 2)
        assert h.mT.shape == (2, 8, 3)
        assert h.device == torch.device("cpu")


def test_showing_a_value_records_nothing_and_says_site_shape_and_line() -> None:
    model = CardModel(answer=nothing)
    with model.trace("hello") as tracer:
        h = model.h[0].output
        before = len(tracer.graph.nodes)
        text = f"{h:.3f} {h!r} {h!s}"
        assert len(tracer.graph.nodes) == before
    assert text.count("<h.0.output [1, tokens, 8] float32, ") == 3
    assert "test_client_recording.py:" in text
    assert model.made.trips == []


def test_every_operator_has_its_op() -> None:
    names = {*BINARY.values(), *COMPARISONS.values(), *UNARY.values(), *INPLACE.values()}
    assert names <= set(spellings())
    assert {"torch.unbind", "torch.Tensor.permute", "torch.transpose", "torch.conj"} <= set(spellings())
    assert {"torch.real", "torch.imag"} <= set(spellings())


def test_every_spelling_of_the_registry_that_torch_has_is_recognised() -> None:
    """No function of torch stands for two ops, and none is missing from the table."""
    by_object: dict[int, str] = {}
    for name, op in spellings().items():
        found = _resolve(name) if name.startswith("torch.") else None
        if found is not None:
            assert by_object.setdefault(id(found), op.id) == op.id, name
            assert _functions()[id(found)] is op


def test_an_error_that_true_sizes_showed_cannot_be_caught_away() -> None:
    model = CardModel(answer=nothing)

    def body() -> None:
        h = model.h[0].output
        h[:, 7].save()
        with contextlib.suppress(IndexError):
            _ = h.shape

    refused(model, IndexError, "7", body)
    assert model.made.graphs == []


# --- sizes ------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_asked_only_where_a_size_depends_on_it() -> None:
    model = CardModel(answer=nothing)
    with model.trace("hello") as tracer:
        h = model.h[0].output
        assert h[:, -1].shape == (1, 8)
        assert h.size(-1) == 8
        assert (h.flatten(1).ndim, h.dtype) == (2, torch.float32)
        assert model.made.trips == []
        assert h.shape == (1, 5, 8)
        assert h.flatten(1).shape == (1, 40)
        assert model.made.trips == [["hello"]]
    assert tracer.graph.regions[0].invokes == (Invoke([4, 1, 8, 8, 11]),)


def test_text_stays_text_where_nothing_asked() -> None:
    model = CardModel(answer=nothing)
    with model.trace(["hello", "you"]) as tracer:
        model.h[0].output[:, -1].save()
    assert tracer.graph.regions[0].invokes == (Invoke(["hello", "you"]),)
    assert model.made.trips == []


def test_an_error_under_unknown_sizes_counts_only_if_the_true_ones_confirm_it() -> None:
    model = CardModel(answer=nothing)
    with model.trace() as tracer:
        with tracer.invoke("hello"):
            a = model.h[0].output
        with tracer.invoke("world"):
            assert (a + model.h[0].output).shape == (1, 5, 8)
    assert model.made.trips == [["hello", "world"]]

    def unequal() -> None:
        with tracer.invoke("hello"):
            a = model.h[0].output
        with tracer.invoke("you"):
            a + model.h[0].output

    with pytest.raises(ShapeError, match=r"\[1, 5, 8\] .*\[1, 3, 8\]") as caught, model.trace() as tracer:
        unequal()
    assert str(caught.value).startswith(f"{__file__}:")


def test_true_sizes_that_refute_an_earlier_line_name_that_line() -> None:
    model = CardModel(answer=nothing)

    def body() -> None:
        h = model.h[0].output
        h[:, 7]  # line of the fault
        _ = h.shape

    number = int(str(refused(model, IndexError, "7", body).where).rpartition(":")[2])
    assert "line of the fault" in Path(__file__).read_text().splitlines()[number - 1]


def test_here_the_tokenizer_costs_nothing_and_is_asked_at_once() -> None:
    model = CardModel(answer=nothing, distant=False)
    with model.trace("hello") as tracer:
        model.h[0].output.save()
    assert model.made.trips == [["hello"]]
    assert tracer.graph.regions[0].invokes == (Invoke("hello"),)


HI = {"role": "user", "content": "hi"}


# --- inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "invoke"),
    [
        ("hello", Invoke("hello")),
        (["a", "bc"], Invoke(["a", "bc"])),
        (("a", "bc"), Invoke(["a", "bc"])),
        ([1, 2], Invoke([1, 2])),
        ([[1, 2], [3]], Invoke([[1, 2], [3]])),
        (torch.tensor([1, 2]), Invoke([1, 2])),
        (torch.tensor([[1, 2]]), Invoke([[1, 2]])),
        (np.array([[1, 2]]), Invoke([[1, 2]])),
        ({"input_ids": [1, 2]}, Invoke([1, 2])),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[0, 1]])},
            Invoke([[1, 2]], [[0, 1]]),
        ),
        ([torch.tensor([1, 2]), torch.tensor([3])], Invoke([[1, 2], [3]])),
        ([np.int64(1), torch.tensor(2)], Invoke([1, 2])),
        (
            {"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[True, True]])},
            Invoke([[1, 2]], [[1, 1]]),
        ),
        ({"input_ids": [[1, 2]], "attention_mask": [[0.0, 1.0]]}, Invoke([[1, 2]], [[0, 1]])),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, Invoke([[1, 2]], [[1, 1]])),
        ({"input_ids": [[1, 2]], "attention_mask": None}, Invoke([[1, 2]])),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, 0]]}, Invoke([[1, 2]])),
        (BatchEncoding({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}), Invoke([[1, 2]], [[1, 1]])),
        ([{"role": "user", "content": "hi"}], Invoke([17, 4, 5])),
        (
            [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "o"}]],
            Invoke([[17, 4, 5], [17, 11]]),
        ),
    ],
)
def test_every_form_of_input_has_one_form_in_the_graph(given: Any, invoke: Invoke) -> None:
    model = CardModel(answer=nothing)
    with model.trace(given) as tracer:
        model.h[0].output.save()
    assert tracer.graph.regions[0].invokes == (invoke,)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("", EmptyPromptError, "the prompt is empty"),
        ([], EmptyPromptError, "the prompt is empty"),
        (["a", ""], EmptyPromptError, "prompt 1 of the batch is empty"),
        ([[1], []], EmptyPromptError, "the prompt is empty"),
        (torch.zeros(0, dtype=torch.int64), EmptyPromptError, "the prompt is empty"),
        (3, InputError, "found int"),
        ([0.5], InputError, "found 0.5 where a token id stands"),
        ([-1], InputError, "found -1"),
        ([True], InputError, "found True"),
        ({"ids": [1]}, InputError, "no 'ids'; a dict holds input_ids"),
        ({"attention_mask": [[1]]}, InputError, "holds input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, InputError, "one shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, InputError, "only 0 and 1"),
        (
            {"input_ids": [[1, 2]], "attention_mask": 1},
            InputError,
            "is rows of 0 and 1, found 1",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
            EmptyPromptError,
            "leaves no token",
        ),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, 1]]}, InputError, "no 'token_type_ids'"),
        ({"role": "user", "content": "hi"}, InputError, "a chat is a list of messages: write "),
        ([{"content": "hi"}], InputError, "a chat is a list of messages, .* found {'content': 'hi'}"),
        ([{"role": "user", "content": "hi"}, "hi"], InputError, "found 'hi'"),
        ([[{"role": "user", "content": "hi"}], []], EmptyPromptError, "chat 1 of the batch has no messages"),
        ([1] * 65, InputError, "the prompt has 65 tokens and m takes at most 64; shorten it"),
        ([50], InputError, "token id 50 is not in the vocabulary of m, which has 50"),
    ],
)
def test_inputs_that_cannot_be_used_say_why(given: Any, error: type[InputError], message: str) -> None:
    model = CardModel(answer=nothing)
    with pytest.raises(error, match=message) as caught, model.trace(given):
        pass
    assert str(caught.value).startswith(f"{__file__}:")
    assert model.made.graphs == []


def test_a_text_that_turns_out_too_long_names_both_numbers_where_it_was_counted() -> None:
    def body() -> None:
        _ = model.h[0].output.shape  # counted

    model = CardModel(answer=nothing)
    error = refused(model, InputError, "the prompt has 65 tokens and m takes at most 64", body, "a" * 65)
    number = int(str(error.where).rpartition(":")[2])
    assert "# counted" in Path(__file__).read_text().splitlines()[number - 1]
    here = CardModel(answer=nothing, distant=False)
    with pytest.raises(InputError, match="65 tokens and m takes at most 64"), here.trace("a" * 65):
        pass


def test_unknown_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no option 'remot'; it has remote, .*\. Nearest: remote"):
        CardModel().trace("hello", remot=True)


def test_a_trace_without_input_and_one_with_two_are_refused() -> None:
    model = CardModel()
    with pytest.raises(InputError, match="this trace has no input"), model.trace():
        pass
    with pytest.raises(InputError, match=r"takes one input, found 2; a batch is a list"):
        model.trace("a", "b")
    with pytest.raises(RecordingError, match="was given its input"), model.trace("a") as tracer:
        tracer.invoke("b")


# --- contexts ---------------------------------------------------------------------------------------------


def test_an_exception_in_the_block_passes_and_nothing_is_sent() -> None:
    model = CardModel()

    def body() -> None:
        model.h[0].output.save()
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError), model.trace("hello"):
        body()
    assert model.made.graphs == []
    with model.trace("hello"):  # the thread is free again
        pass


def test_sites_belong_to_an_invoke_and_traces_do_not_nest() -> None:
    model = CardModel()
    with pytest.raises(RecordingError, match=r"under `with tracer\.invoke"), model.trace():
        _ = model.h[0].output
    with pytest.raises(RecordingError, match="inside another"), model.trace("a"), model.trace("b"):
        pass
    with (
        pytest.raises(RecordingError, match="inside another"),
        model.trace() as tracer,
        tracer.invoke("a"),
        tracer.invoke("b"),
    ):
        pass
    with pytest.raises(RecordingError, match=r"under `with model.trace\(...\):`"):
        _ = model.h[0].output
    other = CardModel()
    with pytest.raises(RecordingError, match="belongs to m, and the open trace is of m"), model.trace("a"):
        _ = other.h[0].output


def test_threads_trace_at_once_without_seeing_each_other() -> None:
    model = CardModel(answer=nothing)
    gate = threading.Barrier(4)
    found: dict[int, str] = {}

    def work(index: int) -> None:
        with model.trace([[index] * 3]) as tracer:
            gate.wait(timeout=30)
            h = model.h[0].output
            for _ in range(index):
                h = h + torch.ones(8)
            gate.wait(timeout=30)
            h.save()
        found[index] = show(tracer.graph)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index in range(4):
        assert f"[[{index}, {index}, {index}]]" in found[index]
        assert found[index].count(" + ") == index


# --- warnings ---------------------------------------------------------------------------------------------


def test_a_literal_first_row_of_a_block_warns_with_both_spellings() -> None:
    model = CardModel(answer=nothing)
    match = r"write h.0.output; for the row write h.0.output\[0, :\]"
    with pytest.warns(UserWarning, match=match) as caught, model.trace("hello"):
        _ = model.h[0].output[0]
    assert caught[0].filename == __file__


def test_a_saved_name_that_shows_a_later_edit_warns_with_both_lines() -> None:
    model = CardModel(answer=nothing)

    def body() -> None:
        model.h[0].output.save()
        model.h[0].output[:] = 0

    match = r"h.0.output is saved here and edited in place at .*\.clone\(\)"
    with pytest.warns(UserWarning, match=match), model.trace("hello"):
        body()


# --- the user's own tensors ---------------------------------------------------------------------------------


def test_a_tensor_of_the_users_that_is_written_with_a_value_is_filled_after_the_block() -> None:
    model = CardModel(answer=lambda graph: {"saved_0": torch.tensor([1.0, 2.0])})
    mine = torch.tensor([7.0, 7.0])
    view = mine[:1]
    with model.trace("hello") as tracer:
        mine[0] = model.h[0].output.mean()
    assert type(mine) is torch.Tensor
    assert mine.tolist() == [1.0, 2.0]
    assert view.tolist() == [1.0]  # filled in place
    assert [node.op for node in tracer.graph.nodes] == [
        "site.get",
        "torch.mean",
        "torch.clone",
        "save",
        "setitem",
    ]


def test_a_tensor_of_the_users_comes_back_unchanged_where_the_run_failed() -> None:
    def fail(graph: Graph) -> dict[str, Any]:
        raise SiteError("no", node=1)

    mine = torch.tensor([7.0, 7.0])
    model = CardModel(answer=fail)
    with pytest.raises(SiteError) as caught, model.trace("hello"):
        mine[0] = model.h[0].output.mean()
    assert caught.value.where is not None
    assert type(mine) is torch.Tensor
    assert mine.tolist() == [7.0, 7.0]
    assert not set(vars(mine)) & {"_recorder", "_node", "_adopted"}


def test_a_tensor_that_wants_gradients_is_not_taken_over() -> None:
    mine = torch.zeros(2, requires_grad=True)
    model = CardModel()
    with pytest.raises(RecordingError, match=r"plain tensor without gradients"), model.trace("hello"):
        torch.Tensor.add_(mine, model.h[0].output.mean())

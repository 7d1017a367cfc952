"""The tokenizer of a served model, over real HTTP and a real Redis, beside the one of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hand_card import hand_card
from pellucid import LanguageModel
from pellucid_server import tokenizing
from pellucid_server.app import create_app
from pellucid_server.settings import Settings
from pellucid_shared.errors import EmptyPromptError, InputError, LimitError
from pellucid_worker.register import Registration
from redis_server import running_redis
from service import free_port

HERE = Path(__file__).parent
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def engine(name: str, tokenizer: Any) -> Any:
    """What a worker registers, without a model: the card of one that has this tokenizer's vocabulary."""
    card = hand_card(name).model_copy(update={"vocab_size": 49_152, "has_tokenizer": tokenizer is not None})
    text = tokenizer.backend_tokenizer.to_str() if tokenizer is not None else None
    return SimpleNamespace(card=card, tokenizer=tokenizer, tokenizer_json=text)


@pytest.fixture(scope="module")
def begins(theirs: Any) -> Any:
    """A tokenizer that begins every text with a special token."""
    tokenizer = AutoTokenizer.from_pretrained(theirs.name_or_path)
    special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    single = f"{tokenizer.bos_token} $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.fixture(scope="module")
def url(theirs: Any, begins: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store")
    with running_redis() as redis_url, redis.Redis.from_url(redis_url) as client:
        plain = AutoTokenizer.from_pretrained(theirs.name_or_path)
        plain.chat_template = None
        registered = [Registration(client, name, "nowhere") for name in ("smol", "plain", "begins", "none")]
        for one, tokenizer in zip(registered, (theirs, plain, begins, None), strict=True):
            one.ready(engine(one._model, tokenizer))
            client.zadd(one._workers, {"worker": time.time() + 3600})
        port = free_port()
        app = create_app(Settings(redis_url, store.as_uri()))
        config = uvicorn.Config(app, port=port, log_level="error", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def model(url: str) -> Any:
    return LanguageModel("smol", remote=url)


@pytest.fixture
def ours(model: Any) -> Any:
    return model.tokenizer


def listed(rows: Any) -> Any:
    return rows.tolist() if hasattr(rows, "tolist") else rows


# --- the same answers --------------------------------------------------------------------------------------


@QUIET
@given(text=st.text(min_size=1, max_size=40), special=st.booleans())
def test_text_and_ids_are_those_of_transformers(ours: Any, theirs: Any, text: str, special: bool) -> None:
    ids = theirs.encode(text, add_special_tokens=special)
    assert ours.encode(text, add_special_tokens=special) == ids
    assert ours(text, add_special_tokens=special)["input_ids"] == ids
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.tokenize(text) == theirs.tokenize(text)


@QUIET
@given(ids=st.lists(st.integers(0, 49_151), min_size=1, max_size=8), skip=st.booleans())
def test_every_id_is_decoded_as_by_transformers(ours: Any, theirs: Any, ids: list[int], skip: bool) -> None:
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.batch_decode([ids, ids[:1]], skip_special_tokens=skip) == theirs.batch_decode(
        [ids, ids[:1]], skip_special_tokens=skip
    )


def test_special_tokens_are_added_as_the_tokenizer_does_and_not_to_chats(url: str, begins: Any) -> None:
    model: Any = LanguageModel("begins", remote=url)
    ours, bos = model.tokenizer, begins.bos_token_id
    assert ours("Paris")["input_ids"] == begins("Paris")["input_ids"] == [bos, *ours.encode("Paris", False)]
    assert ours.encode("Paris", add_special_tokens=False) == begins.encode("Paris", add_special_tokens=False)
    with model.trace(["Paris", "Paris is"]) as tracer:
        assert model.h[0].output.shape == (2, 3, 8)
    assert tracer.graph.regions[0].invokes[0].input == begins(["Paris", "Paris is"])["input_ids"]
    wanted = begins.apply_chat_template(CHAT, return_dict=False)
    assert wanted[:2].count(bos) == 1
    assert ours.apply_chat_template(CHAT).input_ids == wanted
    with model.trace(CHAT) as tracer:
        pass
    assert tracer.graph.regions[0].invokes[0].input == wanted


def test_ids_come_in_every_form(ours: Any, theirs: Any) -> None:
    ids = theirs.encode(" Paris is")
    assert (
        ours.decode(torch.tensor(ids)) == ours.decode(np.array(ids)) == ours.decode(tuple(ids)) == " Paris is"
    )
    assert ours.decode([torch.tensor(i) for i in ids]) == " Paris is"
    assert ours.decode(torch.tensor(ids[0])) == ours.decode(ids[0]) == " Paris"
    assert ours.decode(torch.tensor([ids, ids])) == ours.decode([ids, ids]) == [" Paris is"] * 2
    assert ours.batch_decode(torch.tensor([ids])) == [" Paris is"]
    assert ours.batch_decode(ids) == theirs.batch_decode([[i] for i in ids])
    assert ours.convert_ids_to_tokens(ids[0]) == theirs.convert_ids_to_tokens(ids[0])
    assert ours.decode([]) == theirs.decode([]) == ""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": "longest", "return_tensors": "np"},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "max_length": 3, "truncation": True, "return_tensors": "pt"},
        {"truncation": True, "max_length": 2},
        {"padding": True, "add_special_tokens": False},
    ],
)
def test_batches_are_padded_as_by_transformers(ours: Any, theirs: Any, side: str, options: Any) -> None:
    texts = ["The Eiffel Tower is in the city of", "Paris"]
    ours.padding_side, before = side, theirs.padding_side
    theirs.padding_side = side
    try:
        found, wanted = ours(texts, **options), theirs(texts, **options)
    finally:
        theirs.padding_side = before
    assert set(found) == {"input_ids", "attention_mask"} <= set(wanted)
    for name in found:
        assert type(found[name]) is type(wanted[name])
        assert listed(found[name]) == listed(wanted[name])
    assert found.input_ids is found["input_ids"]


def test_one_text_as_a_tensor_is_one_row(ours: Any, theirs: Any) -> None:
    found = ours("Paris is", return_tensors="pt").to("cpu")
    assert torch.equal(found.input_ids, theirs("Paris is", return_tensors="pt").input_ids)
    assert found.input_ids.dtype is torch.int64
    assert ours("Paris is", return_tensors="np").input_ids.shape == (1, 2)


def test_what_a_tokenizer_knows_of_itself(ours: Any, theirs: Any) -> None:
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert ours.padding_side == theirs.padding_side
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)


@pytest.mark.parametrize("chat", [CHAT, CHAT[:2], CHAT[1:2], [CHAT, CHAT[:2]]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenize": False},
        {"tokenize": False, "add_generation_prompt": True},
        {"return_dict": False},
        {"add_generation_prompt": True, "padding": True, "return_tensors": "pt"},
    ],
)
def test_chats_are_rendered_as_by_transformers(ours: Any, theirs: Any, chat: Any, options: Any) -> None:
    found, wanted = ours.apply_chat_template(chat, **options), theirs.apply_chat_template(chat, **options)
    if isinstance(found, dict):
        assert listed(found.input_ids) == listed(wanted.input_ids)
    else:
        assert found == wanted


#: A template that uses what templates of the hub use beyond plain Jinja.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 9 %}{% break %}{% endif %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{% if m.extra is defined %}{{ m.extra | tojson }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


def test_templates_may_use_what_those_of_the_hub_use(theirs: Any) -> None:
    from pellucid_shared.wire import TokenizerInfo
    from pellucid_worker.register import _tokenizer_info

    assert isinstance(_tokenizer_info(None), TokenizerInfo)
    backend = type(theirs.backend_tokenizer).from_str(theirs.backend_tokenizer.to_str())
    ours = tokenizing.ModelTokenizer(hand_card("m"), backend, TEMPLATE, _tokenizer_info(theirs))
    chat = [
        {"role": "user", "content": "<b>", "extra": {"b": ["é", 1, None], "a": "<"}, "tool_calls": None},
        {"role": "assistant", "content": " yes "},
    ]
    for options in ({}, {"enable_thinking": True}, {"tools": [{"name": "f", "parameters": {}}]}):
        wanted = theirs.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False, **options)
        assert ours.render([chat], {"add_generation_prompt": False, **options}) == [wanted]
    with pytest.raises(InputError, match="the chat template of m refuses these messages: no tools here"):
        ours.render([[{"role": "tool", "content": "x"}]], {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% set x = 1 %",
    ],
)
def test_a_template_cannot_leave_its_sandbox(theirs: Any, template: str) -> None:
    from pellucid_shared.wire import TokenizerInfo

    backend = type(theirs.backend_tokenizer).from_str(theirs.backend_tokenizer.to_str())
    ours = tokenizing.ModelTokenizer(hand_card("m"), backend, template, TokenizerInfo())
    with pytest.raises(InputError, match="the chat template of m refuses these messages: "):
        ours.render([CHAT], {})


def test_a_chat_that_grows_too_long_is_stopped(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid_shared.wire import TokenizerInfo

    monkeypatch.setattr(tokenizing, "MAX_RENDERED", 1000)
    backend = type(theirs.backend_tokenizer).from_str(theirs.backend_tokenizer.to_str())
    template = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}"
    ours = tokenizing.ModelTokenizer(hand_card("m"), backend, template, TokenizerInfo())
    with pytest.raises(LimitError, match="the chat is over 1000 characters as the template of m writes it"):
        ours.render([CHAT], {})


# --- prompts -----------------------------------------------------------------------------------------------


def test_chats_as_prompts_become_the_templates_ids(model: Any, theirs: Any) -> None:
    question = theirs.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    answered = theirs.apply_chat_template(CHAT, return_dict=False)
    for prompt, wanted in ((CHAT[:2], question), (CHAT, answered), ([CHAT, CHAT[:2]], [answered, question])):
        with model.trace(prompt) as tracer:
            assert (
                model.h[0].output.shape[1] == len(wanted) if prompt[0] is not CHAT else max(map(len, wanted))
            )
        assert tracer.graph.regions[0].invokes[0].input == wanted


def test_encodings_of_a_tokenizer_are_prompts(model: Any, ours: Any, theirs: Any) -> None:
    texts = ["The Eiffel Tower is", "Paris"]
    for tokenizer in (ours, theirs):
        for kind in ("pt", "np", None):
            with model.trace(tokenizer(texts, padding=True, return_tensors=kind)) as tracer:
                assert model.h[0].output.shape == (2, 5, 8)
                first = model.h[0].output.t[0]
                assert first.shape == (2, 8)
            (invoke,) = tracer.graph.regions[0].invokes
            assert invoke.mask is not None
            assert list(map(sum, invoke.mask)) == [5, 1]


# --- errors ------------------------------------------------------------------------------------------------


def test_answers_are_asked_for_once(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    post = ours._connection.post_json
    monkeypatch.setattr(
        ours._connection, "post_json", lambda path, body: asked.append((path, body)) or post(path, body)
    )
    for _ in range(2):
        ours(["a", "b"])
        ours(["b", "c"])
        ours.decode([1, 2])
        ours.convert_ids_to_tokens([1, 2])
        ours.apply_chat_template(CHAT)
    assert [(path.rpartition("/")[2], body.get("text")) for path, body in asked] == [
        ("tokenize", ["a", "b"]),
        ("tokenize", ["c"]),
        ("detokenize", None),
        ("chat", None),
    ]


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda t: t(3), InputError, "a tokenizer takes a str or a list of str, found 3"),
        (
            lambda t: t(["a b", "c"], return_tensors="pt"),
            InputError,
            r"rows of \[2, 1\] tokens are not one",
        ),
        (lambda t: t("a", return_tensors="tf"), InputError, "return_tensors is 'np' or 'pt', found 'tf'"),
        (
            lambda t: t("a", padding="max_length"),
            InputError,
            "with max_length=; found 'max_length'",
        ),
        (lambda t: t("a", truncation=True), InputError, "truncation=True goes with max_length="),
        (lambda t: t.decode("a"), InputError, "token ids are whole numbers, lists or tensors"),
        (lambda t: t.decode([0.5]), InputError, "token ids are whole numbers"),
        (
            lambda t: t.decode([99_999]),
            InputError,
            "token id 99999 is not in the vocabulary of smol",
        ),
        (lambda t: t.decode([-1]), InputError, "token id -1"),
        (
            lambda t: setattr(t, "pad_token", "not one token"),
            InputError,
            "pad_token is one token of",
        ),
        (lambda t: setattr(t, "padding_side", "top"), InputError, "padding_side is 'left' or 'right'"),
        (lambda t: t.apply_chat_template("hello"), InputError, "a chat is a list of messages"),
        (lambda t: t.apply_chat_template([{"content": "x"}]), InputError, "found {'content': 'x'}"),
        (
            lambda t: t.apply_chat_template([CHAT, []]),
            EmptyPromptError,
            "chat 1 of the batch has no",
        ),
        (lambda t: t.apply_chat_template(CHAT, tools=[print]), InputError, "plain JSON values only"),
        (lambda t: t.apply_chat_template([{"role": "user"}]), InputError, "template of smol refuses these"),
    ],
)
def test_what_a_tokenizer_does_not_take_says_why_at_the_users_line(
    ours: Any, use: Any, error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        use(ours)
    assert str(caught.value).startswith(f"{__file__}:")


def test_many_texts_are_asked_for_in_parts(ours: Any, theirs: Any) -> None:
    texts = [f"text {i}" for i in range(5000)]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_a_pad_token_may_be_chosen(url: str, theirs: Any) -> None:
    ours = LanguageModel("smol", remote=url).tokenizer
    ours.pad_token = "<|endoftext|>"
    assert ours.pad_token_id == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.special_tokens_map["pad_token"] == "<|endoftext|>"
    assert ours(["a b", "c"], padding=True).input_ids[1].count(ours.pad_token_id) == 1


def test_names_a_served_tokenizer_does_not_have_point_to_transformers(ours: Any) -> None:
    assert not hasattr(ours, "save_pretrained")
    with pytest.raises(AttributeError, match=r"no 'train'; it has encode, .*transformers.AutoTokenizer"):
        _ = ours.train


def test_models_without_a_tokenizer_or_a_template_say_so(url: str) -> None:
    none, plain = (LanguageModel(name, remote=url) for name in ("none", "plain"))
    with pytest.raises(InputError, match="none has no tokenizer; give it token ids"):
        none.tokenizer("a")
    with pytest.raises(InputError, match="none has no tokenizer"):
        _ = none.tokenizer.eos_token
    with (
        pytest.raises(InputError, match="plain has no chat template; give it text") as caught,
        plain.trace(CHAT),
    ):
        pass
    assert str(caught.value).startswith(f"{__file__}:")
    assert plain.tokenizer("a").input_ids


@pytest.mark.parametrize(
    ("route", "body", "status", "slug", "text"),
    [
        ("tokenize", {"text": 7}, 400, "bad-request", "body.text"),
        ("tokenize", {"text": ["a"] * 5000}, 400, "bad-request", "at most 4096 items"),
        ("detokenize", {"ids": [1]}, 400, "bad-request", "body.ids.0"),
        ("detokenize", {"ids": [[2**70]]}, 422, "bad-input", "token id"),
        ("detokenize", b"{", 400, "bad-request", "body: Invalid JSON"),
        ("chat", {"chats": [["x"]]}, 400, "bad-request", "body.chats.0.0"),
        ("chat", {"chats": [[{"role": 1}]]}, 422, "bad-input", "refuses these messages"),
        ("chat", {"chats": [CHAT], "options": {"messages": [], "self": 1}}, 200, "", ""),
        ("tokenize", b'{"text": "' + b"x" * 2**23 + b'"}', 413, "over-limit", "at most 4194304"),
    ],
)
def test_requests_that_cannot_be_answered_are_problems(
    url: str, route: str, body: Any, status: int, slug: str, text: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/models/smol/{route}", content=content, headers=headers)
    assert answer.status_code == status, answer.text[:300]
    if slug:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["type"] == f"urn:pellucid:{slug}"
        assert text in answer.json()["detail"]


def test_routes_of_a_tokenizer_are_not_models(url: str) -> None:
    for route in ("tokenize", "detokenize", "chat"):
        assert httpx.get(f"{url}/v1/models/smol/{route}").status_code == 405
    assert httpx.get(f"{url}/v1/models/nobody/tokenizer").status_code == 404
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    schema = paths["/v1/models/{model_id}/chat"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert "chats" in schema["properties"]


def test_where_torch_and_transformers_are_missing_the_tokenizer_answers(url: str, theirs: Any) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r}); import client_bodies; client_bodies.hide_torch()
from pellucid import LanguageModel
from pellucid_shared.errors import MissingExtraError
t = LanguageModel("smol", remote={url!r}).tokenizer
batch = t(["The Eiffel Tower", "Paris"], padding=True, return_tensors="np")
assert type(batch.input_ids).__name__ == "ndarray"
try:
    t("a", return_tensors="pt")
except MissingExtraError as error:
    assert "'np' gives arrays" in str(error)
else:
    raise AssertionError
assert not {{"torch", "transformers", "tokenizers"}} & set(sys.modules)
print(batch.input_ids.tolist(), t.decode(batch.input_ids[1]), t.eos_token)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    batch = theirs(["The Eiffel Tower", "Paris"], padding=True)["input_ids"]
    assert done.stdout.strip() == f"{batch} {theirs.decode(batch[1])} {theirs.eos_token}"

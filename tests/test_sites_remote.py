"""Skips, logs, parameters, originals and stops on a server: the same as in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pellucid
from pellucid_shared.errors import PellucidError
from pellucid_shared.wire import Event
from references import capture, first, forward
from service import running_service

pytestmark = pytest.mark.xdist_group("sites-service")

IDS = [[5, 9, 31, 7, 22, 40]]
BATCH = [[11, 3, 8, 12], [4, 15, 16, 7]]
NO_EOS: dict[str, Any] = {"eos_token_id": []}


@pytest.fixture(scope="module")
def service(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service({"llama": tiny_folders["llama"]}, tmp_path_factory.mktemp("sites")) as url:
        yield url


@pytest.fixture(scope="module")
def plain(tiny_folders: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folders["llama"], dtype="auto").eval()


@pytest.fixture(scope="module")
def remote(service: str) -> Any:
    return pellucid.LanguageModel("llama", remote=service)


@pytest.fixture(scope="module")
def local(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


@pytest.fixture(params=["local", "remote"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def events_of(job: Any) -> list[Event]:
    """All events of a job that has completed."""
    found = []
    for event in job.events():
        found.append(event)
        if event.type == "state" and event.data["state"] == "completed":
            return found
    raise AssertionError("the stream ended before the job")


def test_skips_parameters_and_originals(model: Any, plain: Any) -> None:
    saved = []
    with model.trace() as tracer:
        for number, ids in enumerate((IDS, BATCH)):
            with tracer.invoke(ids):
                if number:
                    model.layers[1].skip(model.layers[1].input)
                norm = model.norm.output
                unembedded = (norm @ model.lm_head.weight.T).save()
                norm[:, -1] = 0
                saved.append((unembedded, norm.original.save(), model.lm_head.output.save()))
    for number, (ids, (unembedded, original, logits)) in enumerate(zip((IDS, BATCH), saved, strict=True)):
        h = capture(plain, torch.tensor(ids), "model.layers.0" if number else "model.layers.1")
        with torch.no_grad():
            wanted = plain.model.norm(h)
            torch.testing.assert_close(original, wanted, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(unembedded, plain.lm_head(wanted), atol=1e-5, rtol=1e-4)
            wanted[:, -1] = 0
            torch.testing.assert_close(logits, plain.lm_head(wanted), atol=1e-5, rtol=1e-4)


def test_what_is_logged_is_printed_here_and_kept_with_the_job(remote: Any, local: Any, capsys: Any) -> None:
    lines = []
    for model in (local, remote):
        with model.generate(IDS, max_new_tokens=3, progress=False, **NO_EOS) as tracer:
            tracer.print("begins")
            with tracer.all():
                tracer.log("last", model.layers[1].output[:, -1], model.lm_head.output.argmax(-1)[0, -1])
            result = tracer.result.save()
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0][0] == lines[1][0] == "begins"
    assert [len(text) for text in lines] == [4, 4]
    assert [text.split()[-1] for text in lines[1][1:]] == [str(int(i)) for i in result[0, 6:]]
    found = events_of(tracer.job)
    logs = [event for event in found if event.type == "log"]
    assert [event.data["text"] for event in logs] == lines[1]
    assert [event.data["step"] for event in logs] == [0, 0, 1, 2]
    assert {event.attempt for event in logs} == {1}
    tensor = logs[1].data["parts"][1]["tensor"]
    assert (tensor["shape"], len(tensor["values"])) == ([1, 32], 32)
    tokens = [event.data for event in found if event.type == "token"]
    assert [t["ids"]["0"][0] for t in tokens] == result[0, 6:].tolist()


def test_tokens_are_told_only_where_the_result_is_wanted(remote: Any) -> None:
    with remote.generate(IDS, max_new_tokens=3, **NO_EOS) as tracer, tracer.iter[1]:
        remote.layers[0].output.save()
    assert {event.type for event in events_of(tracer.job)} == {"state"}


def test_a_log_alone_runs_and_a_stop_ends_its_pass(model: Any, plain: Any, capsys: Any) -> None:
    with model.trace(IDS) as tracer:
        h = model.layers[0].output
        tracer.stop()
        tracer.log(h.sum())
    wanted = capture(plain, torch.tensor(IDS), "model.layers.0").sum().item()
    assert float(capsys.readouterr().out) == pytest.approx(wanted, abs=1e-3)


def test_errors_are_the_same_and_name_the_line(model: Any) -> None:
    match = r"sites_remote.py:\d+: .*mlp.output is inside model.layers.1"
    with pytest.raises(PellucidError, match=match), model.trace(IDS):
        model.layers[1].skip(0)
        model.layers[1].mlp.output.save()


def test_the_gateway_checks_what_the_client_did_not(remote: Any, local: Any) -> None:
    """A graph written by hand, as another client might send it."""
    with local.trace(IDS) as tracer:
        local.layers[1].skip(0)
        local.lm_head.output.save()
    graph = tracer.graph.to_json().replace(b'"module":"lm_head"', b'"module":"model.layers.1.mlp"')
    connection = remote._target(None).connection
    with pytest.raises(PellucidError, match=r"inside model.layers.1, which is skipped") as caught:
        connection.submit(pellucid.Graph.from_json(graph), {})
    assert caught.value.node == 1


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_draws_the_same_here_and_there(remote: Any, local: Any, plain: Any, seed: int) -> None:
    found = []
    for model in (local, remote):
        drawn = []
        with model.trace(seed=seed) as tracer:
            for ids in (IDS, BATCH):
                with tracer.invoke(ids):
                    noise = torch.randn_like(model.layers[0].output)
                    model.layers[0].output += noise
                    drawn += [noise.save(), torch.rand(3).save(), model.lm_head.output.save()]
        with model.generate(IDS, max_new_tokens=4, do_sample=True, seed=seed, **NO_EOS) as tracer:
            drawn.append(tracer.result.save())
        found.append(drawn)
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)
    generator = torch.Generator().manual_seed(seed)
    for place in (1, 4):  # what needs no site is drawn before the pass
        assert torch.equal(found[1][place], torch.rand(3, generator=generator))
    assert torch.equal(found[1][0], torch.randn(1, 6, 32, generator=generator))
    wanted = forward(
        plain, torch.tensor(IDS), after={"model.layers.0": lambda h: first(h) + found[1][0]}
    ).logits
    torch.testing.assert_close(found[1][2], wanted, atol=1e-5, rtol=1e-4)

"""Claims, leases and the fence around them, with a real Redis: a late attempt changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from graphs import Program
from pellucid_shared import keyspace
from pellucid_shared.wire import JobState, ResultInfo, TokenizedInvoke
from pellucid_worker.jobs import Claim, Jobs, Release
from redis_server import running_redis
from worker_process import Desk

RESULT = ResultInfo(key="results/x", bytes=3, names=["h"])
PROBLEM = {"type": "urn:pellucid:execution-failed", "detail": "no"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running_redis() as url:
        found = Desk(url, tmp_path_factory.mktemp("store").as_uri())
        yield found
        found.close()


@pytest.fixture
def jobs(desk: Desk) -> Iterator[Jobs]:
    with redis.Redis.from_url(desk.redis_url) as client:
        yield Jobs(client, "m")


@pytest.fixture
def job(desk: Desk) -> str:
    """A queued job."""
    program = Program("m")
    program.save(program.get("h.0"), "h")
    return desk.write(program.graph(), [[[1, 2, 3]]])


def claimed(jobs: Jobs, job: str) -> Claim:
    claim = jobs.claim(job)
    assert claim is not None
    return claim


def everything(desk: Desk, job: str) -> Any:
    """All that Redis holds of a job."""
    waiting = desk.redis.zscore(keyspace.model_waiting("m"), job)
    return desk.redis.hgetall(keyspace.job(job)), desk.events(job), desk.lease(job), waiting


def test_a_claim_takes_a_queued_job_under_a_lease(desk: Desk, jobs: Jobs, job: str) -> None:
    before = time.time()
    assert jobs.claim(job) == Claim(job, 1)
    assert (desk.state(job), desk.field(job, "attempt")) == (JobState.RUNNING, "1")
    assert (desk.lease(job) or 0) >= before + keyspace.LEASE_SECONDS
    assert before - 0.001 <= desk.field(job, "times")["running"] <= time.time()  # Lua keeps 14 digits
    assert desk.events(job) == [("state", "1", {"state": "running"})]
    assert job not in desk.redis.zrange(keyspace.model_waiting("m"), 0, -1)
    work = jobs.work(job)
    assert work.inputs == (TokenizedInvoke(ids=[[1, 2, 3]]),)
    assert json.loads(work.graph)["model"] == "m"


def test_a_job_under_a_lease_is_not_to_be_had(desk: Desk, jobs: Jobs, job: str) -> None:
    claimed(jobs, job)
    before = everything(desk, job)
    assert jobs.claim(job) is None
    assert everything(desk, job) == before


def test_a_job_whose_lease_ran_out_is_claimed_once_more_and_no_more(desk: Desk, jobs: Jobs, job: str) -> None:
    claimed(jobs, job)
    desk.expire(job)
    assert jobs.claim(job) == Claim(job, 2)
    assert (desk.lease(job) or 0) > time.time()
    assert desk.states(job) == ["running", "running"]
    desk.expire(job)
    assert jobs.claim(job) is None


@pytest.mark.parametrize(
    "write",
    [
        lambda jobs, claim: jobs.complete(claim, RESULT),
        lambda jobs, claim: jobs.fail(claim, PROBLEM),
        lambda jobs, claim: jobs.cancelled(claim, PROBLEM),
        lambda jobs, claim: jobs.event(claim, "log", {"x": 1}),
        lambda jobs, claim: jobs.release(claim),
        lambda jobs, claim: jobs.renew([claim]),
    ],
    ids=["complete", "fail", "cancelled", "event", "release", "renew"],
)
@pytest.mark.parametrize("done", [False, True], ids=["while the other runs", "when the other is done"])
def test_a_late_attempt_changes_nothing(
    desk: Desk, jobs: Jobs, job: str, write: Callable[[Jobs, Claim], Any], done: bool
) -> None:
    late = claimed(jobs, job)
    desk.expire(job)
    current = claimed(jobs, job)
    if done:
        assert jobs.complete(current, RESULT)
    before = everything(desk, job)
    assert write(jobs, late) in (False, None, Release.LOST, ([late], []))
    assert everything(desk, job) == before


def test_a_job_ends_once(desk: Desk, jobs: Jobs, job: str) -> None:
    claim = claimed(jobs, job)
    assert jobs.complete(claim, RESULT)
    before = everything(desk, job)
    assert not jobs.fail(claim, PROBLEM)
    assert not jobs.complete(claim, RESULT)
    assert jobs.release(claim) is Release.LOST
    assert jobs.claim(job) is None
    assert everything(desk, job) == before
    assert (desk.state(job), desk.field(job, "result")) == (JobState.COMPLETED, RESULT.model_dump())
    assert desk.lease(job) is None


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_ends_badly_says_why(desk: Desk, jobs: Jobs, job: str, state: str) -> None:
    claim = claimed(jobs, job)
    assert (jobs.fail if state == "failed" else jobs.cancelled)(claim, PROBLEM)
    assert (desk.state(job).value, desk.field(job, "error")) == (state, PROBLEM)
    assert desk.events(job)[-1] == ("state", "1", {"state": state, "error": PROBLEM})
    assert set(desk.field(job, "times")) == {"received", "queued", "running", state}


def test_an_event_is_kept_under_its_attempt(desk: Desk, jobs: Jobs, job: str) -> None:
    claim = claimed(jobs, job)
    jobs.event(claim, "progress", {"what": "x", "fraction": 0.5})
    assert desk.events(job)[-1] == ("progress", "1", {"what": "x", "fraction": 0.5})
    assert 0 < desk.redis.ttl(keyspace.job_events(job)) <= keyspace.JOB_TTL_SECONDS


def test_renewing_moves_the_lease_and_hears_of_a_cancel(desk: Desk, jobs: Jobs, job: str) -> None:
    claim = claimed(jobs, job)
    desk.redis.zadd(keyspace.LEASES, {job: time.time() + 1})
    assert jobs.renew([claim]) == ([], [])
    assert (desk.lease(job) or 0) > time.time() + keyspace.LEASE_SECONDS - 5
    desk.cancel(job)
    assert desk.state(job) is JobState.RUNNING
    assert jobs.renew([claim]) == ([], [claim])


def test_a_released_job_waits_again(desk: Desk, jobs: Jobs, job: str) -> None:
    assert jobs.release(claimed(jobs, job)) is Release.QUEUED
    assert (desk.state(job), desk.lease(job)) == (JobState.QUEUED, None)
    assert job in desk.redis.zrange(keyspace.model_waiting("m"), 0, -1)
    assert desk.states(job) == ["running", "queued"]
    assert jobs.claim(job) == Claim(job, 2)


def test_a_job_that_is_to_be_cancelled_is_not_released(desk: Desk, jobs: Jobs, job: str) -> None:
    claim = claimed(jobs, job)
    desk.cancel(job)
    assert jobs.release(claim) is Release.CANCEL
    assert desk.state(job) is JobState.RUNNING
    desk.expire(job)
    assert jobs.claim(job) == Claim(job, 2, cancel=True)


def test_a_cancelled_or_unknown_job_is_not_to_be_had(desk: Desk, jobs: Jobs, job: str) -> None:
    desk.cancel(job)
    before = everything(desk, job)
    assert jobs.claim(job) is None
    assert jobs.claim("nosuchjob") is None
    assert everything(desk, job) == before
    assert not desk.redis.exists(keyspace.job("nosuchjob"))

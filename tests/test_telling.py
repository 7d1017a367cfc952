"""What a run tells, on its way to the job's event log, with a real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from graphs import Program
from pellucid_worker.jobs import Claim, Jobs
from pellucid_worker.telling import Telling
from redis_server import running_redis
from worker_process import Desk


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running_redis() as url:
        found = Desk(url, tmp_path_factory.mktemp("store").as_uri())
        yield found
        found.close()


def test_only_the_attempt_that_has_the_job_tells(desk: Desk) -> None:
    program = Program("m")
    program.save(program.get("h.0"), "h")
    job = desk.write(program.graph(), [[[1, 2, 3]]])
    with redis.Redis.from_url(desk.redis_url) as client:
        jobs = Jobs(client, "m")
        first = jobs.claim(job)
        assert first is not None
        Telling(jobs, first)("log", {"text": "once"})
        desk.expire(job)
        second = jobs.claim(job)
        assert second is not None
        Telling(jobs, first)("log", {"text": "late"})
        Telling(jobs, second)("token", {"step": 0})
    told = [event for event in desk.events(job) if event[0] != "state"]
    assert told == [("log", "1", {"text": "once"}), ("token", "2", {"step": 0})]


def test_a_redis_that_is_gone_costs_the_events_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with redis.Redis(port=1) as client:
        telling = Telling(Jobs(client, "m"), Claim("j", 1))
        telling("log", {"text": "lost"})
        telling("log", {"text": "lost too"})
    assert [record.getMessage() for record in caplog.records] == [
        "job j: Redis is lost, and so are this run's events"
    ]

"""Names in Redis and in the result store, in one place: the gateway and the workers meet here.

Redis (all keys begin with ``pellucid:``):

    job:{id}            hash    the record: model state attempt times error result graph_sha256 inputs cancel
    job:{id}:graph      string  canonical graph JSON
    job:{id}:events     stream  fields: type attempt time data(JSON)
    leases              zset    job id -> Unix time its lease expires
    model:{id}          hash    the deployment: source state progress error card tokenizer (JSON)
                                chat_template tokenizer_info (JSON)
    model:{id}:workers  zset    worker id -> Unix time of its last heartbeat
    model:{id}:waiting  zset    job id -> time it was queued
    models              set     ids of deployments

Every write by a worker is fenced: it takes effect only while the record's ``attempt`` is the worker's own.
"""

from __future__ import annotations

PREFIX = "pellucid:"
MODELS = PREFIX + "models"
LEASES = PREFIX + "leases"

LEASE_SECONDS = 15.0
HEARTBEAT_SECONDS = 1.0
MAX_ATTEMPTS = 2
JOB_TTL_SECONDS = 24 * 3600
EVENTS_KEPT = 2000

#: The one Celery task.
TASK = "pellucid.run_job"


def job(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def job_graph(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}:graph"


def job_events(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}:events"


def model(model_id: str) -> str:
    return f"{PREFIX}model:{model_id}"


def model_workers(model_id: str) -> str:
    return f"{PREFIX}model:{model_id}:workers"


def model_waiting(model_id: str) -> str:
    return f"{PREFIX}model:{model_id}:waiting"


def queue(model_id: str) -> str:
    """The Celery queue of a model's deployment."""
    return f"pellucid.model.{model_id}"


def upload(job_id: str) -> str:
    """Store key of the tensors a job came with."""
    return f"uploads/{job_id}.safetensors"


def result(job_id: str, attempt: int) -> str:
    """Store key of the result one attempt writes; the record says which attempt counts."""
    return f"results/{job_id}.{attempt}.safetensors"

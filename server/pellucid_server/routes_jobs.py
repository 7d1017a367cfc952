"""/v1/jobs: create, show, follow, fetch, cancel."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from sse_starlette import EventSourceResponse

from pellucid_shared import keyspace
from pellucid_shared.errors import JobError, JobNotFoundError, PellucidError
from pellucid_shared.packing import unpack_tensors
from pellucid_shared.wire import SAFETENSORS_TYPE, JobRecord, JobRequest, JobState

from .admission import Admitted, admit, read_graph
from .body import Body, read_body
from .deployments import Model
from .events import check_event_id, follow
from .state import Shared

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": JobRequest.model_json_schema(),
                "example": {
                    "graph": {
                        "version": 1,
                        "model": "smollm2",
                        "regions": [{"kind": "trace", "invokes": [{"input": "The Eiffel Tower is in"}]}],
                        "nodes": [
                            {"op": "site.get", "args": [{"site": {"module": "model.layers.10"}}]},
                            {"op": "save", "args": [{"ref": 0}]},
                        ],
                    }
                },
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "properties": {
                        "request": {"type": "string", "description": "the JSON request"},
                        "tensors": {"type": "string", "format": "binary", "description": "safetensors"},
                    },
                }
            },
        },
    }
}


@router.post("", status_code=202, openapi_extra=_REQUEST_BODY)
async def create(request: Request, response: Response, state: Shared) -> JobRecord:
    """Queue an experiment. 422 where its graph is wrong: ``node`` names the node."""
    body = await read_body(request, state.settings.max_body)
    graph = await asyncio.to_thread(read_graph, body.request)
    model = await state.deployments.get(graph.model)
    admitted = await asyncio.to_thread(_admitted, graph, model, body)
    job = state.jobs.new_id()
    if body.tensors:
        await state.store.put(keyspace.upload(job), body.tensors)
    record = await state.jobs.create(job, admitted)
    state.metrics.admitted.labels(graph.model).inc()
    response.headers["Location"] = f"/v1/jobs/{job}"
    return record


@router.get("/{job}")
async def show(job: str, state: Shared) -> JobRecord:
    """A job's record, with its place in the queue while it waits."""
    return await state.jobs.show(job)


@router.get("/{job}/events", response_class=EventSourceResponse)
async def events(
    job: str, state: Shared, last_event_id: Annotated[str | None, Header()] = None
) -> EventSourceResponse:
    """The job's events as they happen, from Last-Event-ID on, to its end (server-sent events)."""
    after = check_event_id(last_event_id)
    await state.jobs.show(job)
    return EventSourceResponse(follow(state.redis, state.jobs, job, after), ping=15)


@router.get("/{job}/result", response_class=StreamingResponse)
async def result(job: str, state: Shared) -> StreamingResponse:
    """The saved values: safetensors, the structure in its metadata. 409 while the job is not completed."""
    record = await state.jobs.show(job)
    if record.error is not None:
        raise PellucidError.from_problem(record.error)
    if record.state is not JobState.COMPLETED or record.result is None:
        raise JobError(f"the job is {record.state.value}; its result is there once it is completed")
    try:
        chunks = await state.store.stream(record.result.key)
    except FileNotFoundError:
        raise JobNotFoundError(f"the result of job {job} is no longer kept") from None
    headers = {"Content-Length": str(record.result.bytes)}
    return StreamingResponse(chunks, media_type=SAFETENSORS_TYPE, headers=headers)


@router.post("/{job}/cancel")
async def cancel(job: str, state: Shared) -> JobRecord:
    """Cancel a job. One that waits is cancelled at once, one that runs at the next module it touches; one
    that is over stays as it is."""
    return await state.jobs.cancel(job)


def _admitted(graph: Any, model: Model, body: Body) -> Admitted:
    return admit(graph, model, unpack_tensors(body.tensors) if body.tensors else {})

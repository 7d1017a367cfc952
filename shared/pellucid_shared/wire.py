"""What travels over HTTP and lies in Redis: job records, events, tokenized inputs, deployments."""

from __future__ import annotations

import enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

PROTOCOL_HEADER = "Pellucid-Protocol"
JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
SAFETENSORS_TYPE = "application/vnd.safetensors"

#: Names of the parts of a multipart POST /v1/jobs: the JSON request, and the safetensors of its literals.
REQUEST_PART, TENSORS_PART = "request", "tensors"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobState(str, enum.Enum):
    """``received -> queued -> running -> completed | failed | cancelled``."""

    RECEIVED = "received"
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class TokenizedInvoke(_Frozen):
    """One invoke as ids: rows of one invoke may differ in length (they are then left-padded by the engine).

    ``mask`` is given only where the user gave one: as many 0s and 1s as there are ids.
    """

    ids: list[list[int]]
    mask: list[list[int]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, tokens of the longest row): the batch and tokens axes this invoke sees."""
        return len(self.ids), max(map(len, self.ids))


class JobRequest(_Frozen):
    """The JSON body of POST /v1/jobs. ``graph`` is read by ``Graph.from_object``."""

    graph: dict[str, Any]


class ResultInfo(_Frozen):
    """Where a finished job's result lies (key in the store) and its size."""

    key: str
    bytes: int
    names: list[str]


class JobRecord(_Frozen):
    """What GET /v1/jobs/{id} answers. Times are Unix seconds by state."""

    id: str
    model: str
    state: JobState
    attempt: int = 0
    times: dict[str, float] = {}
    position: int | None = None  # place in the model's queue from 1, while queued
    error: dict[str, Any] | None = None  # a problem, once failed
    result: ResultInfo | None = None
    graph_sha256: str = ""


EventType = Literal["state", "log", "token", "progress", "gap"]


class Event(_Frozen):
    """One entry of a job's event log. ``id`` is the Redis stream id, the SSE ``Last-Event-ID``.

    data by type: state: {"state", "position"?, "error"?}; progress: {"what", "fraction"};
    gap: {"state"} (earlier events are gone); log and token: as the graph's nodes make them.
    """

    id: str = ""
    type: EventType
    attempt: int = 0
    time: float
    data: dict[str, Any] = {}


DeploymentState = Literal["loading", "ready", "failed", "stopped"]


class Deployment(_Frozen):
    """A served model, as GET /v1/models lists it."""

    id: str
    source: str
    state: DeploymentState
    progress: float = 0.0  # of loading, 0 to 1
    error: str | None = None
    workers: int = 0
    queued: int = 0
    class_name: str | None = None
    parameters: int | None = None
    dtype: str | None = None


class TokenizerInfo(_Frozen):
    """What is known of a model's tokenizer, as GET /v1/models/{id}/tokenizer answers it.

    Attributes:
        special_tokens: ``bos_token``, ``eos_token``, ``pad_token``, ... -> the token, those there are.
        special_ids: the same names -> ids.
        vocab_size: tokens without those that were added; ``length`` counts these too.
        padding_side: ``left`` or ``right``, where batches are padded.
        has_chat_template: chats can be rendered.
    """

    special_tokens: dict[str, str] = {}
    special_ids: dict[str, int | None] = {}
    vocab_size: int = 0
    length: int = 0
    padding_side: Literal["left", "right"] = "right"
    has_chat_template: bool = False

"""The tree of causes. One class per cause, shared by client, gateway and worker.

    PellucidError
    +- GraphError                 the experiment itself is wrong
    |  +- UnknownModuleError      a module path the model does not have
    |  +- UnknownOpError          an op the registry does not have
    |  +- OpArgumentError         an argument an op does not take
    |  +- ShapeError              shapes or dtypes that do not fit
    |  +- IndexOutOfRangeError    an index past the end of an axis
    |  +- OrderError              a write that cannot reach the model
    |  +- SiteError               a site that does not exist or was never reached
    |  +- GradientError           a gradient that does not exist
    +- InputError                 prompts, ids or keywords that cannot be used
    |  +- EmptyPromptError
    +- RequestError               a request the gateway cannot read
    |  +- VersionError            client and server do not speak the same protocol
    |  +- LimitError              over a stated limit
    +- NotFoundError
    |  +- ModelNotFoundError      the server does not serve this model
    |  +- JobNotFoundError
    +- JobError                   the job did not complete
    |  +- ExecutionError          an op failed while the model ran
    |  +- JobCancelledError
    |  +- JobTimeoutError
    |  +- WorkerLostError         the worker died under the job
    +- JobTimeout                 a wait ended before its job, which goes on
    +- UnavailableError           the server cannot take the job now
    +- ConnectionFailedError      the server cannot be reached
    +- ValueNotReadyError         a value used before, or after a failed, run
    +- RecordingError             Python asked of a value what only the run can answer
    +- MissingExtraError          a part of pellucid that is not installed
    +- NotYetError                a part of the language that this version does not have
    +- ExportError                an experiment that a script of plain hooks cannot be written for

Over HTTP each is an RFC 9457 problem: ``type`` is ``urn:pellucid:<slug>``, ``detail`` the message, and
``node`` the position in the graph where there is one; the client adds the user's own line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

PROBLEM_PREFIX = "urn:pellucid:"


class PellucidError(Exception):
    """Root of every error Pellucid raises.

    Attributes:
        message: what was asked, what was found, what to do.
        node: position of the graph node concerned, or None.
        where: the user's ``file:line``, filled in by the client, or None.
        details: further JSON values, carried over HTTP as members of the problem.
    """

    slug: ClassVar[str] = "error"
    title: ClassVar[str] = "Pellucid error"
    status: ClassVar[int] = 500

    def __init__(
        self, message: str, *, node: int | None = None, where: str | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.where = where
        self.details = details

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def to_problem(self) -> dict[str, Any]:
        """The RFC 9457 object for this error."""
        problem: dict[str, Any] = {
            "type": PROBLEM_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.message,
        }
        if self.node is not None:
            problem["node"] = self.node
        return {**self.details, **problem}

    @staticmethod
    def from_problem(problem: dict[str, Any]) -> PellucidError:
        """The error a problem+json body stands for; unknown types become the nearest class by status."""
        slug = str(problem.get("type", "")).removeprefix(PROBLEM_PREFIX)
        cls = _by_slug().get(slug) or (RequestError if problem.get("status", 500) < 500 else PellucidError)
        known = {"type", "title", "status", "detail", "node"}
        details = {k: v for k, v in problem.items() if k not in known and k not in ("message", "where")}
        message = str(problem.get("detail") or problem.get("title") or "the server gave no reason")
        node = problem.get("node")
        return cls(message, node=node if isinstance(node, int) else None, **details)


class GraphError(PellucidError):
    slug, title, status = "invalid-graph", "The graph is not valid", 422


class UnknownModuleError(GraphError, AttributeError):
    slug, title = "unknown-module", "The model has no such module"


class UnknownOpError(GraphError, AttributeError):
    slug, title = "unknown-op", "No such operation is allowed"


class OpArgumentError(GraphError):
    slug, title = "bad-argument", "An operation was given an argument it does not take"


class ShapeError(GraphError):
    slug, title = "shape-mismatch", "Shapes or dtypes do not fit"


class IndexOutOfRangeError(GraphError, IndexError):
    slug, title = "index-out-of-range", "An index is out of range"


class OrderError(GraphError):
    slug, title = "order", "A write cannot reach the model"


class SiteError(GraphError):
    slug, title = "bad-site", "A site does not exist or is never reached"


class GradientError(GraphError):
    slug, title = "no-gradient", "The gradient does not exist"


class InputError(PellucidError):
    slug, title, status = "bad-input", "The model cannot be run on this input", 422


class EmptyPromptError(InputError):
    slug, title = "empty-prompt", "The prompt is empty"


class RequestError(PellucidError):
    slug, title, status = "bad-request", "The request could not be read", 400


class VersionError(RequestError):
    slug, title, status = "version-mismatch", "Client and server versions do not fit", 426


class LimitError(RequestError):
    slug, title, status = "over-limit", "Over a limit", 413


class NotFoundError(PellucidError):
    slug, title, status = "not-found", "Not found", 404


class ModelNotFoundError(NotFoundError):
    slug, title = "model-not-served", "This server does not serve that model"


class JobNotFoundError(NotFoundError):
    slug, title = "job-not-found", "No such job"


class JobError(PellucidError):
    slug, title, status = "job-failed", "The job did not complete", 409


class ExecutionError(JobError):
    slug, title = "execution-failed", "An operation failed while the model ran"


class JobCancelledError(JobError):
    slug, title = "job-cancelled", "The job was cancelled"


class JobTimeoutError(JobError):
    slug, title = "job-timeout", "The job did not finish in time"


class WorkerLostError(JobError):
    slug, title = "worker-lost", "The worker died under the job"


class JobTimeout(PellucidError, TimeoutError):
    slug, title, status = "wait-timeout", "A wait ended before its job did", 504


class UnavailableError(PellucidError):
    slug, title, status = "unavailable", "The server cannot take the job now", 503


class ConnectionFailedError(PellucidError):
    slug, title, status = "unreachable", "The server cannot be reached", 503


class ValueNotReadyError(PellucidError):
    slug, title = "value-not-ready", "The value does not exist"


class RecordingError(PellucidError, TypeError):
    slug, title = "recording", "Only the run can answer this"


class MissingExtraError(PellucidError, ImportError):
    slug, title = "missing-extra", "A part of pellucid is not installed"


class NotYetError(PellucidError, NotImplementedError):
    slug, title, status = "not-yet", "This version does not have it yet", 501


class ExportError(PellucidError):
    slug, title, status = "not-exported", "The experiment cannot be exported", 501


def _by_slug() -> dict[str, type[PellucidError]]:
    found: dict[str, type[PellucidError]] = {}
    stack: list[type[PellucidError]] = [PellucidError]
    while stack:
        cls = stack.pop()
        found.setdefault(cls.slug, cls)  # a subclass without a slug of its own does not stand in for it
        stack.extend(cls.__subclasses__())
    return found


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names of ``allowed`` closest to ``name``, best first; matches on the last part too."""
    pool = list(dict.fromkeys(allowed))
    close = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    if len(close) < count:
        last = name.rpartition(".")[2]
        by_last: dict[str, list[str]] = {}
        for full in pool:
            by_last.setdefault(full.rpartition(".")[2], []).append(full)
        for part in difflib.get_close_matches(last, by_last, n=count, cutoff=0.6):
            close.extend(full for full in by_last[part] if full not in close)
    return close[:count]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence with the nearest names, or an empty string."""
    close = nearest(name, allowed)
    return f" Nearest: {', '.join(close)}." if close else ""

"""Every failure as RFC 9457 problem+json."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from pellucid_shared.errors import NotFoundError, PellucidError, RequestError, UnavailableError
from pellucid_shared.wire import PROBLEM_TYPE

log = logging.getLogger("pellucid.gateway")


def answer(error: PellucidError) -> JSONResponse:
    """The response an error is."""
    problem = error.to_problem()
    headers = {"Retry-After": str(problem["retry_after"])} if "retry_after" in problem else None
    return JSONResponse(problem, error.status, headers, media_type=PROBLEM_TYPE)


def install(app: FastAPI) -> None:
    """Make the app answer every failure this way."""

    @app.exception_handler(PellucidError)
    async def ours(request: Request, error: PellucidError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return answer(RequestError(f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        cls = NotFoundError if error.status_code == 404 else RequestError
        found = cls(f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is")
        problem: dict[str, Any] = {**found.to_problem(), "status": error.status_code}
        return JSONResponse(problem, error.status_code, error.headers, media_type=PROBLEM_TYPE)

    @app.exception_handler(RedisError)
    async def redis_down(request: Request, error: RedisError) -> JSONResponse:
        log.error("Redis does not answer: %s", error)
        return answer(UnavailableError("the server's queue does not answer; try again soon", retry_after=2))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(PellucidError("the server failed on this request; its log says why"))

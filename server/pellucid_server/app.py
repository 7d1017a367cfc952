"""The FastAPI gateway: an app made from settings, its resources owned by its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI, Request, Response
from redis.asyncio import Redis

from pellucid_shared import PROTOCOL, __version__
from pellucid_shared.errors import VersionError
from pellucid_shared.wire import PROTOCOL_HEADER

from . import problems, routes_jobs, routes_models, routes_service, routes_tokenizer
from .deployments import Deployments
from .jobs import Jobs
from .metrics import Metrics
from .reaper import reap_for_ever
from .settings import REDIS_SECONDS, Settings
from .state import State
from .store import Store


def create_app(settings: Settings) -> FastAPI:
    """A gateway. Any number of them may share one Redis."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis: Redis = Redis.from_url(settings.redis_url, decode_responses=True, socket_timeout=REDIS_SECONDS)
        jobs = Jobs(redis, settings.broker_url)
        app.state.pellucid = State(
            settings, redis, Store(settings.store_url), jobs, Deployments(redis), metrics
        )
        reaper = asyncio.create_task(reap_for_ever(jobs))
        try:
            yield
        finally:
            reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reaper
            await redis.aclose()

    metrics = Metrics()
    app = FastAPI(
        title="Pellucid",
        version=__version__,
        summary="Read and change any hidden state of a resident transformer.",
        lifespan=lifespan,
    )
    problems.install(app)
    for routes in (routes_jobs, routes_tokenizer, routes_models, routes_service):
        app.include_router(routes.router)

    @app.middleware("http")
    async def protocol(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        asked = request.headers.get(PROTOCOL_HEADER)
        if asked is not None and asked != str(PROTOCOL):
            response: Response = problems.answer(
                VersionError(
                    f"this server speaks protocol {PROTOCOL} (pellucid {__version__}), the client protocol "
                    f"{asked[:20]}; install the server's version: pip install pellucid=={__version__}"
                )
            )
        else:
            response = await call(request)
        response.headers[PROTOCOL_HEADER] = str(PROTOCOL)
        response.headers["Pellucid-Version"] = __version__
        response.headers["X-Content-Type-Options"] = "nosniff"
        route = getattr(request.scope.get("route"), "path", "unknown")
        metrics.requests.labels(request.method, route, response.status_code).inc()
        return response

    return app

"""/health, /ready, /metrics, /v1/whoami."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pellucid_shared import PROTOCOL, __version__
from pellucid_shared.errors import UnavailableError

from .state import Shared

router = APIRouter(tags=["service"])


@router.get("/health")
async def health() -> dict[str, str]:
    """The gateway is up."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: Shared) -> dict[str, Any]:
    """200 once a job would run: Redis answers, and every expected model (at least one) is ready."""
    shown = {d.id: d for d in await state.deployments.list()}
    expected = state.settings.expected or tuple(shown)
    waiting = []
    for model_id in expected:
        found = shown.get(model_id)
        if found is None or found.state != "ready":
            how = "not there yet" if found is None else found.state
            waiting.append(f"{model_id} is {how}" + (f": {found.error}" if found and found.error else ""))
    if waiting or not expected:
        raise UnavailableError("; ".join(waiting) or "no model is served yet", retry_after=1)
    return {"status": "ready", "models": list(expected)}


@router.get("/metrics", response_class=Response)
async def metrics(state: Shared) -> Response:
    """Prometheus exposition."""
    return Response(await state.metrics.text(state.deployments), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/whoami")
async def whoami() -> dict[str, Any]:
    """Who is asking. This server knows no keys yet: everyone is anonymous."""
    return {"key": None, "anonymous": True, "scopes": ["run"], "version": __version__, "protocol": PROTOCOL}

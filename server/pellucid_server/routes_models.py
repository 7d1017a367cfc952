"""/v1/models: what is served, and model cards."""

from __future__ import annotations

from fastapi import APIRouter, Response

from pellucid_shared.card import ModelCard
from pellucid_shared.wire import JSON_TYPE, Deployment

from .state import Shared

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def index(state: Shared) -> list[Deployment]:
    """Every model this server has, and how it is."""
    return await state.deployments.list()


@router.get("/{model_id:path}", response_model=ModelCard)
async def card(model_id: str, state: Shared) -> Response:
    """A model's card: its module tree with shapes, its call order."""
    model = await state.deployments.get(model_id)
    return Response(model.card_json, media_type=JSON_TYPE)

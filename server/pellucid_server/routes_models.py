"""/v1/models: what is served, model cards, tokenizing."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from pydantic import BaseModel

from pellucid_shared.card import ModelCard
from pellucid_shared.wire import JSON_TYPE, Deployment

from .state import Shared

router = APIRouter(prefix="/v1/models", tags=["models"])


class TokenizeRequest(BaseModel):
    """One text, or several."""

    text: str | list[str]


class TokenizeAnswer(BaseModel):
    """Ids of each text, special tokens included, as a job would be run on them."""

    ids: list[list[int]]


@router.get("")
async def index(state: Shared) -> list[Deployment]:
    """Every model this server has, and how it is."""
    return await state.deployments.list()


@router.get("/{model_id:path}/tokenize", include_in_schema=False, status_code=405)
async def tokenize_is_post(model_id: str) -> None:
    """Keeps the path of a card from swallowing this one."""


@router.post("/{model_id:path}/tokenize")
async def tokenize(model_id: str, request: TokenizeRequest, state: Shared) -> TokenizeAnswer:
    """The ids of texts."""
    model = await state.deployments.get(model_id)
    texts = [request.text] if isinstance(request.text, str) else request.text
    return TokenizeAnswer(ids=await asyncio.to_thread(model.encode, texts))


@router.get("/{model_id:path}", response_model=ModelCard)
async def card(model_id: str, state: Shared) -> Response:
    """A model's card: its module tree with shapes, its call order."""
    model = await state.deployments.get(model_id)
    return Response(model.card_json, media_type=JSON_TYPE)

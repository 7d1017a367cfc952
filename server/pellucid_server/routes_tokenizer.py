"""/v1/models/{id}/...: what the model's tokenizer does, for clients without one."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, Field, ValidationError

from pellucid_shared.errors import InputError, RequestError
from pellucid_shared.wire import TokenizerInfo

from .body import read_body
from .state import Shared
from .tokenizing import ModelTokenizer

router = APIRouter(prefix="/v1/models", tags=["tokenizers"])

MAX_BODY = 4 * 2**20
MAX_ROWS = 4096

Row = TypeVar("Row")
Rows = Annotated[list[Row], Field(max_length=MAX_ROWS)]
Asked = TypeVar("Asked", bound=BaseModel)


class TokenizeRequest(BaseModel):
    """One text, or several."""

    text: str | Rows[str]
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """Rows of ids."""

    ids: Rows[list[int]]
    skip_special_tokens: bool = False


class ChatRequest(BaseModel):
    """Conversations, each a list of messages with role and content; ``options`` are further variables of the
    template (``tools``, ``enable_thinking``, ...)."""

    chats: Rows[list[dict[str, Any]]]
    add_generation_prompt: bool = False
    options: dict[str, Any] = {}


class Ids(BaseModel):
    """Ids of each text, special tokens included, as a job would be run on them."""

    ids: list[list[int]]


class Texts(BaseModel):
    """The text of each row, and the tokenizer's own name of each of its ids."""

    text: list[str]
    tokens: list[list[str | None]]


class Rendered(BaseModel):
    """Each conversation as text, and the ids of that text (its special tokens are in it already)."""

    text: list[str]
    ids: list[list[int]]


def _body(of: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": of.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


@router.get("/{model_id:path}/tokenizer")
async def info(model_id: str, state: Shared) -> TokenizerInfo:
    """Sizes and special tokens."""
    return (await _tokenizer(model_id, state)).info


@router.get("/{model_id:path}/tokenize", include_in_schema=False)
@router.get("/{model_id:path}/detokenize", include_in_schema=False)
@router.get("/{model_id:path}/chat", include_in_schema=False)
async def these_are_post(model_id: str) -> None:
    """Keeps the path of a card from swallowing these."""
    raise HTTPException(405, headers={"Allow": "POST"})


@router.post("/{model_id:path}/tokenize", openapi_extra=_body(TokenizeRequest))
async def tokenize(model_id: str, request: Request, state: Shared) -> Ids:
    """The ids of texts."""
    asked = await _read(request, TokenizeRequest)
    tokenizer = await _tokenizer(model_id, state)
    texts = [asked.text] if isinstance(asked.text, str) else asked.text

    def ids() -> Ids:
        return Ids(ids=tokenizer.encode(texts, add_special_tokens=asked.add_special_tokens))

    return await asyncio.to_thread(ids)


@router.post("/{model_id:path}/detokenize", openapi_extra=_body(DetokenizeRequest))
async def detokenize(model_id: str, request: Request, state: Shared) -> Texts:
    """The text of ids."""
    asked = await _read(request, DetokenizeRequest)
    tokenizer = await _tokenizer(model_id, state)

    def texts() -> Texts:
        text = tokenizer.decode(asked.ids, skip_special_tokens=asked.skip_special_tokens)
        return Texts(text=text, tokens=tokenizer.tokens(asked.ids))

    return await asyncio.to_thread(texts)


@router.post("/{model_id:path}/chat", openapi_extra=_body(ChatRequest))
async def chat(model_id: str, request: Request, state: Shared) -> Rendered:
    """Conversations as the model's chat template writes them."""
    asked = await _read(request, ChatRequest)
    tokenizer = await _tokenizer(model_id, state)
    options = {**asked.options, "add_generation_prompt": asked.add_generation_prompt}

    def rendered() -> Rendered:
        text = tokenizer.render(asked.chats, options)
        return Rendered(text=text, ids=tokenizer.encode(text, add_special_tokens=False))

    return await asyncio.to_thread(rendered)


async def _tokenizer(model_id: str, state: Shared) -> ModelTokenizer:
    model = await state.deployments.get(model_id)
    if model.tokenizer is None:
        raise InputError(f"{model_id} has no tokenizer; give it token ids instead of text")
    return model.tokenizer


async def _read(request: Request, model: type[Asked]) -> Asked:
    """The body of a request.

    Raises:
        LimitError: it is larger than a text may be.
        RequestError: it is not what the route takes.
    """
    body = await read_body(request, MAX_BODY)
    try:
        return model.model_validate_json(body.request)
    except ValidationError as error:
        found = error.errors()
        first = next((e for e in found if e["type"] == "too_long"), found[0])
        where = ".".join(map(str, ("body", *first["loc"])))
        raise RequestError(f"{where}: {first['msg']}") from None

"""Reading a request's body within its limit: plain JSON, or JSON with a safetensors part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pellucid_shared.errors import LimitError, RequestError
from pellucid_shared.wire import JSON_TYPE, REQUEST_PART, TENSORS_PART


@dataclass(frozen=True, slots=True)
class Body:
    """The JSON of a request, and the safetensors of its literals (empty where there are none)."""

    request: bytes
    tensors: bytes = b""


async def read_body(request: Request, limit: int) -> Body:
    """The body of POST /v1/jobs.

    Raises:
        LimitError: over ``limit`` bytes; said before more is read.
        RequestError: neither JSON nor multipart/form-data with the two parts.
    """
    kind, options = parse_options_header(request.headers.get("Content-Type", JSON_TYPE))
    data = await _read(request, limit)
    if kind == JSON_TYPE.encode():
        return Body(data)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestError(
            f"the body is {kind.decode('latin-1')[:60]!r}; send {JSON_TYPE}, or multipart/form-data with the "
            f"parts {REQUEST_PART!r} and {TENSORS_PART!r}"
        )
    parts = _parts(data, options[b"boundary"])
    if REQUEST_PART not in parts or set(parts) - {REQUEST_PART, TENSORS_PART}:
        raise RequestError(
            f"a multipart request has the parts {REQUEST_PART!r} and {TENSORS_PART!r}, found {sorted(parts)}"
        )
    return Body(parts[REQUEST_PART], parts.get(TENSORS_PART, b""))


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("Content-Length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise LimitError(f"the request is {declared} bytes; at most {limit} are taken")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise LimitError(f"the request is over {limit} bytes, the most that are taken")
    return bytes(data)


def _parts(data: bytes, boundary: bytes) -> dict[str, bytes]:
    """The parts of a multipart body by name."""
    parts: dict[str, bytes] = {}
    headers: list[tuple[bytes, bytes]] = []
    name, value, content = bytearray(), bytearray(), bytearray()

    def header_end() -> None:
        headers.append((bytes(name).lower(), bytes(value)))
        name.clear()
        value.clear()

    def part_end() -> None:
        disposition = dict(headers).get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        parts[options.get(b"name", b"").decode("utf-8", "replace")] = bytes(content)
        headers.clear()
        content.clear()

    callbacks: Any = {
        "on_header_field": lambda d, a, b: name.extend(d[a:b]),
        "on_header_value": lambda d, a, b: value.extend(d[a:b]),
        "on_header_end": header_end,
        "on_part_data": lambda d, a, b: content.extend(d[a:b]),
        "on_part_end": part_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the multipart body cannot be read: {error}") from None
    return parts

"""Structures of tensors and plain values as safetensors bytes, and back. Never pickle, never torch.

A packed structure is one safetensors file: tensors are named ``0``, ``1``, ... in order, and the structure is
JSON in the header's ``__metadata__`` under ``pellucid``, in the tags of ``values.py`` with ``{"ref": i}`` for
tensor i. complex128, which safetensors cannot name, is stored as float64 with a trailing axis of 2 and listed
under ``complex128``. Reading checks everything that could later hurt torch or numpy: sizes, ranks, and that
booleans are 0 or 1. numpy is imported when it is first used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from .errors import GraphError, LimitError, PellucidError, RequestError
from .graph import MAX_BYTES, loads
from .specs import DTYPES, TensorSpec
from .values import Ref, contains, decode, dumps, encode, substitute

_BY_WIRE = {info.wire: info.name for info in DTYPES.values()}
_PLAIN = (bool, int, float, complex, str, type(None))
_STRUCTURE, _COMPLEX = "pellucid", "complex128"
_MAX_RANK = 64  # numpy's and torch's own
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as bytes: dtype name, shape, and C-ordered little-endian data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)

    def numpy(self) -> Any:
        """A numpy array over the same bytes. bfloat16, which numpy lacks, is ``ml_dtypes.bfloat16`` where
        that is installed, else a float32 copy, which holds every bfloat16 exactly."""
        import numpy as np

        if self.dtype != "bfloat16":
            return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)
        try:
            import ml_dtypes
        except ImportError:
            halves = np.frombuffer(self.data, dtype=np.uint16).astype(np.uint32)
            return (halves << 16).view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=ml_dtypes.bfloat16).reshape(self.shape)

    @staticmethod
    def from_numpy(array: Any) -> WireTensor:
        """The wire form of a numpy array (copied only where it is not contiguous).

        Raises:
            RequestError: the dtype has no place on the wire.
        """
        import numpy as np

        name = array.dtype.name
        if name not in DTYPES:
            raise RequestError(f"an array of dtype {name} cannot be sent; known: {', '.join(DTYPES)}")
        shape = tuple(array.shape)
        array = np.ascontiguousarray(array)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        return WireTensor(name, shape, memoryview(array.reshape(-1).view(np.uint8)))


def digest(tensor: WireTensor) -> str:
    """``sha256:`` and the hex SHA-256 of dtype, shape and bytes."""
    state = hashlib.sha256(dumps([tensor.dtype, list(tensor.shape)]))
    state.update(tensor.data)
    return f"sha256:{state.hexdigest()}"


def pack(structure: Any) -> bytes:
    """One safetensors file holding a structure.

    Args:
        structure: WireTensors, None, bools, ints, floats, complex, strings, and lists, tuples and dicts
            (string keys, order kept) of them.

    Raises:
        GraphError: something else is in it.
        LimitError: the structure and its tensors' names take more than 8 MiB.
    """
    tensors: list[WireTensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, WireTensor):
            tensors.append(value)
            return Ref(len(tensors) - 1)
        if not isinstance(value, _PLAIN):
            raise GraphError(f"a value of type {type(value).__name__} cannot be sent")
        return value

    if contains(structure, slice):
        raise GraphError("a value of type slice cannot be sent")
    plain = dumps(encode(substitute(structure, leaf))).decode()
    return _serialize({str(i): t for i, t in enumerate(tensors)}, {_STRUCTURE: plain})


def unpack(data: bytes | bytearray) -> Any:
    """The structure in a file made by :func:`pack`, tensors as WireTensors over ``data``'s bytes.

    Raises:
        RequestError: not such a file.
    """
    tensors, metadata = _deserialize(data)
    _check_bools(tensors)
    text = metadata.get(_STRUCTURE)
    if text is None:
        raise RequestError("the safetensors file holds no structure")

    def leaf(value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if not isinstance(value, Ref):
            raise RequestError(f"the structure holds a {type(value).__name__}, which no result holds")
        if str(value.node) not in tensors:
            raise RequestError(f"the structure names tensor {value.node}, which the file does not hold")
        return tensors[str(value.node)]

    try:
        structure = decode(loads(text))
        if contains(structure, slice):
            raise RequestError("the structure holds a slice, which no result holds")
        return substitute(structure, leaf)
    except RequestError:
        raise
    except PellucidError as error:
        raise RequestError(f"the structure in the safetensors file cannot be read: {error.message}") from None


def pack_tensors(tensors: Mapping[str, WireTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors by name as one safetensors file: the literals of a graph by digest, results by save name."""
    return _serialize(tensors, dict(metadata or {}))


def unpack_tensors(data: bytes) -> dict[str, WireTensor]:
    """The literals of a request.

    Raises:
        RequestError: not safetensors, or a tensor whose name is not its digest.
    """
    tensors, _ = _deserialize(data)
    _check_bools(tensors)
    for name, tensor in tensors.items():
        if digest(tensor) != name:
            raise RequestError(
                f"the tensor sent as {name[:80]!r} does not have that hash; it is {digest(tensor)}"
            )
    return tensors


def peek(data: bytes) -> dict[str, TensorSpec]:
    """Specs of the tensors in a safetensors file, from its header alone; raises RequestError."""
    return {name: tensor.spec for name, tensor in _deserialize(data)[0].items()}


def _serialize(tensors: Mapping[str, WireTensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    doubles = []
    for name, tensor in tensors.items():
        size = len(memoryview(tensor.data).cast("B")) if tensor.data else 0
        wire, shape = DTYPES[tensor.dtype].wire, list(tensor.shape)
        if tensor.dtype == "complex128":
            doubles.append(name)
            wire, shape = "F64", [*shape, 2]
        header[name] = {"dtype": wire, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    if doubles:
        metadata = {**metadata, _COMPLEX: dumps(doubles).decode()}
    if metadata:
        header = {"__metadata__": metadata, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_BYTES:
        raise LimitError(
            f"{len(tensors)} tensors and the structure around them take {len(text)} bytes of header; at most "
            f"{MAX_BYTES} are taken: stack tensors, or send fewer values"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *(t.data for t in tensors.values())])


def _deserialize(data: bytes | bytearray) -> tuple[dict[str, WireTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file: 8 bytes of header length, JSON header, data without gaps.

    Source: https://huggingface.co/docs/safetensors (format). Written out here because the library's reader
    copies every tensor and offers no view of the metadata without numpy.
    """
    view = memoryview(data)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > len(view) - 8:
        raise RequestError("this is not a safetensors file: its header is longer than the file")
    if length > MAX_BYTES:
        raise LimitError(f"the safetensors header is {length} bytes; at most {MAX_BYTES} are taken")
    try:
        header = loads(bytes(view[8 : 8 + length]))
    except PellucidError as error:
        raise RequestError(f"the safetensors header cannot be read: {error.message}") from None
    if not isinstance(header, dict):
        raise RequestError("the safetensors header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise RequestError("the safetensors metadata is not text by name")
    doubles = _doubles(metadata)
    body = view[8 + length :]
    tensors: dict[str, WireTensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _start(item[1])):
        tensor, start, stop = _tensor(name, entry, body, name in doubles)
        if start != end:
            raise RequestError(f"the safetensors file has a gap or an overlap before {name[:80]!r}")
        tensors[name], end = tensor, stop
    if end != len(body):
        raise RequestError("the safetensors file has bytes that no tensor owns")
    return tensors, metadata


def _start(entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _counts(offsets) or len(offsets) != 2:
        raise RequestError("a tensor in the safetensors header has no data_offsets")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: dict[str, Any], body: memoryview, double: bool) -> tuple[WireTensor, int, int]:
    start, stop = _start(entry)
    wire, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(wire, str) or wire not in _BY_WIRE or not _counts(shape):
        raise RequestError(f"the tensor {name[:80]!r} has no known dtype or shape in the safetensors header")
    dtype = _BY_WIRE[wire]
    if double and (dtype != "float64" or shape[-1:] != [2]):
        raise RequestError(f"the tensor {name[:80]!r} is said to be complex128 and is not stored as such")
    if len(shape) > _MAX_RANK + double or math.prod(size or 1 for size in shape) >= 2**63:
        raise RequestError(f"the tensor {name[:80]!r} has a shape that no tensor can have")
    if not start <= stop <= len(body) or math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise RequestError(
            f"the tensor {name[:80]!r} does not fill the bytes the safetensors header gives it"
        )
    if double:
        dtype, shape = "complex128", shape[:-1]
    return WireTensor(dtype, tuple(shape), body[start:stop]), start, stop


def _doubles(metadata: Mapping[str, str]) -> frozenset[str]:
    try:
        names = loads(metadata.get(_COMPLEX, "[]"))
    except PellucidError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError("the safetensors metadata names no list of complex tensors")
    return frozenset(names)


def _check_bools(tensors: Mapping[str, WireTensor]) -> None:
    """Refuse booleans other than 0 and 1: torch's kernels take them at their word, and count with them."""
    for name, tensor in tensors.items():
        if tensor.dtype == "bool":
            data = memoryview(tensor.data)
            for start in range(0, len(data), _CHUNK):
                if bytes(data[start : start + _CHUNK]).translate(None, b"\0\1"):
                    raise RequestError(f"the tensor {name[:80]!r} is bool and holds bytes other than 0 and 1")


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in value
    )

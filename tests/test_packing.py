"""Structures round-trip bit for bit through safetensors; hostile bytes are refused, never crash."""

import contextlib
import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid_shared.errors import GraphError, LimitError, PellucidError, RequestError
from pellucid_shared.packing import WireTensor, digest, pack, pack_tensors, peek, unpack, unpack_tensors
from pellucid_shared.specs import DTYPES, TensorSpec
from pellucid_shared.values import Ref, Site


@st.composite
def tensors(draw: st.DrawFn) -> WireTensor:
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = math.prod(shape) * DTYPES[dtype].itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    return WireTensor(dtype, shape, bytes(b & 1 for b in data) if dtype == "bool" else data)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAF = (
    tensors()
    | st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.complex_numbers()
    | TEXT
)
STRUCTURE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=10,
)


def bits(value: object) -> object:
    """A form in which equal means: same type, same bits."""
    if isinstance(value, WireTensor):
        return ("tensor", value.dtype, value.shape, bytes(value.data))
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("<d", value))
    if isinstance(value, complex):
        return ("complex", bits(value.real), bits(value.imag))
    if isinstance(value, list | tuple):
        return (type(value).__name__, [bits(v) for v in value])
    if isinstance(value, dict):
        return ("dict", [(k, bits(v)) for k, v in value.items()])
    return (type(value).__name__, value)


@settings(max_examples=300, deadline=None)
@given(STRUCTURE)
def test_any_structure_round_trips_bit_for_bit(structure: object) -> None:
    assert bits(unpack(pack(structure))) == bits(structure)


@settings(max_examples=100, deadline=None)
@given(st.lists(tensors(), max_size=4))
def test_literals_round_trip_by_digest(found: list[WireTensor]) -> None:
    by_digest = {digest(t): t for t in found}
    again = unpack_tensors(pack_tensors(by_digest))
    assert {k: bits(v) for k, v in again.items()} == {k: bits(v) for k, v in by_digest.items()}
    assert peek(pack_tensors(by_digest)) == {k: t.spec for k, t in by_digest.items()}


@settings(max_examples=300, deadline=None)
@given(STRUCTURE, st.data())
def test_corrupted_bytes_are_refused_or_read_and_never_crash(structure: object, data: st.DataObject) -> None:
    packed = bytearray(pack(structure))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for hostile in (bytes(packed), bytes(packed[:cut])):
        for read in (unpack, unpack_tensors, peek):
            with contextlib.suppress(PellucidError):
                read(hostile)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
SHAPE = st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, -1]), max_size=4)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([info.wire for info in DTYPES.values()]) | JSON,
        "shape": SHAPE | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**62]), min_size=2, max_size=2) | JSON,
    }
)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "pellucid": JSON.map(json.dumps) | st.sampled_from(['{"ref":0}', '{"slice":[1,2,3]}', "[" * 99]),
        "complex128": JSON.map(json.dumps) | st.sampled_from(['["0"]', "1" * 5000]),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["0", "1"]), ENTRY | JSON, max_size=2), METADATA | JSON, st.binary())
def test_hostile_headers_are_refused_or_read_and_never_crash(
    entries: dict[str, object], metadata: object, body: bytes
) -> None:
    data = header({"__metadata__": metadata, **entries}, body)
    for read in (unpack, unpack_tensors, peek):
        with contextlib.suppress(PellucidError):
            read(data)


@pytest.mark.parametrize("value", [object(), slice(1), ..., {1: 2}, Ref(0), [Site("m")], 2**63, "\ud800"])
def test_what_has_no_place_in_a_result_is_not_packed(value: object) -> None:
    with pytest.raises(GraphError):
        pack(value)


def test_the_library_reads_what_we_write() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = pack({"a": WireTensor.from_numpy(array), "b": [WireTensor.from_numpy(array > 2)]})
    read = safetensors.numpy.load(packed)
    np.testing.assert_array_equal(read["0"], array)
    np.testing.assert_array_equal(read["1"], array > 2)


def test_we_read_what_the_library_writes() -> None:
    array = np.arange(6, dtype=np.int64).reshape(3, 2)
    assert peek(safetensors.numpy.save({"x": array, "y": array[:0]})) == {
        "x": TensorSpec((3, 2), "int64"),
        "y": TensorSpec((0, 2), "int64"),
    }


def test_bfloat16_becomes_exact_float32_without_ml_dtypes() -> None:
    values = np.array([1.5, -2.0, 3.140625], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    array = WireTensor("bfloat16", (3,), halves.tobytes()).numpy()
    np.testing.assert_array_equal(array.astype(np.float32), values)


def test_an_array_numpy_holds_big_endian_or_transposed_arrives_right() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    np.testing.assert_array_equal(WireTensor.from_numpy(array).numpy(), array)


def header(entries: dict[str, object], body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "longer than the file"),
        (b"\xff" * 16, "longer than the file"),
        (header({}) + b"x", "no tensor owns"),
        (header({"a": 1}), "no data_offsets"),
        (header({"a": {"dtype": "F9", "shape": [], "data_offsets": [0, 0]}}), "no known dtype"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "does not fill"),
        (header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "does not fill"),
        (header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12"), "gap"),
        (header({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}), "no known dtype"),
        (
            header({"a": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}),
            "no tensor can have",
        ),
        (header({"a": {"dtype": "F32", "shape": [2**62] * 10**5, "data_offsets": [0, 0]}}), "no tensor can"),
        (
            header({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"),
            "other than 0 and 1",
        ),
        (header({"__metadata__": {"complex128": "1" * 5000}}), "no list of complex"),
        (header({}), "holds no structure"),
        (header({"__metadata__": {"pellucid": '{"slice":[0,1,2]}'}}), "holds a slice"),
        (header({"__metadata__": {"pellucid": '{"dtype":"int8"}'}}), "holds a DType"),
        (header({"__metadata__": {"pellucid": '{"ref":7}'}}), "names tensor 7"),
        (header({"__metadata__": {"pellucid": "{"}}), "cannot be read"),
        (header({"__metadata__": {"pellucid": 3}}), "not text"),
    ],
)
def test_what_is_not_a_packed_structure_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        unpack(data)


def test_a_literal_under_another_name_is_refused() -> None:
    with pytest.raises(RequestError, match="does not have that hash"):
        unpack_tensors(pack_tensors({"sha256:" + "0" * 64: WireTensor("uint8", (1,), b"x")}))


def test_packing_makes_one_copy_of_a_large_array() -> None:
    array = np.zeros(2**26, dtype=np.uint8)
    tracemalloc.start()
    packed = pack(WireTensor.from_numpy(array))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) > 2**26
    assert peak < 1.1 * 2**26


def test_more_structure_than_a_header_may_hold_is_refused_where_it_is_packed() -> None:
    with pytest.raises(LimitError, match="stack tensors"):
        pack("x" * 2**23)


def test_unpacking_copies_no_tensor() -> None:
    packed = pack([WireTensor("uint8", (2**24,), bytes(2**24))])
    tracemalloc.start()
    unpack(packed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20

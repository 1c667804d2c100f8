"""Headers and rows of safetensors, from writers we trust and from strangers."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from hf_watermark.errors import (
    CarrierError,
    MalformedCheckpointError,
)
from hf_watermark.safetensors_ranges import (
    DTYPE_BITS,
    TensorSpan,
    decode_rows,
    quoted,
    read_header,
    read_rows,
)

NAMES = {"float16": "F16", "float32": "F32", "float64": "F64"}


class Memory:
    """A reader that fails the test when a read leaves the file, and logs the reads."""

    def __init__(self, raw: bytes, name: str = "model.safetensors") -> None:
        self.name = name
        self.size = len(raw)
        self.raw = raw
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= self.size
        self.reads.append((start, stop))
        return self.raw[start:stop]


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="U8", shape=(1,), offsets=(0, 1), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def refused(raw: bytes) -> str:
    with pytest.raises(MalformedCheckpointError) as caught:
        read_header(Memory(raw))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def header_or_refusal(reader: Memory) -> dict[str, TensorSpan] | None:
    """Nothing but a refusal may come out of a stranger's header."""
    try:
        return read_header(reader)
    except MalformedCheckpointError as error:
        message = str(error)
    assert message.isprintable()
    return None


arrays = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.sampled_from(list(NAMES)).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
            elements={"allow_nan": False, "allow_infinity": False, "min_value": -1e4}
            | {"max_value": 1e4},
        )
    ),
    min_size=1,  # safetensors 0.8 writes broken JSON for no tensors with empty metadata
    max_size=5,
)


@given(tensors=arrays, metadata=st.none() | st.dictionaries(st.text("ab"), st.text("ab")))
def test_round_trip(tensors, metadata):
    reader = Memory(save(tensors, metadata))
    spans = read_header(reader)
    assert set(spans) == set(tensors)
    for name, array in tensors.items():
        span = spans[name]
        assert span == TensorSpan(
            name, reader.name, NAMES[array.dtype.name], array.shape, span.start, span.stop
        )
        assert span.rows == (array.shape[0] if array.shape else 1)
        assert span.weights == array.size
        assert span.stop - span.start == array.nbytes
        rows = read_rows(reader, span, 0, span.rows)
        assert rows.dtype == np.float32
        assert rows.shape == (span.rows, span.columns)
        np.testing.assert_array_equal(rows.reshape(array.shape), array.astype(np.float32))


@given(data=st.data())
def test_any_rows_are_those_rows(data):
    array = np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2)
    reader = Memory(save({"a": np.ones(3, np.float16), "w": array}))
    span = read_header(reader)["w"]
    start = data.draw(st.integers(0, 7))
    stop = data.draw(st.integers(start, 7))
    np.testing.assert_array_equal(
        read_rows(reader, span, start, stop), array.reshape(7, 6)[start:stop]
    )


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 8), (3, 2), (8, 8)])
def test_rows_outside_the_tensor_are_refused(start, stop):
    reader = Memory(save({"w": np.zeros((7, 2), np.float32)}))
    with pytest.raises(CarrierError, match="rows within 0 to 7"):
        read_rows(reader, read_header(reader)["w"], start, stop)


@given(bits=hnp.arrays(np.uint16, (3, 4)))
def test_bfloat16(bits):
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    span = TensorSpan("w", "f", "BF16", (3, 4), 0, 24)
    if np.isfinite(expected).all():
        np.testing.assert_array_equal(decode_rows(bits.tobytes(), span, 3), expected)
    else:
        with pytest.raises(CarrierError, match="not finite"):
            decode_rows(bits.tobytes(), span, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e39])
def test_weights_that_no_float32_holds_are_refused(value):
    reader = Memory(save({"w": np.array([[0.0, value]], np.float64)}))
    with pytest.raises(CarrierError, match="1 of 2 NaN or infinite"):
        read_rows(reader, read_header(reader)["w"], 0, 1)


def test_rows_are_writable_and_own_their_memory():
    reader = Memory(save({"w": np.zeros((2, 2), np.float32)}))
    rows = read_rows(reader, read_header(reader)["w"], 0, 2)
    rows += 1
    assert (rows == 1).all()


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"F16", "BF16", "F32", "F64"}))
def test_dtypes_that_carry_nothing(dtype):
    bits = DTYPE_BITS[dtype]
    reader = Memory(pack({"w": entry(dtype, (8, 3), (0, 3 * bits))}, bytes(3 * bits)))
    span = read_header(reader)["w"]
    before = list(reader.reads)
    with pytest.raises(CarrierError, match=r"dtype BF16, F16, F32, F64; got"):
        read_rows(reader, span, 0, 2)
    assert reader.reads == before


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_dtypes_are_those_of_the_official_loader(dtype):
    raw = pack({"w": entry(dtype, (8,), (0, DTYPE_BITS[dtype]))}, bytes(DTYPE_BITS[dtype]))
    assert read_header(Memory(raw))["w"].dtype == dtype
    assert deserialize(raw)[0][1]["dtype"] == dtype


def test_rows_that_end_inside_a_byte():
    span = read_header(Memory(pack({"w": entry("F4", (2, 3), (0, 3))}, bytes(3))))["w"]
    with pytest.raises(CarrierError, match="end on a byte"):
        _ = span.row_bytes


def test_decoding_checks_the_length():
    with pytest.raises(MalformedCheckpointError, match="expected 8 bytes; got 7"):
        decode_rows(bytes(7), TensorSpan("w", "f", "F32", (1, 2), 0, 8), 1)


def test_small_headers_cost_one_read_and_large_ones_two():
    small = Memory(save({"w": np.zeros((100, 100), np.float32)}))
    read_header(small)
    assert small.reads == [(0, 32768)]
    large = Memory(save({f"layer.{i:05}": np.zeros(1, np.float16) for i in range(1000)}))
    assert len(read_header(large)) == 1000
    length = int.from_bytes(large.raw[:8], "little")
    assert large.reads == [(0, 32768), (32768, 8 + length)]


@pytest.mark.parametrize("length", [32760, 32761, 32768, 99_993, 100_000])
def test_headers_around_the_first_read(length):
    header = json.dumps({"w": entry()}).encode().ljust(length)
    span = read_header(Memory(pack(header, b"x")))["w"]
    assert (span.start, span.stop) == (8 + length, 9 + length)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "at least 8 bytes"),
        (b"1234567", "at least 8 bytes; got 7"),
        (struct.pack("<Q", 0) + b"{}", "length field of 0"),
        (
            struct.pack("<Q", 3) + b"{}",
            "header of at most 2 bytes, not empty; got a length field of 3",
        ),
        (b"\xff" * 20, "length field of 18446744073709551615"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS pointer"),
        (pack(b" {}"), "brace"),
        (pack(b"[]"), "brace"),
        (pack(b"\xef\xbb\xbf{}"), "brace"),
        (pack(b'{"a'), "not the JSON"),
        (pack(b"{}{}"), "not the JSON"),
        (pack(b'{"\xff": 1}'), "not UTF-8"),
        (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
        (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
        (pack(b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"), "exactly dtype, shape"),
        (pack(b'{"a":1' + b"0" * 5000 + b"}"), "number of 5001 characters"),
        (pack(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"x"), "negative zero"),
        (pack(b'{"a":1.5}'), "only integers"),
        (pack(b'{"a":NaN}'), "only integers"),
        (pack(b'{"a":1,"a":1}'), "key 'a' twice"),
        (pack(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "key 'dtype' twice"),
        (pack({"__metadata__": []}), "__metadata__"),
        (pack({"__metadata__": {"a": 1}}), "__metadata__"),
        (pack({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
        (pack({"a": 1}), "exactly dtype, shape and data_offsets; got int"),
        (pack({"a": None}), "exactly"),
        (pack({"a": {"dtype": "U8", "shape": [1]}}), "exactly"),
        (pack({"a": entry(more=1)}, b"x"), "exactly"),
        (pack({"a": entry("X8")}, b"x"), "dtype of safetensors 0.8; got 'X8'"),
        (pack({"a": entry(["U8"])}, b"x"), "dtype of safetensors"),
        (pack({"a": entry(None)}, b"x"), "dtype of safetensors"),
        (pack({"a": entry() | {"shape": 1}}, b"x"), "natural numbers"),
        (pack({"a": entry() | {"shape": {}}}, b"x"), "natural numbers"),
        (pack({"a": entry(shape=[True])}, b"x"), "natural numbers"),
        (pack({"a": entry(shape=[-1])}, b"x"), "natural numbers; got [-1]"),
        (pack({"a": entry(shape=["1"])}, b"x"), "natural numbers"),
        (pack({"a": entry(shape=[1] * 65)}, b"x"), "natural numbers"),
        (pack({"a": entry(offsets=[0])}, b"x"), "growing"),
        (pack({"a": entry(offsets=[0, 1, 2])}, b"x"), "growing"),
        (pack({"a": entry(offsets=[1, 0])}, b"x"), "growing"),
        (pack({"a": entry(offsets=[-1, 0])}, b"x"), "growing"),
        (pack({"a": entry(offsets=[False, True])}, b"x"), "growing"),
        (pack({"a": entry(shape=[2])}, b"x"), "U8 [2] in 2 bytes; got 1 bytes"),
        (pack({"a": entry("F4", [1], (0, 1))}, b"x"), "F4 [1] in 1 bytes"),
        (pack({"a": entry(shape=[2**32, 2**32], offsets=(0, 0))}), "2**63 elements"),
        (pack({"a": entry(shape=[0, 2**62, 2**62], offsets=(0, 0))}), "2**63 elements"),
        (pack({"a": entry(shape=[2**62], offsets=(0, 2**62))}, b"x"), "is truncated"),
        (pack({"a": entry(offsets=(1, 2))}, b"xx"), "leaves a hole"),
        (pack({"a": entry(), "b": entry()}, b"x"), "overlaps another"),
        (pack({"a": entry(), "b": entry(offsets=(2, 3))}, b"xxx"), "leaves a hole"),
        (pack({"a": entry()}), "is truncated"),
        (pack({"a": entry()}, b"xx"), "bytes after its last tensor"),
        (pack({}, b"x"), "bytes after its last tensor"),
        (pack(b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "surrogate"),
    ],
)
def test_malformed(raw, says):
    assert says in refused(raw)


def test_a_header_longer_than_any_real_one():
    header = b"{}".ljust(16 * 2**20 + 1)
    assert "header of at most 16777216" in refused(pack(header))
    assert read_header(Memory(pack(header[:-1]))) == {}


def test_names_are_shown_escaped_and_short():
    name = "\x1b[31m\r\n‮" + "x" * 10_000
    message = refused(pack({name: entry("X8")}, b"x"))
    assert "\\x1b" in message
    assert "(10008 characters)" in message


@given(text=st.text())
def test_quoted_is_printable_ascii_and_short(text):
    shown = quoted(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) < 900


def test_metadata_is_ignored_even_null():
    raw = pack({"__metadata__": None, "a": entry()}, b"x")
    assert list(read_header(Memory(raw))) == ["a"]
    assert deserialize(raw)[0][0] == "a"


def test_the_file_that_spans_name():
    raw = pack({"a": entry()}, b"x")
    assert read_header(Memory(raw, "org/repo/a"))["a"].file == "org/repo/a"
    assert read_header(Memory(raw, "org/repo/a"), "a")["a"].file == "a"


SEED_FILE = save(
    {"b": np.ones((2, 3), np.float32), "a": np.ones(4, np.float16), "empty": np.ones((0, 2))},
    {"format": "pt"},
)


@settings(max_examples=400)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(SEED_FILE) - 1),
            st.integers(0, 4),
            st.binary(max_size=4) | st.sampled_from([b"[", b"{", b'"', b"0", b"-", b"9" * 20]),
        ),
        min_size=1,
        max_size=4,
    ),
    fix_length=st.booleans(),
)
@example(edits=[(0, 8, b"\xff" * 8)], fix_length=False)
def test_mutated_files_are_read_in_bounds_or_refused(edits, fix_length):
    raw = bytearray(SEED_FILE)
    for position, removed, inserted in edits:
        raw[position : position + removed] = inserted
    if fix_length and len(raw) > 8:
        grown = len(raw) - len(SEED_FILE)
        length = max(int.from_bytes(SEED_FILE[:8], "little") + grown, 0)
        raw[:8] = struct.pack("<Q", length)
    reader = Memory(bytes(raw))
    spans = header_or_refusal(reader)
    if spans is None:
        return
    assert deserialize(reader.raw) is not None  # whatever we accept, the official loader does
    for span in spans.values():
        assert 0 <= span.start <= span.stop <= reader.size
        with contextlib.suppress(CarrierError):
            read_rows(reader, span, 0, span.rows)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner
        )
    ),
    max_leaves=10,
)
likely_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "X", None]),
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=400)
@given(
    header=st.dictionaries(st.text(max_size=3), json_values | likely_entries, max_size=3),
    data=st.binary(max_size=16),
)
def test_invented_headers_are_accepted_only_if_the_official_loader_does(header, data):
    reader = Memory(pack(header, data))
    spans = header_or_refusal(reader)
    if spans is None:
        return
    official = {name: (found["dtype"], tuple(found["shape"])) for name, found in
                deserialize(reader.raw)}  # fmt: skip
    assert official == {name: (span.dtype, span.shape) for name, span in spans.items()}


@given(raw=st.binary(max_size=200))
def test_noise_is_refused(raw):
    try:
        read_header(Memory(raw))
    except MalformedCheckpointError:
        with pytest.raises(SafetensorError):
            deserialize(raw)


def test_a_huge_file_costs_only_its_header():
    class Huge(Memory):
        def read(self, start, stop):
            return super().read(start, stop) if stop <= len(self.raw) else self.fail()

        def fail(self):
            raise AssertionError("read past the header")

    header = json.dumps({"w": entry("F32", (2**30,), (0, 2**32))}).encode().ljust(40_000)
    reader = Huge(pack(header))
    reader.size += 2**32
    tracemalloc.start()
    assert read_header(reader)["w"].rows == 2**30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20

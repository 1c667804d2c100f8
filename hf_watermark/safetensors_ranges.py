"""Tensors of a safetensors file as byte spans, read through anything that can read a range.

A file is ``<u64 header length><JSON header><data>``. Only the header and the rows asked for are
read. A file comes from a stranger: its header is parsed strictly, as the official loader demands
and a little more, so that two readers can never see two different models in the same bytes.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import CarrierError, MalformedCheckpointError

__all__ = [
    "DTYPE_BITS",
    "Reader",
    "TensorSpan",
    "decode_rows",
    "quoted",
    "read_header",
    "read_rows",
]

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype of safetensors 0.8."""

_DECODED = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_LENGTH_BYTES = 8
_MAX_HEADER = 16 * 2**20  # the largest headers on the Hub hold a few hundred kilobytes
_FIRST_READ = 32 * 2**10  # a ViT-Large header is 40 KB, a ViT-Base one 20 KB: one request for most
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**63 - 1
_MAX_DIGITS = 19
_FIELDS = {"dtype", "shape", "data_offsets"}
_DO_MALFORMED = "download the file again, or ask its publisher: no loader should accept it"


class Reader(Protocol):
    """Bytes of one file.

    Law: ``read(start, stop)`` with ``0 <= start <= stop <= size`` returns exactly ``stop - start``
    bytes or raises a `WatermarkError`. Safe to call from several threads.
    """

    @property
    def name(self) -> str:
        """What messages call the file."""

    @property
    def size(self) -> int:
        """Length of the file in bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes from ``start`` up to, not including, ``stop``."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where one tensor lies.

    Args:
        name: The tensor's name, as its header spells it.
        file: The file that holds it.
        dtype: A safetensors dtype, a key of `DTYPE_BITS`.
        shape: The tensor's dimensions.
        start: Absolute offset of its first byte in the file.
        stop: Absolute offset just past its last byte.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """The first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements in a row: the product of the other dimensions."""
        return math.prod(self.shape[1:])

    @property
    def weights(self) -> int:
        """Elements in the tensor."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes in a row.

        Raises:
            CarrierError: A row of a sub-byte dtype does not end on a byte.
        """
        bits = self.columns * DTYPE_BITS[self.dtype]
        if bits % 8:
            raise CarrierError(
                f"rows of tensor {quoted(self.name)} do not end on a byte",
                expected=_decodable(),
                got=f"{self.dtype} with {self.columns} columns",
            )
        return bits // 8


def quoted(text: str, limit: int = 80) -> str:
    """A stranger's text made safe to print: escaped, in quotes, at most about ``limit`` long."""
    if len(text) > limit:
        return f"{text[:limit]!a}... ({len(text)} characters)"
    return ascii(text)


def read_header(reader: Reader, file: str | None = None) -> dict[str, TensorSpan]:
    """Read and check a file's header.

    Args:
        reader: The whole file. One read of up to 32 KiB suffices for most headers, two for all.
        file: What the spans say in `TensorSpan.file`; the reader's name by default.

    Returns:
        A span per tensor, in the order of the header. Law: the spans tile the data section
        without gap or overlap, and every span lies inside the file.

    Raises:
        MalformedCheckpointError: The file is not what the format promises.
    """
    what = f"the header of {quoted(reader.name, 300)}"
    if reader.size < _LENGTH_BYTES:
        raise MalformedCheckpointError(
            f"{quoted(reader.name, 300)} is no safetensors file",
            expected="at least 8 bytes",
            got=f"{reader.size}",
            do="download it again; a Git LFS pointer or an error page is not the file",
        )
    head = reader.read(0, min(_FIRST_READ, reader.size))
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    limit = min(_MAX_HEADER, reader.size - _LENGTH_BYTES)
    if not 0 < length <= limit:
        raise MalformedCheckpointError(
            f"{quoted(reader.name, 300)} is truncated or no safetensors file",
            expected=f"a header of at most {limit} bytes, not empty",
            got=f"a length field of {length}",
            do="download it again; a Git LFS pointer or an error page is not the file",
        )
    data_start = _LENGTH_BYTES + length
    if data_start > len(head):
        head += reader.read(len(head), data_start)
    entries = _parse(head[_LENGTH_BYTES:data_start], what)
    name = reader.name if file is None else file
    spans = {key: _span(key, entry, name, data_start, what) for key, entry in entries.items()}
    _check_tiling(spans, data_start, reader)
    return spans


def decode_rows(raw: bytes, span: TensorSpan, count: int) -> npt.NDArray[np.float32]:
    """Decode rows of a floating tensor.

    Args:
        raw: ``count * span.row_bytes`` bytes.
        span: The tensor that the rows belong to.
        count: Number of rows.

    Returns:
        (count, span.columns) float32, writable. Exact for F16, BF16 and F32; F64 is rounded.

    Raises:
        CarrierError: Another dtype, or a weight that is NaN, infinite or beyond float32.
        MalformedCheckpointError: ``raw`` has the wrong length.
    """
    if span.dtype not in _DECODED:
        raise CarrierError(
            f"weights of tensor {quoted(span.name)} cannot carry a mark",
            expected=_decodable(),
            got=span.dtype,
            do="use the checkpoint before it was quantised",
        )
    if len(raw) != count * span.row_bytes:
        raise MalformedCheckpointError(
            f"rows of tensor {quoted(span.name)} have the wrong length",
            expected=f"{count * span.row_bytes} bytes",
            got=f"{len(raw)}",
        )
    stored = np.frombuffer(raw, dtype=_DECODED[span.dtype])
    if span.dtype == "BF16":
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, refused below
            values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise CarrierError(
            f"tensor {quoted(span.name)} holds weights that are not finite",
            expected="finite float32 values",
            got=f"{np.count_nonzero(~np.isfinite(values))} of {values.size} NaN or infinite",
            do="use a checkpoint from before training diverged",
        )
    return values.reshape(count, span.columns)


def read_rows(reader: Reader, span: TensorSpan, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Read and decode rows ``start`` to ``stop`` (excluded) of a tensor.

    Returns:
        (stop - start, span.columns) float32; see `decode_rows` for what is refused.

    Raises:
        CarrierError: The tensor has no such rows.
    """
    if not 0 <= start <= stop <= span.rows:
        raise CarrierError(
            f"tensor {quoted(span.name)} has no rows {start} to {stop}",
            expected=f"rows within 0 to {span.rows}",
        )
    if span.dtype not in _DECODED:
        return decode_rows(b"", span, 0)  # refuse before reading
    raw = reader.read(span.start + start * span.row_bytes, span.start + stop * span.row_bytes)
    return decode_rows(raw, span, stop - start)


def _parse(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a header into its entries, its metadata checked and dropped."""
    if raw[:1] != b"{":
        raise MalformedCheckpointError(
            f"{what} does not start with a brace", got=quoted(repr(raw[:16])), do=_DO_MALFORMED
        )
    try:
        entries: dict[str, Any] = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_bounded_int,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise MalformedCheckpointError(f"{what} is nested too deeply", do=_DO_MALFORMED) from None
    except UnicodeDecodeError:
        raise MalformedCheckpointError(f"{what} is not UTF-8", do=_DO_MALFORMED) from None
    except ValueError as error:
        raise MalformedCheckpointError(
            f"{what} is not the JSON of a safetensors file",
            got=quoted(str(error), 200),
            do=_DO_MALFORMED,
        ) from None
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise MalformedCheckpointError(
            f"__metadata__ in {what} is malformed", expected="texts by name", do=_DO_MALFORMED
        )
    return entries


def _span(name: str, entry: object, file: str, data_start: int, what: str) -> TensorSpan:
    """Check one entry; offsets become absolute."""

    def refuse(expected: str, got: str) -> NoReturn:
        raise MalformedCheckpointError(
            f"tensor {quoted(name)} in {what} is malformed",
            expected=expected,
            got=got,
            do=_DO_MALFORMED,
        )

    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, which no terminal or file could take
            refuse("a name in Unicode", "a lone surrogate")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        refuse("exactly dtype, shape and data_offsets", _shown(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse("a dtype of safetensors 0.8", _shown(dtype))
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        refuse(f"a shape of up to {_MAX_DIMENSIONS} natural numbers", _shown(shape))
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("data_offsets of two growing natural numbers", _shown(offsets))
    # An empty tensor may not hide dimensions whose product a loader could not hold.
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        refuse("fewer than 2**63 elements", _shown(shape))
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        refuse(
            f"{dtype} {_shown(shape)} in {-(-bits // 8)} bytes", f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorSpan(
        name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1]
    )


def _check_tiling(spans: Mapping[str, TensorSpan], data_start: int, reader: Reader) -> None:
    """Refuse gaps, overlaps, and data that ends before or after the file does."""
    position = data_start
    for span in sorted(spans.values(), key=lambda span: (span.start, span.stop)):
        if span.start != position:
            kind = "overlaps another" if span.start < position else "leaves a hole before it"
            raise MalformedCheckpointError(
                f"tensor {quoted(span.name)} in {quoted(reader.name, 300)} {kind}",
                expected=f"a start at byte {position}",
                got=f"{span.start}",
                do=_DO_MALFORMED,
            )
        position = span.stop
    if position != reader.size:
        kind = "is truncated" if position > reader.size else "has bytes after its last tensor"
        raise MalformedCheckpointError(
            f"{quoted(reader.name, 300)} {kind}",
            expected=f"{position} bytes by its header",
            got=f"{reader.size}",
            do="download it again",
        )


def _shown(value: object) -> str:
    """A parsed value, short: nested ones by type only, for `repr` recurses as deep as they do."""
    if isinstance(value, list) and len(value) <= 8 and all(type(item) is int for item in value):
        return str(value)
    if isinstance(value, dict):
        return f"keys {', '.join(quoted(key, 20) for key in list(value)[:4])}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return quoted(value) if isinstance(value, str) else type(value).__name__


def _naturals(values: object) -> bool:
    """Whether a parsed value is a list of ints (no bools) that are not negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: with a key twice, loaders disagree on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {quoted(key)} twice in an object")
            seen.add(key)
    return found


def _bounded_int(text: str) -> int:
    """An integer of up to 19 digits: converting longer ones takes quadratic time."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} characters")
    if text == "-0":  # the official loader takes it for a float, and refuses
        raise ValueError("a negative zero")
    return int(text)


def _no_number(text: str) -> NoReturn:
    """A safetensors header holds no fractions and no NaN."""
    raise ValueError(f"number {quoted(text, 40)} where only integers may stand")


def _decodable() -> str:
    return f"dtype {', '.join(sorted(_DECODED))}"

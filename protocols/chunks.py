"""A `Chunk` (federation.proto) as it is serialised, without protobuf copying its data.

A chunk is megabytes long, and protobuf copies the data three times on its way out and twice on its way in. What stands
before the data is a few bytes that both sides can make for themselves.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from . import federation_pb2 as wire
from .errors import MalformedMessage

_DATA_TAG = b"\x12"  # field 2, of a length that follows


def serialized(index: int, data: bytes) -> bytes:
    """What `Chunk(index=index, data=data).SerializeToString()` gives for data that is not empty."""
    return b"".join((_header(index, len(data)), data))


def parsed(raw: bytes, expected: int) -> tuple[int, memoryview]:
    """Index and data of a serialised chunk; quickly when it is chunk `expected`, and right in any case.

    Raises:
        MalformedMessage: `raw` is no chunk.
    """
    header = wire.Chunk(index=expected).SerializeToString() + _DATA_TAG
    if raw.startswith(header):
        # The length fills what is left exactly, so no field can follow, and an index given twice cannot come before.
        for digits in range(1, 6):
            data = memoryview(raw)[len(header) + digits :]
            if raw[: len(header) + digits] == _header(expected, len(data)):
                return expected, data
    try:
        chunk = wire.Chunk.FromString(raw)
    except DecodeError:
        raise MalformedMessage("not a chunk") from None
    return chunk.index, memoryview(chunk.data)


def _header(index: int, size: int) -> bytes:
    return wire.Chunk(index=index).SerializeToString() + _DATA_TAG + _varint(size)


def _varint(value: int) -> bytes:
    """Base 128, the least significant digit first, the top bit set on all but the last."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])

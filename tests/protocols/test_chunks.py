"""Chunks as they travel: the same bytes as protobuf's, and read as protobuf reads them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from farfield.protocols import federation_pb2 as wire
from farfield.protocols.chunks import parsed, serialized
from farfield.protocols.errors import MalformedMessage

indices = st.integers(0, 2**64 - 1) | st.integers(0, 300)


@given(indices, st.binary(min_size=1, max_size=300), indices)
@example(0, bytes(127), 0)
@example(0, bytes(128), 0)
@example(127, bytes(2**14 - 1), 127)
@example(128, bytes(2**14), 128)
@example(1, bytes(2**21), 1)
def test_it_is_what_protobuf_makes_of_it(index: int, data: bytes, expected: int) -> None:
    raw = serialized(index, data)
    assert raw == wire.Chunk(index=index, data=data).SerializeToString()
    for guess in (index, expected):
        number, content = parsed(raw, guess)
        assert (number, bytes(content)) == (index, data)


pieces = st.lists(
    st.binary(max_size=6)
    | st.builds(serialized, st.integers(0, 3), st.binary(max_size=9))
    | st.sampled_from([b"\x08\x01", b"\x08\x00", b"\x12\x00", b"\x12\x80\x00", b"\x12\x03abc", b"\x1a\x01x"]),
    max_size=4,
).map(b"".join)


@given(pieces, st.integers(0, 3))
def test_any_bytes_mean_what_they_mean_to_protobuf(raw: bytes, expected: int) -> None:
    try:
        chunk = wire.Chunk.FromString(raw)
    except DecodeError:
        with pytest.raises(MalformedMessage):
            parsed(raw, expected)
    else:
        number, content = parsed(raw, expected)
        assert (number, bytes(content)) == (chunk.index, chunk.data)

"""Masks: what hides a client's vector until the masks of all clients are summed, where they cancel.

A mask is the AES-CTR stream of its 32-byte key, read as little-endian words and added to the vector with wraparound,
modulo 2³² or 2¹⁶.

AES-128, with the key's first half as cipher key and its second half as first counter block. A key comes from X25519,
which gives 128 bits; AES-256, as in Google's federated-compute, would be a quarter slower and no stronger than that.
What 128-bit keys alone would lose is that one search over all keys attacks every stream ever made; with a first block
that is secret and differs from stream to stream, nothing is shared between two searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from farfield.protocols.errors import SecAggError

KEY_BYTES: Final = 32
BLOCK_BYTES: Final = 1 << 17
"""Vector, zeros and stream of one block stay in the core's own cache while every stream passes over them."""

Words: TypeAlias = NDArray[np.uint32] | NDArray[np.uint16]
"""A vector modulo 2³² or modulo 2¹⁶."""


def add(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the masks of the keys `plus` to `vector` and take those of `minus` off, in place.

    Args:
        vector: one-dimensional, contiguous, uint32 or uint16.
        plus: keys of `KEY_BYTES` bytes, none used for another vector.
        minus: the same.

    Raises:
        SecAggError: a key of another length.
    """
    added, removed = [_stream(key) for key in plus], [_stream(key) for key in minus]
    zeros, drawn = memoryview(bytes(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))
    values = BLOCK_BYTES // vector.itemsize
    for start in range(0, len(vector), values):
        block = vector[start : start + values]
        nothing, raw = zeros[: block.nbytes], drawn[: block.nbytes]
        mask = np.frombuffer(raw, vector.dtype.newbyteorder("<"))
        for stream in added:
            stream.update_into(nothing, raw)
            np.add(block, mask, out=block)
        for stream in removed:
            stream.update_into(nothing, raw)
            np.subtract(block, mask, out=block)


def _stream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise SecAggError(f"the key of a mask has {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES128(key[:16]), modes.CTR(key[16:])).encryptor()

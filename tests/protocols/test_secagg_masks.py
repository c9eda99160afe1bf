import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import SecAggError
from farfield.protocols.secagg import masks
from farfield.protocols.secagg.masks import BLOCK_BYTES, KEY_BYTES, Words, add

keys = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=4)
dtypes = st.sampled_from([np.uint16, np.uint32])


def stream(key: bytes, length: int, dtype: type[np.uint16] | type[np.uint32]) -> Words:
    """The mask of a key as the module's docstring defines it, in one piece."""
    raw = Cipher(algorithms.AES128(key[:16]), modes.CTR(key[16:])).encryptor().update(bytes(length * dtype().itemsize))
    return np.frombuffer(raw, np.uint16) if dtype is np.uint16 else np.frombuffer(raw, np.uint32)


@settings(max_examples=50)
@given(keys, keys, dtypes, st.integers(0, 200))
def test_the_masks_are_the_ciphers_streams(
    plus: list[bytes], minus: list[bytes], dtype: type[np.uint32], length: int
) -> None:
    vector = np.arange(length, dtype=dtype) * dtype(40503)
    expected = vector.copy()
    for key in plus:
        expected += stream(key, length, dtype)
    for key in minus:
        expected -= stream(key, length, dtype)
    with pytest.MonkeyPatch.context() as small_blocks:
        small_blocks.setattr(masks, "BLOCK_BYTES", 64)
        add(vector, plus, minus)
    assert np.array_equal(vector, expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_blocks_meet_without_a_seam(dtype: type[np.uint32], beyond: int) -> None:
    length = 2 * BLOCK_BYTES // dtype().itemsize + beyond
    vector = np.zeros(length, dtype)
    add(vector, [b"k" * KEY_BYTES], [])
    assert np.array_equal(vector, stream(b"k" * KEY_BYTES, length, dtype))


@settings(max_examples=50)
@given(keys, keys, dtypes, st.integers(0, 2**32 - 1))
def test_what_was_added_can_be_taken_off(
    plus: list[bytes], minus: list[bytes], dtype: type[np.uint32], value: int
) -> None:
    vector = np.full(33, value % 2**16, dtype)
    add(vector, plus, minus)
    add(vector, minus, plus)
    assert (vector == value % 2**16).all()


def test_each_half_of_the_key_changes_the_whole_mask() -> None:
    """Of 1,000 uniform words two equal ones are in the same place with probability 2.3e-7."""
    base = stream(bytes(KEY_BYTES), 1000, np.uint32)
    for byte in (0, KEY_BYTES - 1):
        key = bytearray(KEY_BYTES)
        key[byte] = 128
        vector = np.zeros(1000, np.uint32)
        add(vector, [bytes(key)], [])
        assert not (vector == base).any()


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(KEY_BYTES - 1), bytes(KEY_BYTES + 1)])
def test_a_key_of_another_length_is_refused_before_anything_changes(key: bytes) -> None:
    vector = np.zeros(10, np.uint32)
    for plus, minus in (([bytes(KEY_BYTES), key], []), ([bytes(KEY_BYTES)], [key])):
        with pytest.raises(SecAggError, match="32 bytes"):
            add(vector, plus, minus)
    assert not vector.any()

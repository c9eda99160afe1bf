"""Fixed point: real vectors as integers that can be summed modulo 2^16, 2^24 or 2^32 without overflow, and packed.

A value v in [-limit, limit] becomes an integer in [-L, L] by stochastic rounding of v·L/limit: up with the
probability of the fraction, so the rounding errors of many clients and rounds average to zero. Vectors are uint16 for
the modulus 2^16 and uint32 otherwise, in two's complement; of a uint32 vector modulo 2^24 only the low 24 bits count.
All passes go block by block through the core's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import SecAggError
from farfield.protocols.randomness import Randomness

from .masks import Words

MODULI: Final = (16, 24, 32)
LARGEST_COUNT: Final = 2**48 - 1
BLOCK: Final = 1 << 15
"""So many values at a time, and what is computed on the way, stay in the core's own cache."""


def choose_modulus(clients: int, bits: int) -> tuple[int, int]:
    """The bits of the smallest modulus that holds the sum of `clients` values of `bits` bits, and the levels L.

    L is the greatest with clients·(2L + 1) ≤ 2^modulus_bits: what the modulus leaves over makes values finer.

    Raises:
        SecAggError: none of the moduli holds so much.
    """
    if clients < 1 or bits < 2:
        raise SecAggError(f"{clients} clients with values of {bits} bits: at least one client and two bits are needed")
    for modulus_bits in MODULI:
        if clients * (2**bits - 1) <= 2**modulus_bits:
            return modulus_bits, (2**modulus_bits // clients - 1) // 2
    raise SecAggError(
        f"the sum of {clients} values of {bits} bits does not fit into 32 bits", hint="fewer bits or a smaller cohort"
    )


def zeros(length: int, modulus_bits: int) -> Words:
    """A vector of the type that belongs to the modulus."""
    return np.zeros(length, np.uint16) if modulus_bits == 16 else np.zeros(length, np.uint32)


def encode(values: NDArray[np.float32], limit: float, levels: int, out: Words, random: Randomness) -> None:
    """Clip `values` to ±limit, round v·levels/limit stochastically, and write it into `out`.

    A value that lies on a level comes out exactly. Otherwise the expected result differs from v·levels/limit, as
    computed in float32, by 2⁻²² of a level at most: 23 random bits decide.

    Args:
        values: one-dimensional, float32.
        limit: from 10⁻²⁰ to 10²⁰.
        out: of the same length, uint32 or uint16.

    Raises:
        SecAggError: a value is not finite, the lengths differ, or `levels` do not fit into `out`.
    """
    if out.shape != values.shape or levels > 2 ** (8 * out.itemsize - 1) - 1:
        raise SecAggError(f"{values.shape} values in ±{levels} do not fit into {out.shape} of {out.dtype}")
    bound, scale = _scale(limit, levels)
    signed = out.view(np.int16) if out.itemsize == 2 else out.view(np.int32)
    scaled, whole = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in _blocks(len(values)):
        value, target = values[block], signed[block]
        x, floor = scaled[: len(value)], whole[: len(value)]
        # A NaN makes both comparisons false.
        if not (value.min() > -np.inf and value.max() < np.inf):
            raise SecAggError("a value to be summed is not finite")
        np.clip(value, -bound, bound, out=x)
        np.multiply(x, scale, out=x)
        np.floor(x, out=floor)
        np.subtract(x, floor, out=x)
        np.add(x, _one_to_two(random, len(value)), out=x)
        np.floor(x, out=x)
        # In this order it is exact: a value of 2²³ or more has no fraction, and 0 is added to it.
        np.subtract(x, 1, out=x)
        np.add(x, floor, out=x)
        target[:] = x


def decode(total: Words, modulus_bits: int, limit: float, levels: int) -> NDArray[np.float64]:
    """The sum of the clients' values: `total`, taken as a number in ±2^(modulus_bits - 1), times limit/levels."""
    unused = 8 * total.itemsize - modulus_bits
    signed = total.view(np.int16) if total.itemsize == 2 else total.view(np.int32)
    values = np.empty(len(total))
    for block in _blocks(len(total)):
        # Left and back right: what lies above the modulus falls out, and the sign is extended.
        np.multiply(signed[block] << unused >> unused, limit / levels, out=values[block])
    return values


def pack(vector: Words, modulus_bits: int, head: bytes = b"") -> memoryview:
    """`head`, and then 2, 3 or 4 bytes a value, little-endian; with 3, first all low 16 bits and then all high 8 bits.

    A head that is put before the values later copies them, which takes longer than packing them.
    """
    packed = np.empty(len(head) + modulus_bits // 8 * len(vector), np.uint8)
    packed.data[: len(head)] = head
    body = packed[len(head) :]
    if modulus_bits != 24:
        body.view(vector.dtype.newbyteorder("<"))[:] = vector
        return packed.data
    low, high = _planes(body)
    for block in _blocks(len(vector)):
        low[block] = vector[block]
        high[block] = vector[block] >> 16
    return packed.data


def unpack(raw: bytes | memoryview, modulus_bits: int, length: int) -> Words:
    """The vector of `length` values that was packed.

    Raises:
        SecAggError: `raw` has not exactly the bytes of such a vector.
    """
    vector = zeros(length, modulus_bits)
    accumulate(vector, raw, modulus_bits)
    return vector


def accumulate(total: Words, raw: bytes | memoryview, modulus_bits: int) -> None:
    """Add a packed vector to `total`, in place.

    Raises:
        SecAggError: `raw` has not exactly the bytes of a vector as long as `total`; nothing was added.
    """
    width = modulus_bits // 8
    if len(raw) != len(total) * width:
        raise SecAggError(f"a vector of {len(total)} values of {width} bytes has not {len(raw)} bytes")
    if modulus_bits != 24:
        np.add(total, np.frombuffer(raw, total.dtype.newbyteorder("<")), out=total)
        return
    low, high = _planes(np.frombuffer(raw, np.uint8))
    for block in _blocks(len(total)):
        np.add(total[block], low[block], out=total[block])
        np.add(total[block], high[block].astype(np.uint32) << 16, out=total[block])


def encode_count(value: int, clients: int, modulus_bits: int, limbs: int) -> Words:
    """A non-negative integer as `limbs` words, least significant first, that `clients` of them can be summed in.

    Raises:
        SecAggError: `value` needs more limbs, is negative or above 2⁴⁸ - 1, or so many clients leave no bit for a limb.
    """
    width = _limb_bits(clients, modulus_bits)
    if not 0 <= value <= min(LARGEST_COUNT, (1 << width * limbs) - 1):
        raise SecAggError(f"the count {value} does not fit into {limbs} limbs of {width} bits")
    encoded = zeros(limbs, modulus_bits)
    encoded[:] = [value >> width * limb & (1 << width) - 1 for limb in range(limbs)]
    return encoded


def decode_counts(total: Words, clients: int, modulus_bits: int) -> int:
    """The exact sum of the counts whose limbs were summed to `total`."""
    width = _limb_bits(clients, modulus_bits)
    words: list[int] = total.tolist()
    return sum((word & (1 << modulus_bits) - 1) << width * limb for limb, word in enumerate(words))


def count_limbs(largest: int, clients: int, modulus_bits: int) -> int:
    """How many limbs `encode_count` needs for counts up to `largest`, at most 2⁴⁸ - 1."""
    return max(1, -(-largest.bit_length() // _limb_bits(clients, modulus_bits)))


def _limb_bits(clients: int, modulus_bits: int) -> int:
    """The greatest b with clients·(2^b - 1) < 2^modulus_bits."""
    width = (((1 << modulus_bits) - 1) // clients + 1).bit_length() - 1
    if width < 1:
        raise SecAggError(f"counts of {clients} clients cannot be summed modulo 2^{modulus_bits}")
    return width


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _planes(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """The low 16 and the high 8 bits of packed 24-bit values. As planes, both can be read and written at full speed."""
    length = len(packed) // 3
    return packed[: 2 * length].view("<u2"), packed[2 * length :]


def _scale(limit: float, levels: int) -> tuple[np.float32, np.float32]:
    """The bound of values in float32, and what takes it to at most `levels`, whichever way float32 rounds."""
    if not (1e-20 <= limit <= 1e20 and levels >= 1):
        raise SecAggError(f"values in ±{limit} cannot have {levels} levels")
    bound = np.float32(limit)
    scale = np.float32(levels / float(bound))
    while float(bound * scale) > levels:
        scale = np.nextafter(scale, np.float32(0))
    return bound, scale


def _one_to_two(random: Randomness, count: int) -> NDArray[np.float32]:
    """Uniform multiples of 2⁻²³ in [1, 2): 23 random bits as the fraction of a float32 whose exponent is 0."""
    words = random.words32(count)
    np.right_shift(words, 9, out=words)
    np.bitwise_or(words, 0x3F800000, out=words)
    return words.view(np.float32)

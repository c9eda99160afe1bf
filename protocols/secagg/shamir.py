"""Shamir's sharing of a 32-byte secret: any `threshold` shares give it back, fewer say nothing about it (Shamir 1979).

The secret is cut into sixteen 16-bit limbs, and each is shared by itself over the field of p = 65537 elements: limb s
becomes f(x) = s + c₁x + … + c_{t-1}x^{t-1} mod p with uniform c, and holder x gets f(x). A product of two elements is
below 2³³ and a sum of `threshold` of them far below 2⁵³, so a matrix product in float64 is exact, and one of them
shares or reconstructs everything at once. Powers and quotients of the public x are looked up as logarithms to base 3,
which generates the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import SecAggError
from farfield.protocols.randomness import Randomness

SECRET_BYTES: Final = 32
LIMBS: Final = SECRET_BYTES // 2
SHARE_BYTES: Final = 4 * LIMBS
"""A share is sixteen little-endian 32-bit field elements."""

PRIME: Final = 65537
GENERATOR: Final = 3

Elements: TypeAlias = NDArray[np.float64]
"""Field elements, as integers in [0, p)."""


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share for each of `holders`; share i belongs to the holder x = i + 1.

    Args:
        secret: `SECRET_BYTES` bytes.
        threshold: how many shares give the secret back, from 2 to `holders`.
        holders: at most 65536.

    Raises:
        SecAggError: the numbers or the secret's length are out of these bounds.
    """
    if len(secret) != SECRET_BYTES:
        raise SecAggError(f"a secret to be shared has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 2 <= threshold <= holders < PRIME:
        raise SecAggError(
            f"{holders} shares of which {threshold} suffice: 2 ≤ threshold ≤ shares ≤ {PRIME - 1} is needed"
        )
    coefficients = np.empty((threshold, LIMBS))
    coefficients[0] = np.frombuffer(secret, "<u2")
    coefficients[1:] = _uniform(Randomness(), (threshold - 1) * LIMBS).reshape(threshold - 1, LIMBS)
    shares = (_powers(threshold, holders) @ coefficients).astype(np.int64) % PRIME
    raw = shares.astype("<u4").tobytes()
    return [raw[start : start + SHARE_BYTES] for start in range(0, len(raw), SHARE_BYTES)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret. See `combine_all`."""
    return combine_all([shares], threshold)[0]


def combine_all(shares: Sequence[Mapping[int, bytes]], threshold: int) -> list[bytes]:
    """The secrets, each from its shares by holder x ≥ 1. Fastest where many secrets have the same holders.

    `threshold` shares determine a secret; where there are more, all must agree, so a wrong one among them is noticed.

    Raises:
        SecAggError: too few shares, a holder that cannot be, a share that is malformed, or shares that contradict one
            another.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, held in enumerate(shares):
        groups.setdefault(tuple(sorted(held)), []).append(position)
    secrets = [b""] * len(shares)
    for holders, positions in groups.items():
        combined = _combine([shares[position] for position in positions], holders, threshold)
        for position, secret in zip(positions, combined, strict=True):
            secrets[position] = secret
    return secrets


def _combine(shares: Sequence[Mapping[int, bytes]], holders: tuple[int, ...], threshold: int) -> list[bytes]:
    if threshold < 2 or len(holders) < threshold:
        raise SecAggError(f"{len(holders)} shares of a secret, of which {threshold} are needed")
    if not 1 <= holders[0] <= holders[-1] < PRIME:
        raise SecAggError(f"a share of holder {holders[0]} or {holders[-1]}, which cannot be")
    if any(len(share) != SHARE_BYTES for held in shares for share in held.values()):
        raise SecAggError(f"a share of a secret that has not {SHARE_BYTES} bytes")
    raw = b"".join(held[holder] for holder in holders for held in shares)
    values = np.frombuffer(raw, "<u4").astype(np.float64).reshape(len(holders), len(shares) * LIMBS)
    if (values >= PRIME).any():
        raise SecAggError("a share of a secret that is no element of the field")
    known, extra = values[:threshold], values[threshold:]
    found = (_interpolation(holders, threshold) @ known).astype(np.int64) % PRIME
    if not np.array_equal(found[1:], extra):
        raise SecAggError("the shares of a secret contradict one another: some holder's is wrong")
    if (found[0] >= 1 << 16).any():
        raise SecAggError("the shares of a secret give no secret: some holder's is wrong")
    limbs = found[0].astype("<u2").tobytes()
    return [limbs[start : start + SECRET_BYTES] for start in range(0, len(limbs), SECRET_BYTES)]


def _uniform(random: Randomness, count: int) -> NDArray[np.uint32]:
    """`count` independent uniform field elements. 2³² = 65535·p + 1, so one word in 2³² is drawn again."""
    words = random.words32(count)
    while (over := words == 0xFFFFFFFF).any():
        words[over] = random.words32(int(over.sum()))
    return words % np.uint32(PRIME)


@lru_cache(maxsize=16)
def _powers(threshold: int, holders: int) -> Elements:
    """x^e for x = 1 … holders and e = 0 … threshold - 1, (holders, threshold)."""
    logarithms = _tables()[1]
    return _power(np.outer(logarithms[1 : holders + 1], np.arange(threshold)))


@lru_cache(maxsize=16)
def _interpolation(holders: tuple[int, ...], threshold: int) -> Elements:
    """The matrix that takes f at the first `threshold` holders to f at 0 and at the other holders (Lagrange).

    Shape (1 + len(holders) - threshold, threshold); entry (y, j) is ∏_{l≠j} (y - x_l) / (x_j - x_l).
    """
    logarithms = _tables()[1]
    points = np.array(holders[:threshold])
    targets = np.array((0, *holders[threshold:]))
    to_targets = logarithms[(targets[:, None] - points) % PRIME]
    # The tables say 0 for the logarithm of 0, which is how each x_j leaves itself out of its own product.
    between = logarithms[(points[:, None] - points) % PRIME].sum(axis=1)
    return _power(to_targets.sum(axis=1, keepdims=True) - to_targets - between)


def _power(exponents: NDArray[np.int64]) -> Elements:
    """3^e mod p."""
    powers: Elements = _tables()[0][exponents % (PRIME - 1)].astype(np.float64)
    return powers


@cache
def _tables() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """3^e for e = 0 … p - 2, and the logarithm to base 3 of 0 … p - 1, where that of 0 is said to be 0."""
    powers = np.ones(1, np.int64)
    while len(powers) < PRIME - 1:
        powers = np.concatenate([powers, powers * (int(powers[-1]) * GENERATOR % PRIME) % PRIME])
    logarithms = np.zeros(PRIME, np.int64)
    logarithms[powers] = np.arange(PRIME - 1)
    return powers, logarithms

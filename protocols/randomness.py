"""Random bits for masks, rounding and noise: AES-256 in counter mode under a fresh key from the operating system.

Whoever could foresee the noise could take it off again, so nothing here comes from a seeded generator of numpy or
torch (Mironov 2012; Garfinkel and Leclerc 2020, "Randomness concerns when deploying differential privacy").
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


class Randomness:
    """A stream of uniform bits that nobody can foresee or repeat."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: 32 bytes, for tests that must come out the same twice; None draws one, as everything else must."""
        cipher = Cipher(algorithms.AES256(key or secrets.token_bytes(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def __repr__(self) -> str:
        return "Randomness(…)"

    def words32(self, count: int) -> NDArray[np.uint32]:
        """`count` independent uniform 32-bit words."""
        return self._draw(4 * count).view("<u4")

    def words64(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit words."""
        return self._draw(8 * count).view("<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` independent uniform multiples of 2⁻⁵³ in [0, 1)."""
        drawn: NDArray[np.float64] = np.multiply(self.words64(count) >> np.uint64(11), 2.0**-53)
        return drawn

    def _draw(self, size: int) -> NDArray[np.uint8]:
        drawn = np.zeros(size, np.uint8)
        if size:
            self._stream.update_into(drawn.data, drawn.data)
        return drawn

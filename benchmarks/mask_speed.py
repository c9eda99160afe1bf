"""How fast masks are drawn and added, beside AES in counter mode by itself."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from stopwatch import Stopwatch

from farfield.protocols.secagg import masks
from farfield.protocols.secagg.masks import Words


def aes_speed(algorithm: type[algorithms.AES128] | type[algorithms.AES256], key_bytes: int) -> float:
    """GB/s of AES-CTR by `update_into` over a buffer in the core's cache."""
    stream = Cipher(algorithm(secrets.token_bytes(key_bytes)), modes.CTR(bytes(16))).encryptor()
    zeros, drawn, blocks = bytes(masks.BLOCK_BYTES), bytearray(masks.BLOCK_BYTES), 2000
    watch = Stopwatch()
    with watch:
        for _ in range(blocks):
            stream.update_into(zeros, drawn)
    return blocks * masks.BLOCK_BYTES / watch.took.busy / 1e9


def mask_speed(vector: Words) -> float:
    """GB/s of AES-CTR stream that `masks.add` draws and adds."""
    keys, watch = [secrets.token_bytes(masks.KEY_BYTES) for _ in range(8)], Stopwatch()
    with watch:
        masks.add(vector, keys[:4], keys[4:])
    return len(keys) * vector.nbytes / watch.took.busy / 1e9


@dataclass(slots=True)
class Speeds:
    """GB/s, in turn."""

    aes128: list[float]
    aes256: list[float]
    masks: list[float]

    def measure(self, vector: Words) -> None:
        self.aes128.append(aes_speed(algorithms.AES128, 16))
        self.masks.append(mask_speed(vector))
        self.aes256.append(aes_speed(algorithms.AES256, 32))

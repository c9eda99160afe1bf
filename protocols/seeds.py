"""Seeds for everything random that must come out the same twice."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every label, the same on every machine.

    `derive(7, "cohort", 3)` and `derive(7, "cohort", 4)` are unrelated; nothing is drawn from a shared generator, so
    no draw depends on how many came before it.
    """
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

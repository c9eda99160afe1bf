"""Who masks with whom: a random k-regular graph, the same on every machine for the same seed.

A Harary graph over shuffled clients (Bell et al. 2020, section 3): all stand in a ring in random order, and each is
the neighbour of the k/2 nearest on either side. It stays connected until k/2 in a row are missing in two places.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from farfield.protocols.errors import SecAggError

SEED_BYTES: Final = 32


def neighbours(clients: int, degree: int, seed: bytes) -> tuple[tuple[int, ...], ...]:
    """For each of the clients 0 … `clients` - 1, its `degree` neighbours in ascending order.

    Symmetric and connected, and nobody is its own neighbour. All are neighbours where `degree` is `clients` - 1.

    Args:
        degree: from 2 to `clients` - 1, and even where `clients` is odd.
        seed: `SEED_BYTES` bytes that nobody chose alone.

    Raises:
        SecAggError: no such graph exists, or the seed has another length.
    """
    if not 2 <= degree < clients or (degree % 2 and clients % 2):
        raise SecAggError(f"no graph in which each of {clients} clients has {degree} neighbours")
    if len(seed) != SEED_BYTES:
        raise SecAggError(f"the seed of a graph has {SEED_BYTES} bytes, not {len(seed)}")
    ring = np.array(_shuffled(clients, seed))
    steps = np.arange(1, degree // 2 + 1)
    around = np.concatenate([steps, -steps, [clients // 2] * (degree % 2)]).astype(np.int64)
    graph = np.empty((clients, degree), np.int64)
    graph[ring] = np.sort(ring[(np.arange(clients)[:, None] + around) % clients], axis=1)
    return tuple(map(tuple, graph.tolist()))


def _shuffled(clients: int, seed: bytes) -> list[int]:
    """0 … `clients` - 1 in the order of SHA-256(seed ‖ client): uniform, because equal digests do not occur."""
    return sorted(range(clients), key=lambda client: hashlib.sha256(seed + client.to_bytes(8)).digest())

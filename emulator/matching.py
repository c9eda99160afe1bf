"""Text whose gradient is like a given one, found by trying: for updates that do not show their tokens by themselves.

The objective is that of gradient matching (DLG, Zhu et al. 2019), with the cosine of LAMP (Balunović et al. 2022).
Token by token the best of a few candidates is kept. No gradient of a gradient is needed, so that every tuning method
can be matched, those of zeroth order too, and what it costs is known beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from farfield.protocols.tensors import State


def matched(
    update: State,
    answer: Callable[[list[int]], State],
    start: Sequence[int],
    pool: Sequence[int],
    tries: int,
    seed: int,
) -> tuple[list[int], float]:
    """The tokens whose update is most like `update`, and the cosine between the two.

    Args:
        answer: the update that training on these tokens makes.
        start: tokens to begin with, as many as are looked for.
        pool: tokens that are tried, the likelier ones first: of two draws the earlier is taken.
        tries: how often `answer` is asked.
        seed: decides what is tried where.
    """
    wanted, drawn = _flat(update), random.Random(seed)
    best, nearest = list(start), -1.0
    for number in range(tries):
        tried = list(best)
        if number:
            tried[drawn.randrange(len(tried))] = pool[min(drawn.randrange(len(pool)), drawn.randrange(len(pool)))]
        found = _flat(answer(tried))
        near = float(wanted @ found / max(float(np.linalg.norm(wanted) * np.linalg.norm(found)), 1e-30))
        if near > nearest:
            best, nearest = tried, near
    return best, nearest


def _flat(update: State) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([update[name].reshape(-1) for name in sorted(update)]).astype(np.float64)

"""Does a masked vector look like random words, and like nothing that was masked?

Three tests of one sample of words modulo 2^b, each with its own p-value: how often each value of each byte comes
(Pearson's χ²), how the words lie between 0 and 2^b (Kolmogorov and Smirnov), and whether they go up and down with the
values under the masks (Pearson's correlation, normal for as many words as there are here). Good masks fail one of them
with the probability of its level, and so does anything else that a computer cannot tell from randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, erfc, kolmogorov

_FEWEST = 1280
"""Words from which on each value of a byte is expected five times."""


@dataclass(frozen=True, slots=True)
class Uniformity:
    """The p-value of each test, and the correlation; None where there are too few words for the test."""

    words: int
    bytes_p: float | None
    spread_p: float
    correlation: float
    correlation_p: float

    @property
    def p(self) -> float:
        """Of all three together (Bonferroni)."""
        each = [one for one in (self.bytes_p, self.spread_p, self.correlation_p) if one is not None]
        return min(1.0, len(each) * min(each))


def uniformity(words: NDArray[np.unsignedinteger[Any]], bits: int, beneath: NDArray[np.floating[Any]]) -> Uniformity:
    """Whether `words` are uniform modulo 2^`bits`, and independent of what lies beneath them.

    Args:
        words: one dimension, two at least; bits above the lowest `bits`, a multiple of 8, do not count. There may be
            (2^`bits` / 20)² of them: more would show that words are whole numbers.
        beneath: of the same length.

    Raises:
        ValueError: lengths differ, or there are fewer words, or more.
    """
    if words.shape != beneath.shape or words.ndim != 1 or len(words) < 2:
        raise ValueError(f"{words.shape} words over {beneath.shape} values")
    if 20 * math.sqrt(len(words)) > 2**bits:
        raise ValueError(f"{len(words)} words modulo 2^{bits} cannot be told from continuous ones")
    whole = words.astype(np.uint64) & np.uint64((1 << bits) - 1)
    share = (whole.astype(np.float64) + 0.5) / 2.0**bits
    correlation = _correlation(share, np.asarray(beneath, np.float64))
    return Uniformity(
        len(words),
        _bytes_p(whole, bits // 8) if len(words) >= _FEWEST else None,
        _spread_p(share),
        correlation,
        float(erfc(abs(correlation) * math.sqrt(len(words) / 2))),
    )


def _bytes_p(words: NDArray[np.uint64], width: int) -> float:
    expected, square = len(words) / 256, 0.0
    for place in range(width):
        counts = np.bincount(((words >> np.uint64(8 * place)) & np.uint64(255)).astype(np.int64), minlength=256)
        square += float(np.square(counts - expected).sum()) / expected
    return float(chdtrc(255 * width, square))


def _spread_p(share: NDArray[np.float64]) -> float:
    ordered, n = np.sort(share), len(share)
    steps = np.arange(n + 1) / n
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    return float(kolmogorov(math.sqrt(n) * distance))


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / size if size else 0.0

"""Integers drawn from a given distribution, ten million of them in a fraction of a second.

The probabilities become whole multiples of 2⁻⁶³, and an alias table (Walker 1977; built by one sweep, as in
Hübschle-Schneider and Sanders 2019, "Parallel weighted random sampling") draws from exactly those: one random word and
one look into the table for each value. What is rarer than 2⁻²⁴ has a table of its own, so that the tails, where a
privacy guarantee is lost or kept, are as exact in proportion as the middle is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.randomness import Randomness

_BITS: Final = 63
_BLOCK: Final = 1 << 15  # values at a time; what is computed on the way stays in the processor's cache
_TAIL: Final = 2.0**-24


class Table:
    """Draws i with probability `quotas[i]` / 2⁶³, exactly.

    Args:
        quotas: uint64, at least one; their sum is 2⁶³.
    """

    def __init__(self, quotas: NDArray[np.uint64]) -> None:
        assert sum(quotas.tolist()) == 1 << _BITS
        self._index_bits = max(len(quotas) - 1, 1).bit_length()
        cells = 1 << self._index_bits
        padded = np.zeros(cells, np.uint64)
        padded[: len(quotas)] = quotas
        self._cells = self._swept(padded, np.uint64((1 << _BITS) // cells))

    def _swept(self, quota: NDArray[np.uint64], capacity: np.uint64) -> NDArray[np.uint64]:
        """Every cell of the table in one word: the part of it that is its own, and whose the rest is.

        Cells with too little are filled up in order, each from the first cell that still has too much; a cell that has
        so given away more than it could is filled up by the next. Where one begins and ends is read off running sums.
        """
        light, heavy = np.flatnonzero(quota < capacity), np.flatnonzero(quota > capacity)
        wanted, offered = np.cumsum(capacity - quota[light]), np.cumsum(quota[heavy] - capacity)
        threshold, alias = quota.copy(), np.arange(len(quota), dtype=np.uint64)
        threshold[quota >= capacity] = 0  # such a cell is its own alias, unless the lines below say otherwise
        if len(light):
            alias[light] = heavy[np.searchsorted(offered, wanted - (capacity - quota[light]), side="right")]
            overdrawn = wanted[np.searchsorted(wanted, offered, side="left")] - offered
            givers = np.flatnonzero(overdrawn)
            threshold[heavy[givers]] = capacity - overdrawn[givers]
            alias[heavy[givers]] = heavy[givers + 1]
        cells: NDArray[np.uint64] = (threshold << np.uint64(self._index_bits)) | alias
        return cells

    def quotas(self) -> list[int]:
        """What the cells add up to for each i: what was asked for, padded with zeros."""
        index_mask = (1 << self._index_bits) - 1
        capacity = 1 << (_BITS - self._index_bits)
        found = [0] * len(self._cells)
        for index, cell in enumerate(self._cells.tolist()):
            found[index] += cell >> self._index_bits
            found[cell & index_mask] += capacity - (cell >> self._index_bits)
        return found

    def draw(self, count: int, random: Randomness) -> NDArray[np.int64]:
        """`count` independent draws."""
        drawn = np.empty(count, np.uint64)
        bits, one = np.uint64(self._index_bits), np.uint64(1)
        index_shift, index_mask = np.uint64(_BITS - self._index_bits), np.uint64((1 << self._index_bits) - 1)
        within = np.uint64((1 << (_BITS - self._index_bits)) - 1)
        for start in range(0, count, _BLOCK):
            out = drawn[start : start + _BLOCK]
            words = random.words64(len(out)) >> one
            index = words >> index_shift
            cell = self._cells.take(index.view(np.int64))
            words &= within
            np.bitwise_and(cell, index_mask, out=out)
            np.copyto(out, index, where=words < (cell >> bits))
        return drawn.view(np.int64)


class Sampler:
    """Draws integers from a distribution that is symmetric about 0.

    Every probability is met to within 2⁻⁶⁴ in the middle and to within 2⁻⁸⁸ where less than 2⁻²⁴ lies beyond, besides
    the relative error of `half` itself.

    Args:
        half: float64, the probabilities of 0, 1, 2, …, up to a common factor; what lies beyond them is never drawn.
    """

    def __init__(self, half: NDArray[np.float64]) -> None:
        beyond = np.append(2 * np.cumsum(half[:0:-1])[::-1], 0.0)  # beyond[k]: of all with |x| > k
        total = half[0] + beyond[0]
        edge = int(np.argmax(beyond <= _TAIL * total))
        middle, outer = half[: edge + 1], half[edge + 1 :]
        self._edge = edge
        self._middle = Table(_quotas(np.concatenate([middle[:0:-1], middle, beyond[edge : edge + 1]])))
        self._tail = Table(_quotas(np.concatenate([outer, outer]))) if len(outer) else None
        steps = np.arange(edge + 1, len(half))
        self._tail_values = np.concatenate([steps, -steps])

    def draw(self, count: int, random: Randomness) -> NDArray[np.int64]:
        """`count` independent draws."""
        drawn = self._middle.draw(count, random)
        drawn -= self._edge
        if self._tail is not None:
            escaped = np.flatnonzero(drawn > self._edge)
            drawn[escaped] = self._tail_values[self._tail.draw(len(escaped), random)]
        return drawn


def _quotas(weights: NDArray[np.float64]) -> NDArray[np.uint64]:
    """`weights`, normalised, as multiples of 2⁻⁶³ that sum to 1; the largest takes what rounding leaves over."""
    quotas: NDArray[np.uint64] = np.rint(weights * (2.0**_BITS / weights.sum())).astype(np.uint64)
    largest = int(np.argmax(quotas))
    others = sum(quotas.tolist()) - int(quotas[largest])
    quotas[largest] = (1 << _BITS) - others
    return quotas

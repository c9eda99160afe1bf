"""Is noise drawn afresh for every value and every release?

Noise of the right size and shape hides nothing when it is there twice: the difference of two releases then has none.
So all values, one release after another, are held against themselves at every distance (the autocorrelation, by one
Fourier transform), and every release against every other. For n independent values of mean 0 a correlation is nearly
normal with variance 1 / n; the largest of many is judged by how many there are (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfc


@dataclass(frozen=True, slots=True)
class Whiteness:
    """What stands out most.

    Attributes:
        distance: at which values are most like others, `likeness` their correlation there, and how likely one as large
            is anywhere if all are independent.
        pair: the two releases that are most like each other, from 0, with `pair_likeness` and `pair_p` alike.
    """

    distance: int
    likeness: float
    distance_p: float
    pair: tuple[int, int]
    pair_likeness: float
    pair_p: float


def whiteness(noise: NDArray[np.float64]) -> Whiteness:
    """Whether values are independent of one another.

    Args:
        noise: [releases, values], of mean 0; two releases at least, and of enough values (some hundred) for a
            correlation of independent ones to be normal.

    Raises:
        ValueError: there are fewer, or all values are 0.
    """
    if noise.ndim != 2 or min(noise.shape) < 2 or not noise.any():
        raise ValueError(f"{noise.shape} values that are to be compared")
    flat = noise.reshape(-1)
    half = flat.size // 2
    spectrum = np.fft.rfft(flat, 2 * flat.size)
    products = np.fft.irfft(np.square(np.abs(spectrum)), 2 * flat.size)[: half + 1]
    scores = products[1:] / products[0] * flat.size / np.sqrt(flat.size - np.arange(1, half + 1))
    best = int(np.argmax(np.abs(scores)))
    pair, likeness = _most_alike(noise)
    pairs = len(noise) * (len(noise) - 1) / 2
    return Whiteness(
        best + 1,
        float(scores[best]) / math.sqrt(flat.size - best - 1),
        _largest_p(float(scores[best]), half),
        pair,
        likeness,
        _largest_p(likeness * math.sqrt(noise.shape[1]), pairs),
    )


def _most_alike(noise: NDArray[np.float64]) -> tuple[tuple[int, int], float]:
    sizes = np.linalg.norm(noise, axis=1, keepdims=True)
    units: NDArray[Any] = noise / np.where(sizes > 0, sizes, 1)
    likeness = np.triu(units @ units.T, 1)
    first, second = divmod(int(np.argmax(np.abs(likeness))), len(noise))
    return (first, second), float(likeness[first, second])


def _largest_p(score: float, among: float) -> float:
    return min(1.0, among * float(erfc(abs(score) / math.sqrt(2))))

"""Is the noise what is claimed? Of the size, and of the shape.

A lower bound on ε catches noise that is far too small; these see a few per cent. They need the noise by itself:
releases less what they would have been without it, which is known to whoever runs the mechanism as a test.

The size has an exact interval, for n independent values of N(0, σ²): Σx²/σ² is chi-square with n degrees of freedom,
the mean being known to be 0. The shape is tested apart from the size, or noise that is merely too large would be called
no Gaussian: by Anderson and Darling's A² with mean and variance estimated (Stephens 1974; the p-value by D'Agostino and
Stephens 1986, table 4.9), which weighs the tails, where privacy is lost, more than Kolmogorov and Smirnov's statistic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammainc, gammaincc, gammainccinv, gammaincinv, log_ndtr

from .curves import scores
from .intervals import Estimate, confident

_FEWEST: Final = 8  # the approximation of the p-value of A² was made for samples from this size on


@dataclass(frozen=True, slots=True)
class NoiseComparison:
    """Noise against the standard deviation that is claimed for it.

    Attributes:
        deviation: of the values, with its interval, exact if they are Gaussian.
        size_p: how likely a deviation at least as far from `claimed`, on either side, would be.
        shape_p: how likely values at least as unlike a Gaussian would be, whatever its size.
    """

    claimed: float
    samples: int
    deviation: Estimate
    size_p: float
    shape_p: float

    @property
    def refused(self) -> bool:
        """Whether size or shape is not as claimed: with good noise so at most once in 1 / (1 − confidence) tests."""
        return min(self.size_p, self.shape_p) < (1 - self.deviation.confidence) / 2

    @property
    def too_small(self) -> bool:
        """Whether it is the size, and in the direction that costs privacy."""
        return self.size_p < (1 - self.deviation.confidence) / 2 and self.deviation.value < self.claimed


def compare_noise(values: ArrayLike, claimed: float, confidence: float = 0.95) -> NoiseComparison:
    """Whether independent values come from N(0, `claimed`²).

    Values on a grid must be on a fine one: where its step is not small beside `claimed` / √n, n values are not Gaussian
    and are refused rightly.

    Args:
        values: the noise alone, one dimension, eight at least.
        claimed: a standard deviation, above 0.

    Raises:
        ValueError: too few values or ones that are not finite, or `claimed` or `confidence` are none.
    """
    noise = scores(values)
    if len(noise) < _FEWEST or not np.isfinite(noise).all() or not 0 < claimed < math.inf:
        raise ValueError(f"{len(noise)} values, finite or not, cannot be tested against σ = {claimed}")
    half, squares, error = len(noise) / 2, float(np.square(noise).sum()), (1 - confident(confidence)) / 2
    drawn = squares / claimed**2 / 2
    return NoiseComparison(
        claimed,
        len(noise),
        Estimate(
            math.sqrt(squares / len(noise)),
            math.sqrt(squares / 2 / float(gammainccinv(half, error))),
            math.sqrt(squares / 2 / float(gammaincinv(half, error))),
            confidence,
        ),
        min(1.0, 2 * min(float(gammainc(half, drawn)), float(gammaincc(half, drawn)))),
        _anderson_darling(noise),
    )


def _anderson_darling(noise: NDArray[np.float64]) -> float:
    """The p-value of A² for normality, mean and variance unknown; 0 if all values are equal."""
    n, spread = len(noise), float(noise.std(ddof=1))
    if spread == 0:
        return 0.0
    ordered = np.sort((noise - noise.mean()) / spread)
    odd = np.arange(1, 2 * n, 2)
    square = -n - float((odd * (log_ndtr(ordered) + log_ndtr(-ordered[::-1]))).sum()) / n
    a = square * (1 + 0.75 / n + 2.25 / n**2)
    if a < 0.2:
        return 1 - math.exp(-13.436 + 101.14 * a - 223.73 * a**2)
    if a < 0.34:
        return 1 - math.exp(-8.318 + 42.796 * a - 59.938 * a**2)
    if a < 0.6:
        return math.exp(0.9177 - 4.279 * a - 1.38 * a**2)
    return math.exp(1.2937 - 5.709 * a + 0.0186 * min(a, 153.0) ** 2)  # the parabola turns up after 153

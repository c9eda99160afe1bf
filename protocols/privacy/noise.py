"""Noise whose distribution is known to the last bit: on integers, from the operating system's randomness.

Continuous noise in floating point leaks: which numbers a sum can become depends on the number underneath (Mironov 2012,
"On significance of the least significant bits for differential privacy"), and adding up several samples, as Holohan and
Braghin 2021 do, only makes the search longer. All noise here is therefore an integer, and belongs on numbers that were
put on the same grid before (`central.py`, `distributed.py`); then what comes out lies on a grid that no data can move.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.randomness import Randomness

from .sampler import Sampler

LARGEST_VARIANCE: Final = 2.0**32
"""Of a Skellam or discrete Gaussian from one table; the table then has a million entries."""

_CUT_BITS: Final = 92
"""No sampler draws what is rarer than 2⁻⁹² altogether."""

_FINE_SIGMA: Final = 2.0**13
_FINE_STEPS: Final = 2**12

WIDE_SIGMA: Final = _FINE_SIGMA * math.sqrt(_FINE_STEPS**2 + 1)
"""Standard deviation of `wide_gaussian`: about 2²⁵."""


def skellam(count: int, variance: float, random: Randomness) -> NDArray[np.int64]:
    """`count` draws of the difference of two Poisson variables of mean `variance` / 2.

    The sum of m such draws is one of variance m·`variance`, exactly: that is what makes it noise that many can add.
    Every probability e^(−μ)·I_k(μ) is met to 2⁻⁶⁴, and to 2⁻⁸⁸ where less than 2⁻²⁴ lies beyond: a relative error of
    10⁻¹² where k is common, growing to 10⁻⁷ (μ = 2³²) before the tails, and 2⁻⁷⁰ of total variation in the tails.

    Args:
        variance: μ, from 10⁻³ to 2³².
    """
    return _skellam(variance).draw(count, random)


def discrete_gaussian(count: int, sigma: float, random: Randomness) -> NDArray[np.int64]:
    """`count` draws of N_ℤ(0, `sigma`²) (Canonne, Kamath and Steinke 2020, def. 1): P(k) ∝ exp(−k² / 2σ²).

    As near to it as `skellam` is to its own.

    Args:
        sigma: from 0.03 to 2¹⁶; the standard deviation too, but for a difference of less than 10⁻⁶ from σ = 1 on.
    """
    return _discrete_gaussian(sigma).draw(count, random)


def wide_gaussian(count: int, random: Randomness) -> NDArray[np.int64]:
    """`count` draws of N_ℤ(0, `WIDE_SIGMA`²).

    Made as 2¹²·a + b with a, b from N_ℤ(0, (2¹³)²), which differs from it by a factor of at most 1 ± 2⁻¹¹⁰ (Micciancio
    and Peikert 2013, "Hardness of SIS and LWE with small parameters", thm 3.3; the smoothing condition holds with
    σ / 2¹² = 2). A vector of d such draws differs from d rounded draws of a continuous Gaussian by √d / 34σ² in total
    variation at most (Pinsker), 10⁻¹³ for ten million, so that what holds for the Gaussian mechanism holds for this.
    """
    drawn = discrete_gaussian(count, _FINE_SIGMA, random)
    drawn *= _FINE_STEPS
    drawn += discrete_gaussian(count, _FINE_SIGMA, random)
    return drawn


def skellam_tail(variance: float, bits: float) -> int:
    """The smallest t for which the Chernoff bound says P(|X| > t) < 2^−`bits`, for X ~ Skellam of this variance.

    With μ the variance, P(X ≥ t) ≤ exp(√(t² + μ²) − μ − t·asinh(t / μ)).
    """
    goal = -(bits + 1) * math.log(2)

    def bound(t: int) -> float:
        # √(t² + μ²) − μ, without the cancellation
        return t * t / (math.hypot(t, variance) + variance) - t * math.asinh(t / variance)

    low, high = 0, 1
    while bound(high) > goal:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= goal else (middle, high)
    return high


@lru_cache(maxsize=4)
def _skellam(variance: float) -> Sampler:
    if not 1e-3 <= variance <= LARGEST_VARIANCE:
        raise ValueError(f"a variance of {variance:g} is outside 10⁻³ … 2³²")
    return Sampler(_skellam_half(variance))


def _skellam_half(variance: float) -> NDArray[np.float64]:
    """e^(−μ)·I_k(μ) for k = 0, 1, 2, …, as far as `_CUT_BITS` wants, to a relative error of 10⁻¹³."""
    steps = np.arange(skellam_tail(variance, _CUT_BITS) + 1, dtype=np.float64)
    if variance < 1000:
        from scipy.special import ive

        return np.asarray(ive(steps, variance))
    # Debye's expansion (DLMF 10.41.3), with its exponent written so that nothing cancels; scipy's loses μ·10⁻¹⁶ there
    root = np.hypot(steps, variance)
    exponent = steps**2 / (root + variance) - steps * np.arcsinh(steps / variance)
    p = (steps / root) ** 2
    first = (3 - 5 * p) / (24 * root)
    second = (81 - 462 * p + 385 * p**2) / (1152 * root**2)
    third = (30375 - 369603 * p + 765765 * p**2 - 425425 * p**3) / (414720 * root**3)
    return np.asarray(np.exp(exponent) * (1 + first + second + third) / np.sqrt(2 * math.pi * root))


@lru_cache(maxsize=4)
def _discrete_gaussian(sigma: float) -> Sampler:
    if not 0.03 <= sigma <= math.sqrt(LARGEST_VARIANCE):
        raise ValueError(f"a standard deviation of {sigma:g} is outside 0.03 … 2¹⁶")
    last = math.ceil(sigma * math.sqrt(2 * math.log(2) * (_CUT_BITS + 1))) + 1
    return Sampler(np.exp(-0.5 * (np.arange(last + 1) / sigma) ** 2))

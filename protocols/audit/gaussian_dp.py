"""Gaussian differential privacy (Dong, Roth and Su 2022, arXiv 1905.02383): μ, and the ε that it comes to at a δ.

A mechanism is μ-GDP when telling its neighbours apart is at least as hard as telling N(0, 1) from N(μ, 1) by one draw.
The Gaussian mechanism with noise multiplier z is so with μ = 1 / z, and no smaller.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr


def epsilon(mu: float, delta: float) -> float:
    """The smallest ε ≥ 0 for which every μ-GDP mechanism is (ε, δ)-DP (cor. 2.13).

    Raises:
        ValueError: `mu` is below 0 or not finite, or `delta` is not between 0 and 1.
    """
    if not (0 <= mu < math.inf and 0 < delta < 1):
        raise ValueError(f"there is no ε for μ = {mu} at δ = {delta}")
    goal = math.log(delta)
    if mu == 0 or _log_delta(mu, 0) <= goal:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * -goal)  # the tail bound δ ≤ exp(−(ε/μ − μ/2)²/2)
    return float(brentq(lambda some: _log_delta(mu, some) - goal, 0, high, xtol=1e-12))


def _log_delta(mu: float, some: float) -> float:
    """ln(Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2))."""
    first, second = log_ndtr(-some / mu + mu / 2), some + log_ndtr(-some / mu - mu / 2)
    return float(first + math.log(-math.expm1(second - first))) if second < first else -math.inf

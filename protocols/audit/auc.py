"""The area under the ROC curve, with an interval that is not of no width when an attack is perfect.

The area is the probability that a member scores higher than a non-member, ties counted as half. DeLong, DeLong and
Clarke-Pearson (1988) estimate its variance from the scores alone, whatever their distribution; a bootstrap does the
same with random numbers and a thousand times the work. Both see no variance where the scores are entirely apart, and
too little where they nearly are, which is just what a planted leak looks like. So the interval is widened, where it is
wider, to that of Newcombe (2006, "Confidence intervals for an effect size measure based on the Mann–Whitney statistic,
part 2", method 5), which knows the two sizes and the area only, and takes the variance at the limits instead of at the
estimate, as Wilson's interval for a proportion does.

The area is one number for all thresholds; `curves.py` says why it must not be the only one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from .curves import scores
from .intervals import Estimate, confident


def auc(members: ArrayLike, non_members: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The area under the ROC curve of these scores: ½ is chance.

    Args:
        members, non_members: one dimension, at least one each; a higher score speaks for membership.

    Raises:
        ValueError: one of them is empty, has another shape or holds nan, or `confidence` is not between 0 and 1.
    """
    inside, outside = scores(members), scores(non_members)
    m, n = len(inside), len(outside)
    wins, losses = _share_below(inside, outside), _share_below(outside, inside)
    area = float(wins.mean())
    width = float(ndtri((1 + confident(confidence)) / 2))
    delong = width * math.sqrt(_variance_of_mean(wins) + _variance_of_mean(losses))
    low = min(area - delong, _newcombe(area, m, n, width))
    high = max(area + delong, 1 - _newcombe(1 - area, m, n, width))
    return Estimate(area, max(0.0, low), min(1.0, high), confidence)


def _share_below(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, for each value: the share of `others` that are below it, ties as half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def _variance_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _newcombe(area: float, m: int, n: int, width: float) -> float:
    """The θ ≤ `area` that is `width` standard errors below it, by the standard error at θ (Newcombe 2006, method 5)."""

    def excess(theta: float) -> float:
        size = (m + n) / 2 - 1
        spread = 1 + size * (1 - theta) / (2 - theta) + size * theta / (1 + theta)
        return area - theta - width * math.sqrt(theta * (1 - theta) * spread / (m * n))

    if area == 0:
        return 0.0
    return float(brentq(excess, 0, area * (1 - 1e-12)))  # at an area of 1, θ = 1 is a root that says nothing

"""A lower bound on ε from many releases: the mechanism is run again and again, with a canary and without.

Each release is boiled down to a number, larger the more it speaks for the canary; the matched filter, the release times
what the canary adds, is the best there is against Gaussian noise. Then it is a matter of telling two samples apart by a
threshold. How often that goes wrong has exact intervals, and refutes every ε that would not let it go so well
(Jagielski, Ullman and Oprea 2020, arXiv 2006.07709; Nasr et al. 2023, "Tight auditing of differentially private machine
learning", arXiv 2302.07956).

The threshold is chosen on every other release and measured on the rest, so that it is a fixed one where it counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from .curves import roc, scores
from .gaussian_dp import epsilon
from .intervals import Proportion, confident, proportion, upper_limits

Claim: TypeAlias = Literal["(ε, δ)-DP", "Gaussian DP"]


@dataclass(frozen=True, slots=True)
class ReleaseBound:
    """The ε of one release is at least `epsilon` with this confidence.

    Attributes:
        ceiling: the bound if no release had been mistaken; `epsilon` is never above it.
        mu: of Gaussian DP, at least; None where that was not assumed.
        false_positives, false_negatives: at `threshold`, in the releases that it was not chosen on.
    """

    claim: Claim
    epsilon: float
    ceiling: float
    delta: float
    confidence: float
    mu: float | None
    threshold: float
    false_positives: Proportion
    false_negatives: Proportion


def audit(
    with_canary: ArrayLike,
    without: ArrayLike,
    *,
    delta: float,
    claim: Claim = "(ε, δ)-DP",
    confidence: float = 0.95,
) -> ReleaseBound:
    """The bound from releases of two neighbouring datasets.

    Bounds of both claims from the same releases hold at `confidence` each, not together.

    Args:
        with_canary, without: a number for each release, independent of the others, in the order they were made; two at
            least on either side.
        claim: what is put to the test. "(ε, δ)-DP" assumes nothing about the mechanism; "Gaussian DP" is sharper, and
            means what `gaussian_dp.py` says.

    Raises:
        ValueError: too few numbers, nan, or a δ or confidence that is none.
    """
    inside, outside = scores(with_canary), scores(without)
    if min(len(inside), len(outside)) < 2:
        raise ValueError(f"{len(inside)} releases with the canary and {len(outside)} without are too few to split")
    threshold = _best_threshold(inside[::2], outside[::2], delta, claim, confidence)
    return at_threshold(inside[1::2], outside[1::2], threshold, delta=delta, claim=claim, confidence=confidence)


def at_threshold(
    with_canary: ArrayLike,
    without: ArrayLike,
    threshold: float,
    *,
    delta: float,
    claim: Claim = "(ε, δ)-DP",
    confidence: float = 0.95,
) -> ReleaseBound:
    """The same for a threshold that these releases had no part in: one that reaches it is said to have the canary.

    With the upper limits a of the false positive rate and b of the false negative rate, either of them wrong with
    probability (1 − `confidence`) / 2:
    ε ≥ max(ln((1 − b − δ) / a), ln((1 − a − δ) / b)) (Kairouz, Oh and Viswanath 2015, thm 2.1), and under Gaussian DP
    μ ≥ Φ⁻¹(1 − a) − Φ⁻¹(b) (Dong, Roth and Su 2022, eq. 6), which is 0 where a + b ≥ 1.
    """
    if not 0 <= delta < 1 or (delta == 0 and claim == "Gaussian DP"):
        raise ValueError(f"δ = {delta} is none for {claim}")
    inside, outside = scores(with_canary), scores(without)
    positives = proportion(int((outside >= threshold).sum()), len(outside), confidence)
    negatives = proportion(int((inside < threshold).sum()), len(inside), confidence)
    best = proportion(0, len(outside), confidence).high, proportion(0, len(inside), confidence).high
    if claim == "Gaussian DP":
        mu, most = lower_mu(positives.high, negatives.high), lower_mu(*best)
        bounds = epsilon(mu, delta), epsilon(most, delta)
    else:
        mu, bounds = None, (lower_epsilon(positives.high, negatives.high, delta), lower_epsilon(*best, delta))
    return ReleaseBound(
        claim,
        *bounds,
        delta,
        confidence,
        mu,
        threshold,
        positives,
        negatives,
    )


def lower_epsilon(a: float, b: float, delta: float) -> float:
    """The smallest ε ≥ 0 at `delta` with which error rates of at most `a` and `b`, above 0, can be had."""
    power = max((1 - b - delta) / a, (1 - a - delta) / b)
    return math.log(power) if power > 1 else 0.0


def lower_mu(a: float, b: float) -> float:
    """The smallest μ ≥ 0 of Gaussian DP with which error rates of at most `a` and `b`, above 0, can be had."""
    return max(0.0, float(-ndtri(a) - ndtri(b))) if a + b < 1 else 0.0


def _best_threshold(
    inside: NDArray[np.float64], outside: NDArray[np.float64], delta: float, claim: Claim, confidence: float
) -> float:
    """The threshold with the best bound if it were measured on the same releases."""
    curve, error = roc(inside, outside), (1 - confident(confidence)) / 2
    a = upper_limits(curve.false_positives, len(outside), error)
    b = upper_limits(len(inside) - curve.true_positives, len(inside), error)
    if claim == "Gaussian DP":
        with np.errstate(invalid="ignore"):  # limits of 0 and 1 at the ends of the curve
            gain = np.where(a + b < 1, -ndtri(a) - ndtri(b), 0.0)
    else:
        gain = np.maximum((1 - b - delta) / a, (1 - a - delta) / b)
    return float(curve.thresholds[np.argmax(gain)])

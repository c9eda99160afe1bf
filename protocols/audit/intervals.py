"""Exact intervals for proportions (Clopper and Pearson 1934), on which every other bound of an audit stands.

They hold for every number of trials, zero successes included, at the price of being a little wide: an audit counts rare
events, where the usual approximations fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and what it lies between with this confidence."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Proportion:
    """`successes` of `trials` that are independent and alike.

    Each of `low` and `high` is wrong with probability (1 − `confidence`) / 2 at most, so either may be used alone, and
    two limits of two proportions hold together with `confidence`.
    """

    successes: int
    trials: int
    value: float
    low: float
    high: float
    confidence: float


def proportion(successes: int, trials: int, confidence: float = 0.95) -> Proportion:
    """The share of successes with its two-sided Clopper–Pearson interval.

    Raises:
        ValueError: there are no trials, more successes than trials, or `confidence` is not between 0 and 1.
    """
    error = (1 - confident(confidence)) / 2
    return Proportion(
        successes,
        trials,
        successes / trials if trials else 0.0,
        lower_limit(successes, trials, error),
        upper_limit(successes, trials, error),
        confidence,
    )


def lower_limit(successes: int, trials: int, error: float) -> float:
    """The p for which so many successes, or more, have probability `error`; 0 if there are none.

    A true proportion is below this with probability `error` at most.
    """
    _check(successes, trials)
    return float(betaincinv(successes, trials - successes + 1, error)) if successes else 0.0


def upper_limit(successes: int, trials: int, error: float) -> float:
    """The p for which so few successes, or fewer, have probability `error`; 1 if all are."""
    return 1 - lower_limit(trials - successes, trials, error)


def upper_limits(successes: NDArray[np.int64], trials: int, error: float) -> NDArray[np.float64]:
    """`upper_limit` for each of many counts."""
    failures = trials - successes
    return np.where(failures == 0, 1.0, 1 - betaincinv(np.maximum(failures, 1), successes + 1, error))


def confident(confidence: float) -> float:
    """`confidence` itself. Raises ValueError if it is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
    return confidence


def _check(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials")

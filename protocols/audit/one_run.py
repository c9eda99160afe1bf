"""A lower bound on ε from one run, with no assumption about the mechanism (Steinke, Nasr and Jagielski 2023).

If a run is (ε, δ)-DP, and each of m canaries was in its data by a fair coin of its own, then of r guesses made from
the result no more are right than there are heads among r tosses of a coin that shows heads with probability
e^ε/(1 + e^ε), but for what δ allows (arXiv 2305.08846, thm 5.2). So many right guesses refute every ε for which they
are too unlikely; the largest of these is the bound. The theorem needs coins: with a fixed number of canaries put in, it
does not hold.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, expit

from .intervals import confident


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely `right` right guesses, or more, are at most, if the run is (`epsilon`, `delta`)-DP (thm 5.2).

    β + 2mδ·max over 1 ≤ i ≤ v of (f(v − i) − β) / i, for m canaries, r guesses, v of them right, f(k) = P(at least k of
    r independent guesses are right, each with probability e^ε/(1 + e^ε)) and β = f(v).

    Raises:
        ValueError: the counts contradict each other, ε < 0, or δ is not in [0, 1).
    """
    if not (0 <= right <= guesses <= canaries and guesses >= 1 and epsilon >= 0 and 0 <= delta < 1):
        raise ValueError(f"{right} of {guesses} guesses about {canaries} canaries, at ({epsilon}, {delta})")
    beta = float(_at_least(np.array([right]), guesses, epsilon)[0])
    if delta == 0 or right == 0:
        return beta
    fewer = np.arange(1, right + 1)
    slack = float(((_at_least(right - fewer, guesses, epsilon) - beta) / fewer).max())
    return min(1.0, beta + 2 * canaries * delta * max(0.0, slack))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The ε below which no claim of (ε, `delta`)-DP stands at this confidence; 0 if every claim does.

    Good for one number of guesses that was fixed beforehand; for several, see `canaries.py`.

    Raises:
        ValueError: as `p_value`, or a confidence that is none.
    """
    error = 1 - confident(confidence)

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, right, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, 0, high, xtol=1e-10))


def _at_least(counts: np.ndarray, guesses: int, epsilon: float) -> np.ndarray:
    """P(Bin(`guesses`, e^ε/(1 + e^ε)) ≥ k) for each k of `counts`, from 0 to `guesses`."""
    some = np.maximum(counts, 1)
    return np.where(counts == 0, 1.0, betainc(some, guesses - some + 1, expit(epsilon)))

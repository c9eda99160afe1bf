"""A sharper lower bound from one run, for what is claimed to be Gaussian DP (Mahloujifar, Melis and Chaudhuri 2024).

`one_run.py` must reckon with the worst mechanism that is (ε, δ)-DP. A run with Gaussian noise is nothing like it, and a
claim of μ-GDP says more, so that fewer right guesses refute it ("Auditing f-differential privacy in one run", arXiv
2410.22235). What is refuted is that the run's neighbours are as hard to tell apart as the Gaussian mechanism's with
this ε at this δ. For Gaussian noise without sampling that is the claim itself; for many steps of DP-SGD on sampled
batches it is a good approximation of it, and no more.
"""

from __future__ import annotations

from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from .gaussian_dp import epsilon
from .intervals import confident


def lower_mu(canaries: int, guesses: int, right: int, confidence: float = 0.95) -> float:
    """The μ below which no claim of μ-GDP stands at this confidence; 0 if every claim does.

    By the paper's recursion for guesses with abstentions: suppose that so many right guesses, or more, had probability
    1 − `confidence`, and go down through the smaller numbers with as little mass as the trade-off function allows. If
    that comes to more mass than there is, the claim is refuted.

    Raises:
        ValueError: the counts contradict each other, or a confidence that is none.
    """
    if not (0 <= right <= guesses <= canaries and guesses >= 1):
        raise ValueError(f"{right} of {guesses} guesses about {canaries} canaries")
    error = 1 - confident(confidence)

    def surplus(mu: float) -> float:
        return _surplus(canaries, guesses, right, mu, error)

    if surplus(0.0) <= 0:
        return 0.0
    high = 1.0
    while surplus(high) > 0:
        high *= 2
    return float(brentq(surplus, 0, high, xtol=1e-10))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """`lower_mu` as the ε that it comes to at `delta`. Raises ValueError as it does, or if δ is not between 0 and 1."""
    return epsilon(lower_mu(canaries, guesses, right, confidence), delta)


def _surplus(canaries: int, guesses: int, right: int, mu: float, error: float) -> float:
    """Above 0 where μ is refuted: r + h − `guesses` / m, with the masses of right and of wrong guesses in the end."""
    r, h = error * right / canaries, error * (guesses - right) / canaries
    for count in range(right - 1, -1, -1):
        least = float(ndtr(ndtri(r) - mu))  # the wrong guesses that so many right ones entail under μ-GDP
        if least <= h:
            break
        r, h = min(1.0, r + count / (guesses - count) * (least - h)), least
    return r + h - guesses / canaries

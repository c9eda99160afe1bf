"""Exposure of a planted secret, in bits (Carlini et al. 2019, "The secret sharer", arXiv 1802.08232).

A secret was drawn at random from a space R of candidates, and the model is asked how likely it finds each of them:
exposure = log₂|R| − log₂ rank. It is how much a guesser gains from the model, who would need |R| guesses without it. A
secret that the model has never seen has an exposure of x bits or more with probability 2^−x at most, 1.44 bits on
average: that is chance.

Candidates that the model finds equally likely have no order. The value takes the mean of the ranks that such a secret
may have, and the interval all of them, so that a model that has learnt nothing does not seem to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy.special import gammaincc

from .curves import scores
from .intervals import confident, lower_limit, upper_limit


@dataclass(frozen=True, slots=True)
class Exposure:
    """Bits by which a model gives a secret away, from 0 to `maximum`.

    Attributes:
        value, low, high: bits; without a sample, `low` and `high` differ by ties only.
        maximum: log₂|R|: the secret is the model's first guess.
        resolution: the most that `low` could have come to with so many candidates.
        compared: with how many candidates the secret was compared, itself not counted.
        space: |R|.
        confidence: of `low` and `high` together; 1 if the whole space was compared.
    """

    value: float
    low: float
    high: float
    maximum: float
    resolution: float
    compared: int
    space: int
    confidence: float

    @property
    def chance(self) -> float:
        """The probability, at most, that a secret that the model has never seen is ranked as high as `low` says."""
        return math.exp2(-self.low)


def by_rank(secret: float, others: ArrayLike) -> Exposure:
    """From the scores of all other candidates.

    Args:
        secret: its score: a higher one is likelier to the model, as minus its loss (the log-perplexity) is.
        others: the scores of the rest of the space, one dimension, at least one.

    Raises:
        ValueError: `others` is empty or has another shape, or a score is nan.
    """
    above, equal, count = _compared(secret, others)
    bits = [_bits(above + ties, count + 1) for ties in (equal / 2, equal, 0)]
    most = math.log2(count + 1)
    return Exposure(bits[0], bits[1], bits[2], most, most, count, count + 1, 1.0)


def by_sample(secret: float, others: ArrayLike, space: int, confidence: float = 0.95) -> Exposure:
    """From the scores of some candidates, drawn independently and evenly from the others in a space too large to list.

    The share of candidates above the secret has a Clopper–Pearson interval, and so have its rank and its exposure.
    Where none of n is above it the value is near log₂ n, and `low` is lower; the paper goes beyond by fitting a skewed
    normal distribution to the scores which is a guess about a tail that nobody has seen, and not done here.

    Args:
        secret, others: as for `by_rank`.
        space: |R|, with the secret, larger than the number of `others`.

    Raises:
        ValueError: as `by_rank`, or a space or confidence that does not fit.
    """
    above, equal, count = _compared(secret, others)
    if space <= count:
        raise ValueError(f"{count} candidates and the secret are more than a space of {space}")
    error = (1 - confident(confidence)) / 2
    rest = space - 1
    return Exposure(
        _bits((above + equal / 2 + 1) / (count + 1) * rest, space),
        _bits(upper_limit(above + equal, count, error) * rest, space),
        _bits(lower_limit(above, count, error) * rest, space),
        math.log2(space),
        _bits(upper_limit(0, count, error) * rest, space),
        count,
        space,
        confidence,
    )


def chance_of_all(exposures: Iterable[Exposure]) -> float:
    """The probability, at most, that secrets which the model has never seen are ranked as high together (Fisher 1925).

    Each must have been drawn by itself, and ranked over the whole of its space (`by_rank`).

    Raises:
        ValueError: there are none, or one was ranked in a sample.
    """
    found = list(exposures)
    if not found or any(one.compared + 1 != one.space for one in found):
        raise ValueError("there are no exposures, or some are from a sample of the space")
    return float(gammaincc(len(found), math.log(2) * sum(one.low for one in found)))


def _compared(secret: float, others: ArrayLike) -> tuple[int, int, int]:
    """How many candidates are above the secret, equal to it, and there at all."""
    ranked = scores(others)
    own = scores([secret])[0]
    return int((ranked > own).sum()), int((ranked == own).sum()), len(ranked)


def _bits(above: float, space: int) -> float:
    """log₂|R| − log₂ rank, for the rank that has so many candidates above it."""
    return math.log2(space) - math.log2(1 + above)

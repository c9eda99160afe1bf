"""Guesses about canaries: of which of them one dares to say that they were in the training data, or were not.

Each of m canaries is put in or left out by a coin of its own. Who has seen the result orders them by a score, says "in"
of the highest, "out" of the lowest, and abstains from the rest; how many guesses are right is all that a one-run audit
looks at (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", arXiv 2305.08846, alg. 1).

How many guesses to make is the auditor's choice, and one that must not be made by looking at what comes out best: the
best of many bounds is no bound. Either one number is fixed beforehand, or several are, and each gets an equal part of
the error that the confidence allows (Bonferroni). `standard` is such a list. A leak may move all scores a little, which
both ends together show best, or give away a few canaries entirely, which only the highest scores show; and a number
that is right to a factor of two is nearly as good as the best. Seven entries cover that, and their price is known: for
1,000 canaries the largest bound that could be shown falls from 5.81 to 5.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from .curves import scores

_FEWEST: Final = 10  # fewer, all of them right, show little once they share the error with others


@dataclass(frozen=True, slots=True)
class Guesses:
    """How many guesses are made: k₊ = `top` of the highest scores, k₋ = `bottom` of the lowest."""

    top: int
    bottom: int

    @property
    def made(self) -> int:
        return self.top + self.bottom


def standard(canaries: int) -> tuple[Guesses, ...]:
    """All canaries, half and a quarter of them, half high and half low; and the highest 1/4, 1/8, 1/16 and 1/32.

    Without those of fewer than ten guesses. Too few canaries for that leave one entry: all of them.
    """
    ends = [Guesses(made - made // 2, made // 2) for made in (canaries, canaries // 2, canaries // 4)]
    tops = [Guesses(canaries // part, 0) for part in (4, 8, 16, 32)]
    return (ends[0], *(one for one in (*ends[1:], *tops) if one.made >= _FEWEST))


def correct(values: ArrayLike, included: ArrayLike, plan: Sequence[Guesses], seed: int) -> tuple[int, ...]:
    """How many guesses are right, for each entry of `plan`.

    Args:
        values: the score of each canary; a higher one speaks for its having been in.
        included: bool, of the same length: whether it was.
        seed: of the lots that are drawn among equal scores; not one that the canaries' coins were thrown with.

    Raises:
        ValueError: lengths differ, or an entry has more guesses than there are canaries, or none.
    """
    ranked, truth = scores(values), np.array(included)
    if truth.shape != ranked.shape or truth.dtype != np.bool_:
        raise ValueError(f"{len(ranked)} scores need as many booleans, not {truth.dtype} of shape {truth.shape}")
    lots = np.random.default_rng(seed).permutation(len(ranked))
    truth = truth[lots[np.argsort(ranked[lots], kind="stable")]]
    for guesses in plan:
        if min(guesses.top, guesses.bottom) < 0 or not 1 <= guesses.made <= len(truth):
            raise ValueError(f"{guesses} of {len(truth)} canaries")
    return tuple(int(truth[len(truth) - one.top :].sum()) + int((~truth[: one.bottom]).sum()) for one in plan)

"""What scores of canaries come to: lower bounds on ε with their ceilings, held against what the Plan promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.audit import canaries
from farfield.protocols.audit.canaries import OneRunBound
from farfield.protocols.seeds import derive

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Canaries that are put in one order.

    Attributes:
        scores: of those that a coin was thrown for, and `included`, how it fell.
        controls: scores of others that were never in the run.
    """

    name: str
    scores: NDArray[np.float64]
    included: NDArray[np.bool_]
    controls: NDArray[np.float64]

    @property
    def sides(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The scores of what was in the run, and of what was not."""
        return self.scores[self.included], np.concatenate([self.scores[~self.included], self.controls])


@dataclass(frozen=True, slots=True)
class Measured:
    """The bounds of one level, records or clients.

    Attributes:
        bound: with no assumption about the mechanism; the best of the level's rankings.
        sharper: the same for a mechanism that claims to be as good as Gaussian noise.
        ranking: the name of the one that gave `bound`.
        claimed: ε that the Plan promises at this level; None where it promises none.
        gaussian: whether the promise rests on Gaussian noise alone, with no sampling, so that `sharper` can refute it.
    """

    bound: OneRunBound
    sharper: OneRunBound
    ranking: str
    claimed: float | None
    gaussian: bool

    @property
    def beyond_chance(self) -> bool:
        return self.bound.epsilon > 0

    @property
    def refuted(self) -> bool:
        """Whether the Plan's promise is."""
        if self.claimed is None:
            return False
        return self.bound.epsilon > self.claimed or (self.gaussian and self.sharper.epsilon > self.claimed)

    @property
    def withstood(self) -> bool:
        """Whether the Plan's promise was put to a test that it could have failed, and did not."""
        if self.claimed is None:
            return False
        could = max(self.bound.ceiling, self.sharper.ceiling) > self.claimed
        return could and max(self.bound.epsilon, self.sharper.epsilon) <= self.claimed

    @property
    def leak(self) -> bool:
        """More right guesses than coins give, unless it is what a promise allows that has withstood its test."""
        return self.beyond_chance and not self.withstood


def measured(
    rankings: Sequence[Ranking], *, delta: float, claimed: float | None, gaussian: bool, seed: int, tests: int
) -> Measured:
    """The best bound of these rankings, of either sort.

    Args:
        tests: how many rankings there are in the whole finding. All of their bounds hold together, at 95 %.
    """
    lots = derive(seed, "canaries", "lots")

    def audited(one: Ranking, claim: canaries.Claim) -> OneRunBound:
        return canaries.audit(one.scores, one.included, delta=delta, claim=claim, confidence=each(tests), seed=lots)

    plain = {one.name: audited(one, "(ε, δ)-DP") for one in rankings}
    best = max(plain, key=lambda name: plain[name].epsilon)
    sharper = max((audited(one, "Gaussian DP") for one in rankings), key=lambda bound: bound.epsilon)
    return Measured(plain[best], sharper, best, claimed, gaussian)


def each(tests: int) -> float:
    """The confidence of each bound, two of each ranking, with which all hold together at 95 % (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / (2 * tests)


def together(name: str, kinds: Sequence[Ranking]) -> Ranking:
    """Several kinds in one order: each kind's scores with mean 0 and variance 1, one kind after the other."""
    scaled = [_standardised(one) for one in kinds]
    return Ranking(
        name,
        np.concatenate([one.scores for one in scaled]),
        np.concatenate([one.included for one in scaled]),
        np.concatenate([one.controls for one in scaled]),
    )


def _standardised(one: Ranking) -> Ranking:
    middle, spread = float(one.scores.mean()), float(one.scores.std()) or 1.0
    return replace(one, scores=(one.scores - middle) / spread, controls=(one.controls - middle) / spread)

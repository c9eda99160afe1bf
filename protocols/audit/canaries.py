"""One-run audits from the scores of canaries: the bound, and the ceiling that so many canaries could ever show.

A low bound means little where the ceiling is low too: a hundred canaries, every guess right, show an ε of 3.49 and no
more. So the two are one value here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from . import one_run, one_run_gaussian
from .guessing import Guesses, correct, standard
from .intervals import confident

Claim: TypeAlias = Literal["(ε, δ)-DP", "Gaussian DP"]
"""What is put to the test: any mechanism that is (ε, δ)-DP, or one that is as good as the Gaussian with this ε at δ."""

_BOUNDS: Final[Mapping[Claim, Callable[[int, int, int, float, float], float]]] = {
    "(ε, δ)-DP": one_run.lower_bound,
    "Gaussian DP": one_run_gaussian.lower_bound,
}


@dataclass(frozen=True, slots=True)
class OneRunBound:
    """ε is at least `epsilon` with this confidence, or the run was an unlucky one.

    Attributes:
        ceiling: the bound if every guess had been right; `epsilon` is never above it.
        canaries, included: how many there were, and how many of them were in the data.
        guesses, right: of the entry of the plan that gave the bound.
        tried: how many entries the plan had, all of which are paid for.
    """

    claim: Claim
    epsilon: float
    ceiling: float
    delta: float
    confidence: float
    canaries: int
    included: int
    guesses: Guesses
    right: int
    tried: int


def audit(
    values: ArrayLike,
    included: ArrayLike,
    *,
    delta: float,
    claim: Claim = "(ε, δ)-DP",
    confidence: float = 0.95,
    plan: Sequence[Guesses] | None = None,
    seed: int = 0,
) -> OneRunBound:
    """The lower bound on ε that the scores of canaries show.

    Bounds of both claims from one run hold at `confidence` each, not together.

    Args:
        values: one score for each canary; a higher one speaks for its having been in the data.
        included: bool, of the same length; each was thrown independently, with probability ½.
        plan: the numbers of guesses, fixed before the scores were seen; `standard` if None.
        seed: of the lots among equal scores.

    Raises:
        ValueError: lengths differ, the plan does not fit the number of canaries, or δ or the confidence are none.
    """
    truth = np.asarray(included)
    chosen = tuple(plan) if plan is not None else standard(len(truth))
    rights = correct(values, truth, chosen, seed)
    each = _each(chosen, confidence)
    bounds = [
        _BOUNDS[claim](len(truth), guesses.made, right, delta, each)
        for guesses, right in zip(chosen, rights, strict=True)
    ]
    best = int(np.argmax(bounds))
    return OneRunBound(
        claim,
        bounds[best],
        ceiling(len(truth), delta=delta, claim=claim, confidence=confidence, plan=chosen),
        delta,
        confidence,
        len(truth),
        int(truth.sum()),
        chosen[best],
        rights[best],
        len(chosen),
    )


def ceiling(
    canaries: int,
    *,
    delta: float,
    claim: Claim = "(ε, δ)-DP",
    confidence: float = 0.95,
    plan: Sequence[Guesses] | None = None,
) -> float:
    """The largest bound that `audit` could show with so many canaries, every guess right; known before the run.

    With δ = 0, one entry of all canaries and 95 %, it is 3.49 for 100 canaries, 5.81 for 1,000 and 7.42 for 5,000.
    """
    chosen = tuple(plan) if plan is not None else standard(canaries)
    each = _each(chosen, confidence)
    return max(_BOUNDS[claim](canaries, guesses.made, guesses.made, delta, each) for guesses in chosen)


def _each(plan: Sequence[Guesses], confidence: float) -> float:
    """The confidence of every entry with which they hold together (Bonferroni)."""
    if not plan:
        raise ValueError("a plan without guesses")
    return 1 - (1 - confident(confidence)) / len(plan)

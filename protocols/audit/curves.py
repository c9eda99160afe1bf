"""What a score tells about membership: the ROC curve, and the true positive rate where false positives are rare.

A score is higher the more it speaks for membership. What counts is the true positive rate at false positive rates of
1 % and below: an attack that is sure of a few people harms those few, however poor it is on average (Carlini et al.
2022, "Membership inference attacks from first principles", arXiv 2112.03570, §II-C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import Proportion, proportion


@dataclass(frozen=True, slots=True, eq=False)
class Roc:
    """One point for each rule "a member if the score is at least this threshold", from the strictest to the loosest.

    Members and non-members of equal score come into one point, so that a tie counts as half in the area under straight
    lines between points. The first point has no positives and the threshold ∞.

    Attributes:
        thresholds: float64[k], falling.
        true_positives, false_positives: int64[k], growing; the last are all members and all non-members.
    """

    thresholds: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]

    @property
    def tpr(self) -> NDArray[np.float64]:
        return np.asarray(self.true_positives / self.true_positives[-1])

    @property
    def fpr(self) -> NDArray[np.float64]:
        return np.asarray(self.false_positives / self.false_positives[-1])


@dataclass(frozen=True, slots=True)
class TprAtFpr:
    """The true positive rate of the loosest rule whose false positives are at most a share `fpr` of the non-members.

    Attributes:
        tpr: None when there are fewer than `needed` non-members: one alone would be a larger share than `fpr`, so that
            no threshold can be shown to have that rate, and any number given for it would be made up.
        measured_fpr: of the same rule; what its true rate may be is its interval.
        threshold: a score above it is called a member; it follows from the non-members alone.
        needed: the smallest number of non-members for this `fpr`.
    """

    fpr: float
    tpr: Proportion | None
    measured_fpr: Proportion | None
    threshold: float | None
    needed: int


def roc(members: ArrayLike, non_members: ArrayLike) -> Roc:
    """The curve of these scores.

    Args:
        members, non_members: scores of any real kind, one dimension, at least one each; ±∞ are allowed.

    Raises:
        ValueError: one of them is empty, has another shape, or holds nan.
    """
    inside, outside = scores(members), scores(non_members)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    inside.sort()
    outside.sort()
    positives = [len(some) - np.searchsorted(some, thresholds, side="left") for some in (inside, outside)]
    return Roc(np.append(np.inf, thresholds), *(np.append(0, counts).astype(np.int64) for counts in positives))


def hull(curve: Roc) -> Roc:
    """The corners of the curve's upper convex hull: the rules that no lot between two others would beat."""
    kept: list[int] = []
    x, y = curve.false_positives.tolist(), curve.true_positives.tolist()
    for new in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (x[b] - x[a]) * (y[new] - y[a]) < (y[b] - y[a]) * (x[new] - x[a]):
                break
            kept.pop()
        kept.append(new)
    return Roc(curve.thresholds[kept], curve.true_positives[kept], curve.false_positives[kept])


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float, confidence: float = 0.95) -> TprAtFpr:
    """The true positive rate at a false positive rate of at most `fpr`, with its Clopper–Pearson interval.

    The threshold is the highest score that ⌊`fpr`·n⌋ of the n non-members exceed at most. The members have no part in
    choosing it, so for a given threshold the count of those above it is binomial, and the interval exact.

    Args:
        fpr: from 0 to 1, both excluded.

    Raises:
        ValueError: as `roc`, or a `fpr` or `confidence` that is none.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"a false positive rate of {fpr} is not between 0 and 1")
    inside, outside = scores(members), np.sort(scores(non_members))
    needed = math.ceil(1 / fpr - 1e-9)
    if len(outside) < needed:
        return TprAtFpr(fpr, None, None, None, needed)
    allowed = math.floor(fpr * len(outside) + 1e-9)
    threshold = float(outside[len(outside) - 1 - allowed])
    return TprAtFpr(
        fpr,
        proportion(int((inside > threshold).sum()), len(inside), confidence),
        proportion(int((outside > threshold).sum()), len(outside), confidence),
        threshold,
        needed,
    )


def randomised_tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float) -> float:
    """The same for the best rule on these scores that may draw lots between two thresholds, as jax-privacy gives it.

    It is never below `tpr_at_fpr`, since the members choose the thresholds too, and it has a value for every `fpr`,
    however few non-members there are. So it is for comparison, not for a report.
    """
    best = hull(roc(members, non_members))
    return float(np.interp(fpr, best.fpr, best.tpr))


def scores(values: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy, one dimension. Raises ValueError if it is empty, of another shape, or holds nan."""
    copy = np.array(values, np.float64)
    if copy.ndim != 1 or not copy.size or np.isnan(copy).any():
        raise ValueError(f"scores are one list of numbers, not an array of shape {copy.shape} or one with nan")
    return copy

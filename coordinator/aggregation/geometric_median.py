"""The geometric median of updates, by smoothed Weiszfeld steps (RFA; Pillutla, Kakade and Harchaoui 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from farfield.protocols.rules import Asks
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .factors import shares_of
from .rule import Combined, ViewRule, register

SMOOTHING: Final = 1e-6
"""ν, an L2 norm: a point nearer than that counts as if it were that far away."""

STEPS: Final = 100
STILL: Final = 1e-6
"""The steps end when no point's share of the result moves by more."""


def geometric_median(points: Sequence[State], shares: columns.Vector) -> State:
    """v that makes Σ αₖ·‖v - xₖ‖₂ least, over all tensors together; float32.

    v ← Σ βₖ xₖ / Σ βₖ with βₖ = αₖ / max(ν, ‖v - xₖ‖), the smoothed Weiszfeld algorithm, from the
    coordinate-wise median on, which points far away do not hold back.

    Args:
        shares: α, [n], positive, with sum 1.
    """
    point, before = columns.median(points), np.zeros(len(points))
    for _ in range(STEPS):
        weights = shares / np.maximum(SMOOTHING, columns.distances(points, point))
        weights /= weights.sum()
        point = columns.combination(points, weights)
        if np.abs(weights - before).max() <= STILL:
            break
        before = weights
    return point


@register("geometric_median")
@dataclass(frozen=True, slots=True)
class GeometricMedian(ViewRule):
    """Δ has the least weighted sum of distances to the updates. It stays near the honest ones while these have more
    than half of the weight, however far away the others are.

    With `weighting = "examples"` the weight is what clients say of themselves, so that one of them can claim half of
    it; `"uniform"` leaves nobody more than one part in n.
    """

    asks: ClassVar[Asks] = Asks(fewest=lambda _: 3)
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        return Combined(geometric_median(list(updates.values()), np.array(shares_of(weights))))

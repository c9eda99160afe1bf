"""The geometric median of the means of groups (Chen, Su and Xu 2017), for clients that nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from .geometric_median import geometric_median
from .rule import Combined, GroupRule, register


@register("geometric_median_of_means")
@dataclass(frozen=True, slots=True)
class GeometricMedianOfMeans(GroupRule):
    """Δ has the least sum of distances to the groups' means. It stays near those of honest groups while fewer than half
    of the groups have a hostile client. A group counts alike whatever weights its clients state.
    """

    settings: Aggregation

    def combine(self, means: Sequence[State]) -> Combined:
        return Combined(geometric_median(means, np.full(len(means), 1 / len(means))))

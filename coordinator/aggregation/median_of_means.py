"""The coordinate-wise median of the means of groups: median of means, for clients that nobody sees one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .rule import Combined, GroupRule, register


@register("median_of_means")
@dataclass(frozen=True, slots=True)
class MedianOfMeans(GroupRule):
    """Each coordinate of Δ is the median of that coordinate over the groups' means.

    One hostile client spoils one group, wherever it stands, so Δ stays within the means of honest groups while fewer
    than half of the groups have a hostile client. A group counts alike whatever weights its clients state.
    """

    settings: Aggregation

    def combine(self, means: Sequence[State]) -> Combined:
        return Combined(columns.median(means))

"""Multi-Krum: the mean of the updates that have the most others near them (Blanchard et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from farfield.protocols.rules import Asks
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .rule import Combined, ViewRule, enough, register


def _fewest(settings: Aggregation) -> int:
    """n > 2f + 2, without which the paper promises nothing, and n - f - 2 ≥ m."""
    malicious = settings.malicious or 0
    return max(2 * malicious + 3, malicious + 2 + (settings.kept or 1))


@register("multi_krum")
@dataclass(frozen=True, slots=True)
class MultiKrum(ViewRule):
    """An update's score is the sum of its squared distances to the n - f - 2 others that are nearest to it, and Δ is
    the mean of the m updates with the lowest scores. f is `malicious`; m is `kept`, and n - f - 2 without it. With
    m = 1 it is Krum.

    All clients count alike, as in the paper: a weight that a client states of itself could undo the choice. Of equal
    scores the first node's counts as lower.
    """

    asks: ClassVar[Asks] = Asks(frozenset({"malicious", "kept"}), frozenset({"malicious"}), alike=True, fewest=_fewest)
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        """Raises RunError for fewer updates than the choice is defined for."""
        assert self.settings.malicious is not None, "the Plan is refused without it"
        enough(updates, _fewest(self.settings), "multi_krum")
        views = list(updates.values())
        near = len(views) - self.settings.malicious - 2
        apart = np.sort(columns.squared_distances(views), axis=1)
        scores = apart[:, 1 : near + 1].sum(axis=1)  # the first is to itself
        chosen = np.argsort(scores, kind="stable")[: self.settings.kept or near]
        return Combined(columns.combination([views[one] for one in chosen], np.full(len(chosen), 1 / len(chosen))))

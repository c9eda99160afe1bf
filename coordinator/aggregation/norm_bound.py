"""The weighted mean of updates none of which is longer than a bound (norm thresholding; Sun et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from farfield.protocols.rules import Asks
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .factors import shares_of
from .rule import Combined, ViewRule, register


@register("norm_bound")
@dataclass(frozen=True, slots=True)
class NormBound(ViewRule):
    """Δ = Σ pₖ·Δₖ·min(1, M / ‖Δₖ‖₂) with pₖ = wₖ / Σ w. M is `norm_bound`, as in the paper, or `norm_multiple` times
    the median of the round's norms, which a minority cannot move beyond those of the others; by default once.

    It bounds how far one client moves the result, to pₖ·M, and not where to: a hostile one that keeps to the bound is
    averaged like any other.
    """

    asks: ClassVar[Asks] = Asks(
        frozenset({"norm_bound", "norm_multiple"}), fewest=lambda settings: 3 if settings.norm_bound is None else 1
    )
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        views = list(updates.values())
        norms = columns.norms(views)
        bound = self.settings.norm_bound
        if bound is None:
            bound = (self.settings.norm_multiple or 1.0) * float(np.median(norms))
        clipped = np.minimum(1.0, np.divide(bound, norms, out=np.ones_like(norms), where=norms > 0))
        return Combined(columns.combination(views, np.array(shares_of(weights)) * clipped))

"""The coordinate-wise median of updates (Yin et al. 2018, Definition 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from farfield.protocols.rules import Asks
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .rule import Combined, ViewRule, register


@register("median")
@dataclass(frozen=True, slots=True)
class Median(ViewRule):
    """Each coordinate of Δ is the median of that coordinate over the clients, and so never beyond what the honest ones
    sent while they are more than half. All clients count alike, as in the paper.

    It takes three updates: the median of two is their mean.
    """

    asks: ClassVar[Asks] = Asks(alike=True, fewest=lambda _: 3)
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        return Combined(columns.median(list(updates.values())))

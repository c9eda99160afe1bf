"""The coordinate-wise trimmed mean of updates (Yin et al. 2018, Definition 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from farfield.protocols.rules import Asks
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from . import columns
from .rule import Combined, ViewRule, enough, register


def _fewest(settings: Aggregation) -> int:
    return 2 * (settings.malicious or 0) + 1


@register("trimmed_mean")
@dataclass(frozen=True, slots=True)
class TrimmedMean(ViewRule):
    """In each coordinate the f largest and the f smallest values are left out, and the others averaged; f is
    `malicious`, and β·n in the paper. All clients count alike, as in the paper.

    With at most f hostile clients every coordinate stays within what the honest ones sent.
    """

    asks: ClassVar[Asks] = Asks(frozenset({"malicious"}), frozenset({"malicious"}), alike=True, fewest=_fewest)
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        """Raises RunError when so many are left out that none is left."""
        assert self.settings.malicious is not None, "the Plan is refused without it"
        enough(updates, _fewest(self.settings), "trimmed_mean")
        return Combined(columns.trimmed(list(updates.values()), self.settings.malicious))

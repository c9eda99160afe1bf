"""The weighted mean of updates: FedAvg (McMahan et al. 2017, Algorithm 1) on differences.

For LoRA it averages A and B apart (FedIT, Zhang et al. 2024), which is not the average of BA; with `freeze_a` in the
tuning method it is exact (FFA-LoRA, Sun et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farfield.protocols.messages import Trained
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from .rule import SumRule, register


@register("mean")
@dataclass(frozen=True, slots=True)
class WeightedMean(SumRule):
    """wₖ is the client's number of training examples, or 1 with `weighting = "uniform"`."""

    settings: Aggregation

    def weight(self, trained: Trained) -> float:
        return float(trained.examples) if self.settings.weighting == "examples" else 1.0

    def finish(self, weighted_sum: State, total_weight: float) -> State:
        for array in weighted_sum.values():
            np.divide(array, total_weight, out=array)
        return weighted_sum

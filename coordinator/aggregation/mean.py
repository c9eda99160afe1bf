"""The weighted mean of updates: FedAvg (McMahan et al. 2017, Algorithm 1) on differences.

For LoRA it averages A and B apart (FedIT, Zhang et al. 2024), which is not the average of BA; with `freeze_a` in the
tuning method it is exact (FFA-LoRA, Sun et al. 2024). A client that trains the first ranks of an adapter only does not
change the others, so these move by what the larger clients do, and no less is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farfield.protocols.messages import Trained
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from .rule import SumRule, register, weight_of


@register("mean")
@dataclass(frozen=True, slots=True)
class WeightedMean(SumRule):
    """wₖ is the client's number of training examples, or 1 with `weighting = "uniform"`."""

    settings: Aggregation

    def weight(self, trained: Trained) -> float:
        return weight_of(self.settings, trained)

    def finish(self, weighted_sum: State, total_weight: float) -> State:
        for array in weighted_sum.values():
            np.divide(array, total_weight, out=array)
        return weighted_sum

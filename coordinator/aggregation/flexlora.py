"""FlexLoRA: the mean of the products B·A, brought back to the adapter's rank (Bai et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from farfield.kernels import stacked
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from .factors import layers, mean_of_rest, shares_of
from .rule import Combined, ViewRule, register


@register("flexlora")
@dataclass(frozen=True, slots=True)
class FlexLora(ViewRule):
    """B·A ← SVD_R(Σ pₖ·Bₖ·Aₖ), with pₖ = wₖ / Σ w (Bai et al. 2024). Clients' ranks may differ.

    The sum is never formed: it is stacked as in FLoRA (Wang et al. 2024), which is exact, and what the SVD then
    leaves out is told as `lost`. The new B is U·Σ and the new A is Vᵀ, the strongest direction first, so that the first
    r ranks of both are the best adapter of rank r, which a client of rank r gets. Signs are those that leave A nearest
    to what it was. A rank for which nothing is left keeps its A, and gets a B of zero: it begins anew, as LoRA does;
    with both zero it would have no gradient ever again.

    What is no factor (a head) is averaged.
    """

    factors: ClassVar[bool] = True
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        shares = shares_of(weights)
        new = mean_of_rest(adapter, updates, shares)
        energy = lost = 0.0
        for layer in layers(adapter, updates):
            a, b = adapter[layer.a].astype(np.float64), adapter[layer.b].astype(np.float64)
            best = stacked.truncated(layer.trained_b, layer.trained_a, shares, len(a))
            found = len(best.values)
            signs = np.where((best.right * a[:found]).sum(axis=1) < 0, -1.0, 1.0)
            new_a, new_b = a.copy(), np.zeros_like(b)
            new_a[:found] = signs[:, None] * best.right
            new_b[:, :found] = best.left * (signs * best.values)
            new[layer.a], new[layer.b] = (new_a - a).astype(np.float32), (new_b - b).astype(np.float32)
            energy, lost = energy + best.energy, lost + best.lost
        return Combined(new, lost / energy if energy else 0.0)

"""HetLoRA: factors of unequal ranks padded with zeros, and weighted by how much they do (Cho et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

from .factors import layers, mean_of_rest, shares_of
from .rule import Combined, ViewRule, register


@register("hetlora")
@dataclass(frozen=True, slots=True)
class HetLora(ViewRule):
    """A ← Σ pₖ·pad(Aₖ) and B ← Σ pₖ·pad(Bₖ), in each layer with pₖ ∝ wₖ·‖Bₖ·Aₖ‖_F: the sparsity-weighted
    aggregation of Cho et al. 2024.

    The paper has no wₖ: `weighting = "uniform"` is the paper's. Padding makes the last ranks smaller, by what the
    clients weigh that do not have them, and the product of the means is not the mean of the products. Ranks that no
    client of the round has stay as they are, for of factors that are both zero nothing could grow. The paper's pruning
    of ranks by the clients is not here: the Plan says which ranks there are.

    What is no factor (a head) is averaged by wₖ alone.
    """

    factors: ClassVar[bool] = True
    settings: Aggregation

    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        shares = shares_of(weights)
        new = mean_of_rest(adapter, updates, shares)
        for layer in layers(adapter, updates):
            norms = [_norm(b, a) for b, a in zip(layer.trained_b, layer.trained_a, strict=True)]
            by_size = [share * norm for share, norm in zip(shares, norms, strict=True)]
            own = shares if not sum(by_size) else [size / sum(by_size) for size in by_size]
            rank = max(len(a) for a in layer.trained_a)
            new_a, new_b = adapter[layer.a].astype(np.float64), adapter[layer.b].astype(np.float64)
            new_a[:rank], new_b[:, :rank] = 0.0, 0.0
            for share, a, b in zip(own, layer.trained_a, layer.trained_b, strict=True):
                new_a[: len(a)] += share * a
                new_b[:, : len(a)] += share * b
            new[layer.a] = (new_a - adapter[layer.a]).astype(np.float32)
            new[layer.b] = (new_b - adapter[layer.b]).astype(np.float32)
        return Combined(new)


def _norm(b: NDArray[np.float64], a: NDArray[np.float64]) -> float:
    """‖B·A‖_F = √tr((BᵀB)·(AAᵀ)), of matrices of r × r."""
    return float(np.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T))))))

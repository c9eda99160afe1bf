"""What rules that combine LoRA's factors have in common: whole factors from changes, and the mean of all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farfield.emulator.factors import pairs
from farfield.protocols.tensors import State


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's factors as the clients trained them, float64, in the order of their nodes.

    Attributes:
        a, b: the names of A and B.
        trained_a: Aₖ, [rₖ, k].
        trained_b: Bₖ, [d, rₖ].
    """

    a: str
    b: str
    trained_a: list[NDArray[np.float64]]
    trained_b: list[NDArray[np.float64]]


def layers(adapter: State, updates: Mapping[str, State]) -> list[Layer]:
    """Every layer with both factors, by name."""
    return [
        Layer(
            a,
            b,
            [_trained(adapter[a], update[a]) for update in updates.values()],
            [_trained(adapter[b], update[b]) for update in updates.values()],
        )
        for a, b in pairs(adapter)
    ]


def shares_of(weights: Mapping[str, float]) -> list[float]:
    """pₖ = wₖ / Σ w, in order."""
    total = sum(weights.values())
    return [weight / total for weight in weights.values()]


def mean_of_rest(adapter: State, updates: Mapping[str, State], shares: list[float]) -> State:
    """Σ pₖ Δₖ of what is no factor: a head, DoRA's magnitudes."""
    factors = {name for pair in pairs(adapter) for name in pair}
    return {
        name: sum(
            (share * update[name].astype(np.float64) for share, update in zip(shares, updates.values(), strict=True)),
            start=np.zeros(array.shape),
        ).astype(np.float32)
        for name, array in adapter.items()
        if name not in factors
    }


def _trained(before: NDArray[np.float32], change: NDArray[np.float32]) -> NDArray[np.float64]:
    rows, columns = change.shape
    return before[:rows, :columns].astype(np.float64) + change

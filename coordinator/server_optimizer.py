"""Server optimisers: what the coordinator does with the aggregated update Δ (FedOpt; Reddi et al. 2021, Algorithm 2).

    none       x ← x + η Δ
    momentum   m ← β₁ m + Δ                                   x ← x + η m          (FedAvgM; Hsu et al. 2019)
    adam       m ← β₁ m + (1-β₁) Δ;  v ← β₂ v + (1-β₂) Δ²     x ← x + η m / (√v + τ)
    yogi       m as adam;  v ← v - (1-β₂) Δ² sign(v - Δ²)     x ← x + η m / (√v + τ)

As in the paper there is no bias correction, and v starts at τ².
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moment, m and v, by tensor name; empty before the first step."""

    first: State = field(default_factory=dict)
    second: State = field(default_factory=dict)


def step(settings: Aggregation, adapter: State, update: State, moments: Moments) -> tuple[State, Moments]:
    """The next adapter x and moments. Nothing passed in is changed; all arrays are float32 and keep their shapes.

    Tensors that `update` does not hold rested in this round: they and their moments stay as they are.
    """
    rate, beta1, beta2, tau = settings.learning_rate, settings.beta1, settings.beta2, settings.tau
    first: State = {}
    second: State = {}
    moved: State = {}
    for name, delta in update.items():
        direction = delta
        if settings.server_optimizer == "momentum":
            direction = first[name] = beta1 * moments.first.get(name, np.zeros_like(delta)) + delta
        elif settings.server_optimizer in ("adam", "yogi"):
            m = first[name] = beta1 * moments.first.get(name, np.zeros_like(delta)) + (1 - beta1) * delta
            v = moments.second.get(name, np.zeros_like(delta) + tau**2)
            square = delta * delta
            shrink = v - square if settings.server_optimizer == "adam" else square * np.sign(v - square)
            v = second[name] = (v - (1 - beta2) * shrink).astype(np.float32)
            direction = m / (np.sqrt(v) + tau)
        moved[name] = adapter[name] + rate * direction
    return {**adapter, **moved}, Moments(moments.first | first, moments.second | second)

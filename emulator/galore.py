"""GaLore's optimiser: AdamW whose moments live in a small subspace of each matrix's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8


class GaLore(torch.optim.Optimizer):
    """Adam in the subspace of a matrix's gradient G ∈ ℝ^(m×n), m ≤ n (Zhao et al. 2024, algorithm 2).

    Every `interval` steps P ∈ ℝ^(m×r) becomes the left singular vectors of G with the r largest singular values. Then

        R = Pᵀ·G;  M ← β₁·M + (1 - β₁)·R;  V ← β₂·V + (1 - β₂)·R²;  W ← W - η·α·P·(M̂ / (√V̂ + ε))

    with M̂ and V̂ the moments without their bias. Where m > n the right singular vectors take the part of the left.
    What is kept for a matrix is P and two moments, r·(m + 2n) values, where AdamW keeps 2·m·n. As in the authors' code
    the moments keep their values when P changes. What is no matrix, or has no side longer than r, has plain AdamW.

    Args:
        rank: r.
        interval: T.
        scale: α.
        weight_decay: decoupled (Loshchilov and Hutter 2019, algorithm 2).
    """

    def __init__(
        self,
        values: Iterable[torch.Tensor],
        lr: float,
        *,
        rank: int,
        interval: int,
        scale: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(values, {"lr": lr, "weight_decay": weight_decay})
        self._rank, self._interval, self._scale = rank, interval, scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    value.mul_(1 - group["lr"] * group["weight_decay"])
                    value.sub_(self._change(self.state[value], value.grad), alpha=group["lr"])
        return loss

    def _change(self, state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
        if gradient.ndim != 2 or min(gradient.shape) <= self._rank:
            return _adam(state, gradient)
        wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        if state.get("step", 0) % self._interval == 0:
            state["basis"] = basis(wide, self._rank)
        change: torch.Tensor = state["basis"] @ _adam(state, state["basis"].T @ wide) * self._scale
        return change if wide is gradient else change.T


def basis(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """float32[m, rank]: the left singular vectors of `gradient`, float32[m, n], with the largest singular values.

    As eigenvectors of G·Gᵀ, which is what they are: far cheaper than a decomposition of G. What squaring loses to
    rounding are small singular values, which are not wanted; it is done in float64 all the same.
    """
    square = gradient.double() @ gradient.double().T
    vectors: torch.Tensor = torch.linalg.eigh(square).eigenvectors
    return vectors[:, -rank:].flip(1).to(gradient.dtype)


def _adam(state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
    """M̂ / (√V̂ + ε) after this gradient (Kingma and Ba 2015, algorithm 1)."""
    if not {"first", "second"} <= state.keys():
        state["step"], state["first"], state["second"] = 0, torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    state["first"].lerp_(gradient, 1 - BETAS[0])
    state["second"].lerp_(gradient.square(), 1 - BETAS[1])
    first: torch.Tensor = state["first"] / (1 - BETAS[0] ** state["step"])
    second: torch.Tensor = state["second"] / (1 - BETAS[1] ** state["step"])
    return first / second.sqrt_().add_(EPSILON)

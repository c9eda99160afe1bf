"""The layers that an emulator has instead of a backbone's linear ones."""

from __future__ import annotations

import torch
from torch import nn

from farfield.kernels import nf4


class LowRankLinear(nn.Module):
    """x ↦ up(down(x)): a matrix [out_features, in_features] as two factors of rank `rank`; the bias is that of `up`."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        result: torch.Tensor = self.up(self.down(inputs))
        return result


class Nf4Linear(nn.Module):
    """A frozen linear layer whose matrix [out_features, in_features] is in NF4; it has no memory until it is filled."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        packed, scales = nf4.sizes(out_features, in_features)
        self.register_buffer("packed", torch.empty(packed, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.bfloat16, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        return nf4.linear(inputs, self.packed, self.scales, self.bias, self.out_features, self.in_features)

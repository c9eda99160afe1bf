"""The layers that a model can have instead of a backbone's linear ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import nn

from farfield.kernels import int8, nf4


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


class RoundedLinear(nn.Linear):
    """A frozen linear layer that holds its matrix [out_features, in_features] in fewer bits.

    It has no memory until it is filled. `weight` makes the matrix anew each time that it is read, so that whoever knows
    `nn.Linear` can work with this one; what is written into it is lost.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would take memory for the whole matrix
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None)
        self.dtype = torch.get_default_dtype()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix in `dtype`."""
        return self.matrix(self.dtype)

    @abstractmethod
    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in this format."""

    @abstractmethod
    def hold(self, weight: torch.Tensor) -> None:
        """Take over the matrix [out_features, in_features], rounded."""


@final
class Nf4Linear(RoundedLinear):
    """In NF4 (`farfield.kernels.nf4`)."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        packed, scales = nf4.sizes(out_features, in_features)
        self.register_buffer("packed", torch.empty(packed, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.bfloat16, device="meta"))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        return nf4.linear(inputs, self.packed, self.scales, self.bias, self.out_features, self.in_features)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return nf4.dequantize(self.packed, self.scales, self.out_features, self.in_features, dtype)

    def hold(self, weight: torch.Tensor) -> None:
        # Room for what stays is taken before what does not: the other way round, the heap could not shrink again.
        self.packed = torch.empty_like(self.packed, device=weight.device)
        packed, self.scales = nf4.quantize(weight)
        self.packed.copy_(packed)


@final
class Int8Linear(RoundedLinear):
    """In 8 bits with a scale for each row (`farfield.kernels.int8`)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32, device="meta"))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        return int8.linear(inputs, self.codes, self.scales, self.bias)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return int8.dequantize(self.codes, self.scales, dtype)

    def hold(self, weight: torch.Tensor) -> None:
        self.codes = torch.empty_like(self.codes, device=weight.device)  # first, as above
        codes, self.scales = int8.quantize(weight)
        self.codes.copy_(codes)

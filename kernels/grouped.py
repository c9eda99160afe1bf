"""One batch through many adapters at once: every row by the adapter of its own group.

    yᵢ = Bg·Ag·xᵢ, with g the group that row i belongs to

The rows of a group stand together. All adapters are of one rank; smaller ones are to be padded with zeros, which
changes no product. `torch` multiplies all groups in one call, forward and backward.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm, pad


def reference_low_rank(inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As `low_rank`, group by group."""
    parts = torch.split(inputs, counts.tolist())
    return torch.cat([part @ one_a.T @ one_b.T for part, one_a, one_b in zip(parts, a, b, strict=True)])


def low_rank(inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[n, d]: each row of `inputs` through the factors of its group.

    Args:
        inputs: float32 or bfloat16 [n, k], the rows of the first group first.
        a: [groups, r, k], of the same dtype.
        b: [groups, d, r].
        counts: int64[groups]: how many rows each group has; their sum is n.
    """
    ends = counts.cumsum(0).to(torch.int32)
    narrow = grouped_mm(_aligned(inputs, -1), _aligned(a, -1, -2).transpose(1, 2), offs=ends)
    whole = grouped_mm(narrow, _aligned(b, -1, -2).transpose(1, 2), offs=ends)
    return whole[:, : b.shape[1]]


def _aligned(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """`tensor` with zeros behind it in these dimensions, so that every row begins at 16 bytes, as torch wants it."""
    values = 16 // tensor.element_size()
    padding = [0] * (2 * tensor.ndim)
    for dimension in dimensions:
        padding[2 * (-1 - dimension) + 1] = -tensor.shape[dimension] % values
    return pad(tensor, padding) if any(padding) else tensor

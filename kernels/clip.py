"""Gradients of single examples, and the sum of them with each clipped to a norm (Abadi et al. 2016, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_INSIDE = 1 - 2**-22
"""Factors are this much smaller, so that rounding them and what they multiply takes no example over the limit."""

_TOGETHER = 32
"""Examples that are summed in float32; sums of so many are added up in float64."""

SUM_ERROR = _TOGETHER**2 * 2**-23
"""What rounding can add to the change of a sum by one example, in units of the limit.

A float32 sum of m terms is off by at most m·2⁻²⁴ of the sum of their magnitudes, which is m limits at most; and by as
much again without the example.
"""


def reference_of_linear(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """As `of_linear`, example by example, in float64 and left there."""
    return torch.stack(
        [torch.einsum("...o,...i->oi", g, a) for a, g in zip(inputs.double(), outputs.double(), strict=True)]
    )


def of_linear(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The gradient by a linear layer's weight of each example: one product of matrices for each.

    Nothing is cheaper for the factors of LoRA: a norm without the gradient itself (ghost clipping) takes products of
    tokens by tokens, and these gradients are smaller than that.

    Args:
        inputs: what the layer read, [examples, ..., in].
        outputs: gradients of what it returned, [examples, ..., out], in the same dtype.

    Returns:
        float32[examples, out, in], contiguous. For bfloat16 each value is summed in float32 and rounded once, as in
        the gradient of a whole batch.
    """
    examples, width = len(inputs), inputs.shape[-1]
    inputs = inputs.reshape(examples, -1, width)
    outputs = outputs.reshape(examples, inputs.shape[1], -1)
    # Matrix products are up to three times as fast where the result's rows are the longer side.
    if outputs.shape[-1] <= width:
        gradients = torch.bmm(outputs.transpose(1, 2), inputs)
    else:
        gradients = torch.bmm(inputs.transpose(1, 2), outputs).transpose(1, 2)
    return gradients.contiguous().float()


def of_embedding(indices: torch.Tensor, outputs: torch.Tensor, rows: int) -> torch.Tensor:
    """The gradient by an embedding's weight of each example.

    Args:
        indices: int64[examples, ...], what was looked up.
        outputs: gradients of what was found, [examples, ..., width].
        rows: how many the embedding has.

    Returns:
        float32[examples, rows, width].
    """
    examples, width = len(indices), outputs.shape[-1]
    found = torch.zeros(examples, rows, width, dtype=torch.float32, device=outputs.device)
    places = indices.reshape(examples, -1, 1).expand(-1, -1, width)
    return found.scatter_add_(1, places, outputs.reshape(examples, -1, width).float())


def reference_clipped_sums(gradients: Sequence[torch.Tensor], limit: float) -> list[torch.Tensor]:
    """As `clipped_sums`, example by example, in float64; all gradients are finite."""
    sums = [torch.zeros(one.shape[1:], dtype=torch.float64, device=one.device) for one in gradients]
    for example in zip(*(one.double() for one in gradients), strict=True):
        norm = torch.sqrt(sum((one.square().sum() for one in example), torch.zeros(()).double()))
        for total, one in zip(sums, example, strict=True):
            total += one * min(1.0, limit / max(float(norm), torch.finfo(torch.float64).tiny))
    return sums


def clipped_sums(gradients: Sequence[torch.Tensor], limit: float) -> list[torch.Tensor]:
    """The sum over the examples, where each example's gradient counts with a norm of at most `limit`.

    The norm is taken over all tensors together. A gradient that is not finite counts as zero: one example that
    overflows must neither spoil the sum nor show in it. So does one longer than 2¹²⁶ limits, whose factor float32 has
    only roughly, if at all.

    Args:
        gradients: float32[examples, ...] of each parameter.

    Returns:
        float64[...] of each parameter. Without examples they are zero.
    """
    rows = [gradient.flatten(1) for gradient in gradients]
    # The squares of what float32 holds fit into float64, and its sums round to nothing here.
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]).norm(dim=0)
    counted = norms * torch.finfo(torch.float32).tiny <= limit * _INSIDE  # not of NaN, either
    if not bool(counted.all()):
        rows = [torch.where(counted[:, None], row, 0.0) for row in rows]  # a factor of zero would leave NaN what it is
    factors = torch.where(counted, (limit * _INSIDE / norms).clamp(max=1.0), 0.0).float()
    sums = [torch.zeros(gradient.shape[1:], dtype=torch.float64, device=gradient.device) for gradient in gradients]
    for row, total in zip(rows, sums, strict=True):
        for some, of_them in zip(torch.split(factors, _TOGETHER), torch.split(row, _TOGETHER), strict=True):
            total.view(-1).add_(some @ of_them)
    return sums

"""Int8: weights in 8 bits, a scale for each row (Dettmers et al. 2022, "LLM.int8()", section 2; absmax by rows).

Each row of a matrix is divided by a 127th of its largest magnitude and rounded. The quantising is done by
`bitsandbytes`; `reference_*` is the same in plain torch. Only weights are rounded, never what they are multiplied by:
so a model computes the same in training and in evaluation, on a CPU and on a GPU.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch

STEPS: Final = 127


def reference_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize`."""
    half = weight.detach().half().float()
    scales = half.abs().amax(dim=1)
    # A row of zeros has no scale, and its zeros stay.
    steps = half * (STEPS / scales.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(1)
    return steps.round().to(torch.int8), scales


def reference_dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantize`."""
    return (codes.float() * (scales / STEPS).unsqueeze(1)).to(dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps, int8[rows, columns], and the largest magnitude of each row, float32[rows]; by way of float16."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.detach().half().contiguous())
    return codes, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [rows, columns] that the steps and scales stand for, in `dtype`."""
    steps = (scales / STEPS).unsqueeze(1)
    # A number of 8 bits is exact in bfloat16; the product is rounded once, whichever format it is made in.
    return torch.mul(codes, steps).to(dtype)


def linear(inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`inputs` [..., columns] times the transposed matrix, in the dtype of the inputs; gradients go to the inputs only.

    Nothing but the 8 bits is kept for the way back: the matrix is made again there.
    """
    product = cast("torch.Tensor", _Linear.apply(inputs, codes, scales))  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return inputs @ dequantize(codes, scales, inputs.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient @ dequantize(codes, scales, gradient.dtype), None, None

"""A low-rank product added to what a layer gave, where the first factor is frozen.

    y ← y + s·(x·Aᵀ)·Bᵀ

With A frozen the way back needs h = x·Aᵀ and not x: r values for each row, where x has the width of the layer.

    g_B = s·g_yᵀ·h,    g_x = s·(g_y·B)·A,    g_y goes on as it is

Autograd keeps no more than that by itself. But it makes the product, its multiple and the sum as three tensors of the
size of y, and reads each again; here the product is added into y as it is made.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def reference_add_(
    outputs: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """As `add_`, with autograd as it comes, and `outputs` left alone."""
    return outputs + linear(linear(inputs, a.detach()), b) * scale


def add_(outputs: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`outputs` plus s·(x·Aᵀ)·Bᵀ, which is made in its memory; use what is returned, and `outputs` no more.

    In bfloat16 a value is rounded once, as it is added. Gradients go to `outputs`, `inputs` and `b`.

    Args:
        outputs: y, float[..., d], contiguous, and needed by no other way back (a linear layer does not need its own).
        inputs: x, [..., k], of the same dtype.
        a: A, [r, k].
        b: B, [d, r].
        scale: s.
    """
    return cast("torch.Tensor", _Add.apply(outputs, inputs, a, b, scale))  # type: ignore[no-untyped-call]


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        narrow = linear(inputs.flatten(0, -2), a)
        ctx.save_for_backward(narrow, a, b)
        ctx.scale = scale
        ctx.mark_dirty(outputs)
        outputs.view(-1, len(b)).addmm_(narrow, b.T, alpha=scale)
        return outputs

    @staticmethod
    @once_differentiable  # what is kept is no input, so a second derivative would miss a part
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, Any, None]:
        narrow, a, b = ctx.saved_tensors
        rows = gradient.reshape(-1, len(b))
        d_inputs = ((rows @ b) * ctx.scale @ a).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        d_b = (rows.T @ narrow) * ctx.scale if ctx.needs_input_grad[3] else None
        return gradient, d_inputs, None, d_b, None

"""Cross-entropy over the positions that have a target, of logits or of the hidden states that they are made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch.nn.functional import cross_entropy, linear

IGNORED = -100
"""The label of a position that is not predicted."""


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods in nats, a float32 scalar; 0 when nothing is predicted.

    Args:
        logits: float[..., classes], any float dtype; the softmax is computed in float32.
        labels: int64[...], `IGNORED` where there is nothing to predict.
    """
    chosen = labels != IGNORED
    return cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")


def hits(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """How many targets have the largest logit; arguments as for `summed`."""
    chosen = labels != IGNORED
    return int((logits[chosen].argmax(dim=-1) == labels[chosen]).sum())


CHUNK: Final = 1 << 23
"""How many logits are there at a time, at most: 16 MB in bfloat16, and 32 in float32 for their softmax."""


def reference_summed_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """As `summed_linear`, with all logits at once."""
    return summed(linear(hidden, weight, bias), labels)


def summed_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """`summed` of hidden · weightᵀ + bias, whose logits are made and used up a chunk of positions at a time.

    The gradient goes to `hidden` only, and is computed along with the loss: what is kept for it is of the size of
    `hidden`, and each logit is computed once.

    Args:
        hidden: float[..., width].
        weight: float[classes, width], of the same dtype; frozen.
        bias: float[classes], frozen, or None.
        labels: int64[...], `IGNORED` where there is nothing to predict.
    """
    return cast("torch.Tensor", _SummedLinear.apply(hidden, weight, bias, labels))  # type: ignore[no-untyped-call]


@torch.no_grad()
def summed_and_hits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """`summed` and `hits` of hidden · weightᵀ + bias, a chunk of positions at a time; arguments as `summed_linear`."""
    chosen = labels != IGNORED
    total, right = torch.zeros((), device=hidden.device), 0
    for states, targets in _chunks(hidden[chosen], labels[chosen], len(weight)):
        logits = linear(states, weight, bias)
        total += summed(logits, targets)
        right += hits(logits, targets)
    return total, right


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        chosen = labels != IGNORED
        total = torch.zeros((), device=hidden.device)
        gradients = []
        for states, targets in _chunks(hidden[chosen], labels[chosen], len(weight)):
            scores = linear(states, weight, bias).float()
            logsum = scores.logsumexp(dim=-1, keepdim=True)
            at = targets.unsqueeze(-1)
            total += (logsum - scores.gather(-1, at)).sum()
            if ctx.needs_input_grad[0]:
                scores.sub_(logsum).exp_()
                scores.scatter_add_(-1, at, scores.new_full(at.shape, -1.0))
                gradients.append(scores.to(weight.dtype) @ weight)
        if ctx.needs_input_grad[0]:
            ctx.chosen = chosen
            ctx.save_for_backward(torch.cat(gradients) if gradients else hidden.new_zeros(0, hidden.shape[-1]))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (chosen,) = ctx.saved_tensors
        whole = chosen.new_zeros(*ctx.chosen.shape, chosen.shape[-1])
        whole[ctx.chosen] = (chosen * gradient).to(chosen.dtype)
        return whole, None, None, None


def _chunks(hidden: torch.Tensor, labels: torch.Tensor, classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, CHUNK // classes)
    for begin in range(0, len(labels), rows):
        yield hidden[begin : begin + rows], labels[begin : begin + rows]

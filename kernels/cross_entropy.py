"""Cross-entropy over the positions that have a target."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

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

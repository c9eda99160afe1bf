"""A Plan's optimiser, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from farfield.protocols.sections import Training


def learning_rate(training: Training, step: int, horizon: int) -> float:
    """The rate of optimiser step `step` (from 0) of `horizon`: a linear warm-up, then the Plan's schedule."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, horizon - training.warmup_steps)
    match training.schedule:
        case "constant":
            return training.learning_rate
        case "linear":
            return training.learning_rate * (1 - progress)
        case "cosine":
            return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(training: Training, values: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
    """The Plan's optimiser of the named `values`; whoever steps with it sets the rate."""
    settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "sgd":
        return torch.optim.SGD(values.values(), momentum=training.momentum, **settings)
    return torch.optim.AdamW(values.values(), **settings)

"""A Plan's optimiser, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from farfield.emulator import offline  # noqa: F401 - for its effect
from farfield.protocols.sections import Training

LARGEST_SCALE: Final = 1.0
"""ε₂ of Adafactor: a step is scaled by the root mean square of its parameter, but by this at least."""


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
    """The Plan's optimiser of the named float32 `values`; whoever steps with it sets the rate.

    `adamw-8bit` is that of bitsandbytes (Dettmers et al. 2022): both moments in 8 bits, in blocks of 256 values with a
    scale of their own. `adafactor` is torch's, with the scale of a step taken from the rate alone: scaled by the size
    of a parameter, as Shazeer and Stern 2018 propose for whole models, an adapter that begins at zero would not move.
    """
    settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(values.values(), momentum=training.momentum, **settings)
        case "adamw":
            return torch.optim.AdamW(values.values(), **settings)
        case "adafactor":
            return torch.optim.Adafactor(values.values(), eps=(None, LARGEST_SCALE), **settings)
        case "adamw-8bit":
            from bitsandbytes import optim

            eight_bit: Any = optim

            # Left to itself it keeps the moments of tensors with fewer than 4,096 values in 32 bits, and most of an
            # adapter's tensors are smaller.
            optimizer: torch.optim.Optimizer = eight_bit.AdamW8bit(values.values(), min_8bit_size=0, **settings)
            return optimizer

"""Training on public text at the owner's: what others could make of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from farfield.protocols.sections import Training

from .descent import Loss, descend
from .methods import Tuned
from .objective import loss
from .streams import Batch


def fit(
    tuned: Tuned, training: Training, drawn: Callable[[int], Batch], on_step: Callable[[int, float], None] | None = None
) -> None:
    """Train what `tuned` trains for `training.steps` steps of the language model's loss, and leave it so.

    Optimiser, rates, clipping and seed are those of `training`; the model is left in evaluation mode. The same
    arguments give the same weights.

    Args:
        drawn: the batch of a step, by its number from 0.
        on_step: told the number of each step that is done, from 1, and its loss.

    Raises:
        TuningError: the loss is no longer a number, or has left the first one far behind.
    """
    assert training.steps is not None
    start = {name: one.detach().float().cpu().numpy().copy() for name, one in tuned.trainable().items()}

    def losses(step: int) -> Loss:
        batch = drawn(step)

        def mean(backward: bool) -> float:
            with torch.set_grad_enabled(backward):
                total = loss(cast("Any", tuned.model), batch)
                if backward:
                    total.backward()  # type: ignore[no-untyped-call]
            return float(total.detach())

        return mean

    told = None if on_step is None else lambda step, value: on_step(step + 1, value)
    descend(tuned, start, training, losses, seed=training.seed, steps=training.steps, on_step=told)

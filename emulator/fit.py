"""Training on public text at the owner's: what others could make of what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive

from .masters import MasterWeights
from .methods import Tuned
from .objective import loss
from .schedule import learning_rate, make_optimizer
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
        EmulatorError: the loss is no longer a number.
    """
    assert training.steps is not None
    parameters = tuned.trainable()
    masters = MasterWeights(parameters, {name: one.detach().float().cpu().numpy() for name, one in parameters.items()})
    optimizer = make_optimizer(training, masters.values)
    device = masters.values[0].device
    model: Any = tuned.model
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(training.seed, "dropout"))
        model.train()
        if tuned.before_training is not None:
            tuned.before_training()
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step, training.steps)
            total = loss(model, drawn(step))
            total.backward()  # type: ignore[no-untyped-call]
            value = float(total.detach())
            if not math.isfinite(value):
                raise EmulatorError(
                    f"the loss is {value} in step {step + 1} of training on public text",
                    hint=f"Lower the learning rate, which is {training.learning_rate:g}.",
                )
            if tuned.after_backward is not None:
                tuned.after_backward(step)
                masters.absorb()
            masters.take_gradients()
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(masters.values, training.max_grad_norm)
            optimizer.step()
            masters.publish()
            if on_step is not None:
                on_step(step + 1, value)
        model.eval()

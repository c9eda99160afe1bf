"""Training step by step, whatever a step is: the loop that clients and owners share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import torch

from farfield.protocols.errors import TuningError
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Arrays

from .masters import MasterWeights
from .methods import Tuned
from .schedule import learning_rate, make_optimizer

Loss: TypeAlias = Callable[[bool], float]
"""The mean loss over a step's targets, in nats, at the parameters as they are. Called with True, it also adds its
gradient to `grad` of every trained parameter; with False it builds no graph."""

DIVERGED: Final = 10.0
"""Nats above the first step's loss from which training is taken to have gone astray: e¹⁰ times less likely."""


class Descent(Protocol):
    """How a method gets from one step to the next."""

    def step(self, number: int, rate: float, loss: Loss) -> float:
        """Make step `number` (from 0, over all rounds) at this rate and return its loss, from before the step."""
        ...

    def update(self) -> Arrays:
        """Trained minus starting value of every trained parameter, float32, by name. Called once, at the end.

        Raises:
            TuningError: a value is no number.
        """
        ...


class GradientDescent:
    """The Plan's optimiser on gradients that autograd finds."""

    def __init__(self, tuned: Tuned, start: Arrays, training: Training) -> None:
        self._tuned, self._training = tuned, training
        self._masters = MasterWeights(tuned.trainable(), start)
        make = tuned.optimizer or make_optimizer
        self._optimizer = make(training, self._masters.by_name)

    def step(self, number: int, rate: float, loss: Loss) -> float:
        masters, training = self._masters, self._training
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        value = loss(True)
        if self._tuned.after_backward is not None:
            self._tuned.after_backward(number)
            masters.absorb()
        masters.take_gradients()
        if training.proximal_mu:
            masters.pull_back(training.proximal_mu)
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(masters.values, training.max_grad_norm)
        self._optimizer.step()
        masters.publish()
        return value

    def update(self) -> Arrays:
        update = self._masters.update()
        if not all(math.isfinite(float(change.sum())) for change in update.values()):
            raise TuningError("a trained value is no longer a number", hint=_lower(self._training))
        return update


def descend(
    tuned: Tuned,
    start: Arrays,
    training: Training,
    losses: Callable[[int], Loss],
    *,
    seed: int,
    steps: int,
    first_step: int = 0,
    horizon: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Arrays:
    """Make `steps` steps from `start` and return what they changed, float32, by name.

    The model is left with what was trained, in evaluation mode. The same arguments give the same result.

    Args:
        start: float32 starting value of every trained parameter, by name.
        losses: what a step goes by, from its number.
        seed: decides every dropout mask, and whatever else the method draws; the global generator is left as it was.
        first_step: the number of the first step, and `horizon` how many there are in all, for the schedule.
        on_step: told the number of each step that is done, and its loss.

    Raises:
        TuningError: a loss or a trained value is no number, or a loss has left the first one far behind.
    """
    device = next(tuned.model.parameters()).device
    descent = tuned.descent(start, training, seed) if tuned.descent else GradientDescent(tuned, start, training)
    first = math.inf
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        tuned.model.train(tuned.descent is None)
        if tuned.before_training is not None:
            tuned.before_training()
        try:
            for step in range(first_step, first_step + steps):
                rate = learning_rate(training, step, horizon or steps)
                value = descent.step(step, rate, losses(step))
                first = min(first, value) if step > first_step else value
                _check(value, first, step - first_step, training)
                if on_step is not None:
                    on_step(step, value)
        finally:
            tuned.model.eval()
    return descent.update()


def _check(value: float, first: float, step: int, training: Training) -> None:
    if not math.isfinite(value):
        raise TuningError(f"the loss is {value} in step {step + 1}", hint=_lower(training))
    if value > first + DIVERGED:
        raise TuningError(
            f"training diverges: the loss is {value:.4g} in step {step + 1}, and was {first:.4g}", hint=_lower(training)
        )


def _lower(training: Training) -> str:
    return f"Lower training.learning_rate, which is {training.learning_rate:g}."

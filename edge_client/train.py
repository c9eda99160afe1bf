"""Local training and evaluation: what one client does with its examples in one round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from farfield.emulator.masters import MasterWeights
from farfield.emulator.methods import Tuned
from farfield.emulator.schedule import learning_rate, make_optimizer
from farfield.kernels import cross_entropy
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .data import Example, batches, collate


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training did.

    Attributes:
        update: trained minus starting value of every trained parameter, float32, by name.
        loss: mean loss in nats over the `targets` (tokens or classes) predicted in `steps` optimiser steps.
    """

    update: State
    loss: float
    targets: int
    steps: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean loss in nats over `targets`, and how many of them had the largest logit."""

    loss: float
    targets: int
    correct: int


def local_steps(training: Training, examples: int) -> int:
    """Optimiser steps of one round for a client with so many training examples."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    micro_batches = math.ceil(examples / training.batch_size)
    return training.epochs * math.ceil(micro_batches / training.gradient_accumulation)


def train(
    tuned: Tuned,
    start: State,
    examples: Sequence[Example],
    training: Training,
    *,
    pad_id: int,
    seed: int,
    steps: int,
    first_step: int,
    horizon: int,
    on_step: Callable[[float], None] | None = None,
) -> Outcome:
    """Make `steps` optimiser steps from `start`; the model is left with what was trained.

    Args:
        start: float32 starting value of every trained parameter, by name.
        seed: decides the order of the examples and every dropout mask; the global generator is left as it was.
        first_step: the number of the first step, and `horizon` how many there are, over all rounds (for the schedule).
        on_step: called after each step with its mean loss.
    """
    device = next(tuned.model.parameters()).device
    masters = MasterWeights(tuned.trainable(), start)
    optimizer = make_optimizer(training, masters.values)
    stream = _micro_batches(examples, training, seed)
    total_loss, total_targets = 0.0, 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        tuned.model.train()
        if tuned.before_training is not None:
            tuned.before_training()
        for step in range(first_step, first_step + steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step, horizon)
            loss, targets = _accumulate(tuned, next(stream), pad_id, device)
            if tuned.after_backward is not None:
                tuned.after_backward(step)
                masters.absorb()
            masters.take_gradients()
            if training.proximal_mu:
                masters.pull_back(training.proximal_mu)
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(masters.values, training.max_grad_norm)
            optimizer.step()
            masters.publish()
            total_loss += loss
            total_targets += targets
            if on_step is not None:
                on_step(loss / targets)
        tuned.model.eval()
    return Outcome(masters.update(), total_loss / total_targets, total_targets, steps)


@torch.no_grad()
def evaluate(tuned: Tuned, examples: Sequence[Example], batch_size: int, *, pad_id: int) -> Measured:
    """Loss and hits over `examples`, without dropout."""
    device = next(tuned.model.parameters()).device
    tuned.model.eval()
    loss, targets, correct = 0.0, 0, 0
    for batch in batches(examples, batch_size, seed=None, epoch=0):
        logits, labels = forward(tuned, collate(batch, pad_id), device)
        loss += float(cross_entropy.summed(logits, labels))
        correct += cross_entropy.hits(logits, labels)
        targets += int((labels != cross_entropy.IGNORED).sum())
    return Measured(loss / targets, targets, correct)


def _micro_batches(examples: Sequence[Example], training: Training, seed: int) -> Iterator[list[list[Example]]]:
    """For ever: the micro-batches of one optimiser step, epoch after epoch; an epoch's last group may be smaller."""
    for epoch in itertools.count():
        epoch_batches = batches(examples, training.batch_size, seed=seed, epoch=epoch)
        while group := list(itertools.islice(epoch_batches, training.gradient_accumulation)):
            yield group


def _accumulate(tuned: Tuned, group: list[list[Example]], pad_id: int, device: torch.device) -> tuple[float, int]:
    """Gradients of the mean loss over all targets of the group; returns the summed loss and the number of targets."""
    collated = [collate(batch, pad_id) for batch in group]
    targets = sum(int((_targets(one) != cross_entropy.IGNORED).sum()) for one in collated)
    total = 0.0
    for one in collated:
        logits, labels = forward(tuned, one, device)
        loss = cross_entropy.summed(logits, labels)
        (loss / targets).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, targets


def forward(
    tuned: Tuned, collated: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels that belong to each other, position by position (a causal model predicts the next token)."""
    inputs = {name: tensor.to(device) for name, tensor in collated.items() if name != "labels"}
    logits: torch.Tensor = tuned.model(**inputs).logits
    labels = _targets(collated).to(device)
    if labels.ndim == 1:
        return logits, labels
    return logits[:, -collated["labels"].shape[1] : -1], labels


def _targets(collated: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The labels that are predicted: a class, or every token but the first."""
    labels = collated["labels"]
    return labels if labels.ndim == 1 else labels[:, 1:]

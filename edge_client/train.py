"""Local training and evaluation: what one client does with its examples in one round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from farfield.emulator.descent import Loss, descend
from farfield.emulator.head import off
from farfield.emulator.methods import Tuned
from farfield.kernels import cross_entropy
from farfield.protocols.sections import Training
from farfield.protocols.tensors import Arrays

from .data import Example, batches, collate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training did.

    Attributes:
        update: trained minus starting value of every trained parameter, float32, by name.
        loss: mean loss in nats over the `targets` (tokens or classes) predicted in `steps` optimiser steps.
    """

    update: Arrays
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
    start: Arrays,
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
    stream = micro_batches(examples, training, seed)
    targets, total_loss, total_targets = 0, 0.0, 0

    def losses(_: int) -> Loss:
        nonlocal targets
        group = [collate(batch, pad_id) for batch in next(stream)]
        targets = sum(int((_targets(one) != cross_entropy.IGNORED).sum()) for one in group)
        return partial(mean_loss, tuned, group, targets, device)

    def counted(_: int, loss: float) -> None:
        nonlocal total_loss, total_targets
        total_loss += loss * targets
        total_targets += targets
        if on_step is not None:
            on_step(loss)

    update = descend(
        tuned, start, training, losses, seed=seed, steps=steps, first_step=first_step, horizon=horizon, on_step=counted
    )
    return Outcome(update, total_loss / total_targets, total_targets, steps)


@torch.no_grad()
def evaluate(tuned: Tuned, examples: Sequence[Example], batch_size: int, *, pad_id: int) -> Measured:
    """Loss and hits over `examples`, without dropout."""
    device = next(tuned.model.parameters()).device
    tuned.model.eval()
    loss, targets, correct = 0.0, 0, 0
    for batch in batches(examples, batch_size, seed=None, epoch=0):
        value, hits, labels = scored(tuned, collate(batch, pad_id), device)
        loss, correct = loss + value, correct + hits
        targets += int((labels != cross_entropy.IGNORED).sum())
    return Measured(loss / targets, targets, correct)


def micro_batches(examples: Sequence[T], training: Training, seed: int) -> Iterator[list[list[T]]]:
    """For ever: the micro-batches of one optimiser step, epoch after epoch; an epoch's last group may be smaller."""
    for epoch in itertools.count():
        epoch_batches = batches(examples, training.batch_size, seed=seed, epoch=epoch)
        while group := list(itertools.islice(epoch_batches, training.gradient_accumulation)):
            yield group


def mean_loss(
    tuned: Tuned, group: Sequence[Mapping[str, torch.Tensor]], targets: int, device: torch.device, backward: bool
) -> float:
    """The mean loss over all targets of the group, and, where wanted, its gradients."""
    total = 0.0
    with torch.set_grad_enabled(backward):
        for one in group:
            loss = _summed_loss(tuned, one, device)
            if backward:
                (loss / targets).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total / targets


def _summed_loss(tuned: Tuned, collated: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    if tuned.head is None:
        return cross_entropy.summed(*forward(tuned, collated, device))
    head: Any = tuned.head
    with off(head):
        hidden, labels = forward(tuned, collated, device)
    return cross_entropy.summed_linear(hidden, head.weight, head.bias, labels)


def scored(tuned: Tuned, collated: Mapping[str, torch.Tensor], device: torch.device) -> tuple[float, int, torch.Tensor]:
    """Summed loss, hits, and the labels."""
    if tuned.head is None:
        logits, labels = forward(tuned, collated, device)
        return float(cross_entropy.summed(logits, labels)), cross_entropy.hits(logits, labels), labels
    head: Any = tuned.head
    with off(head):
        hidden, labels = forward(tuned, collated, device)
    loss, hits = cross_entropy.summed_and_hits(hidden, head.weight, head.bias, labels)
    return float(loss), hits, labels


def forward(
    tuned: Tuned, collated: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels that belong to each other, position by position (a causal model predicts the next token).

    With the head taken off (`farfield.emulator.head.off`) they are hidden states instead of logits.
    """
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

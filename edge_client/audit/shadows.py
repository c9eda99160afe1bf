"""Shadow adapters: what the Plan's training makes of examples of which it is known which were trained on.

Each learns from half of the examples, and every other one from exactly those that the one before it did not see. So
each example was trained on by half of the shadows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.edge_client.data import Example
from farfield.edge_client.train import train
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .losses import losses
from .subject import Subject

MOST_STEPS: Final = 200
"""Optimiser steps of one shadow, at most."""


@dataclass(frozen=True, slots=True)
class Shadows:
    """k shadow adapters and n examples.

    Attributes:
        losses: float64[k, n], in nats per target.
        trained: bool[k, n], which were trained on which.
        steps: of the optimiser, of each.
    """

    losses: NDArray[np.float64]
    trained: NDArray[np.bool_]
    steps: tuple[int, ...]


def shadows(subject: Subject, examples: Sequence[Example], count: int, visits: float) -> Shadows:
    """Train `count` of them, an even number, each on its half about `visits` times; those that are there are kept."""
    trained = halves(len(examples), count, subject.seed)
    steps = tuple(_steps(subject, int(half.sum()), visits) for half in trained)
    found = []
    for number in range(count):
        half = [example for example, inside in zip(examples, trained[number], strict=True) if inside]
        place, what = f"membership/shadow-{number + 1}", f"shadow adapter {number + 1} of {count}"
        adapter = subject.notes.state(place, partial(_trained, subject, half, steps[number], number, what))
        subject.say(f"losses under {what}", number, count)
        found.append(subject.notes.values(f"{place}-losses", partial(losses, subject.bench, adapter, examples)))
    return Shadows(np.array(found), trained, steps)


def halves(examples: int, count: int, seed: int) -> NDArray[np.bool_]:
    """bool[count, examples]: which half each shadow is trained on, and the other half the one after it."""
    chosen = np.zeros((count, examples), bool)
    for pair in range(0, count, 2):
        half = random.Random(derive(seed, "membership", "half", pair)).sample(range(examples), examples // 2)
        chosen[pair, half] = True
        chosen[pair + 1] = ~chosen[pair]
    return chosen


def _steps(subject: Subject, examples: int, visits: float) -> int:
    training = subject.plan.training
    each = training.batch_size * training.gradient_accumulation
    return min(MOST_STEPS, max(1, round(visits * examples / each)))


def _trained(subject: Subject, examples: Sequence[Example], steps: int, number: int, what: str) -> State:
    """The adapter after the Plan's training on `examples` in one place, without anything that protects."""
    bench = subject.bench
    done = 0

    def counted(_: float) -> None:
        nonlocal done
        done += 1
        subject.say(f"training {what}", done, steps)

    bench.load(subject.initial)
    outcome = train(
        bench.tuned,
        subject.initial,
        examples,
        subject.plan.training.model_copy(update={"proximal_mu": 0.0}),
        pad_id=bench.pad_id,
        seed=derive(subject.seed, "membership", "shadow", number),
        steps=steps,
        first_step=0,
        horizon=steps,
        on_step=counted,
    )
    return {name: value + outcome.update[name] for name, value in subject.initial.items()}

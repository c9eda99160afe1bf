"""Task and Reply: all that crosses the wire between a round and a participant.

A participant is anything with `perform(task) -> reply`. `codec.py` turns these values into bytes and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .parcel import Buffer
from .tensors import Tensor


@dataclass(frozen=True, slots=True)
class Train:
    """Train from `adapter` on your own examples and return what changed.

    Attributes:
        clipping_norm: L2 norm to which the whole update is to be clipped, where the Plan bounds a client's part.
    """

    adapter: Mapping[str, Tensor]
    clipping_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure `adapter` on your own held-out examples."""

    adapter: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Secure:
    """Take one step of a secure aggregation (`farfield.protocols.secagg`).

    Attributes:
        step: which one, by the value of its `secagg.Step`.
        session: which aggregation it belongs to; drawn by the coordinator.
        common: what every participant of the step gets alike.
        own: what this one gets besides.
        subject: the `summing.Subject` of the aggregation, encoded, at the step that submits; empty at the others.
        work: what is to be done and added, at the step that submits; None at the others.
    """

    step: str
    session: bytes
    common: Buffer
    own: bytes
    subject: bytes = b""
    work: Train | Evaluate | None = None


Work: TypeAlias = Train | Evaluate | Secure


@dataclass(frozen=True, slots=True)
class Task:
    """What a participant is asked to do.

    Attributes:
        run: the run's name.
        round: the round's number, from 1; 0 is the evaluation before the first.
        node: the participant that this task is for.
        plan_digest: SHA-256 of the Plan's canonical bytes, hexadecimal.
        cohort: how many participants are asked together with this one, itself included.
    """

    run: str
    round: int
    node: str
    plan_digest: str
    work: Work
    cohort: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What one client's training changed.

    Attributes:
        update: trained minus received value of every tensor of the adapter.
        examples: number of training examples that the client holds; the weight of its update.
        targets: number of tokens or classes that were predicted, over all steps.
        steps: optimiser steps made.
        loss: mean training loss over the targets of all steps, in nats; with differential privacy it is not told, and
            `targets` is 0.
        clipped: whether the update was longer than the task's clipping norm.
    """

    update: Mapping[str, Tensor]
    examples: int
    targets: int
    steps: int
    loss: float
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The adapter measured on one client's held-out examples: mean loss in nats over `targets`, and how many it hit."""

    examples: int
    targets: int
    loss: float
    correct: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The participant could not; `reason` is for a person."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The owner of the data does not allow it; `reason` says which limit. No data was opened."""

    reason: str


@dataclass(frozen=True, slots=True)
class Secured:
    """The answer to one step of a secure aggregation."""

    answer: Buffer


Outcome: TypeAlias = Trained | Evaluated | Secured | Failed | Refused


@dataclass(frozen=True, slots=True)
class Reply:
    """What a participant answers; the first four attributes repeat its Task's."""

    run: str
    round: int
    node: str
    plan_digest: str
    outcome: Outcome

    @classmethod
    def to(cls, task: Task, outcome: Outcome) -> Reply:
        return cls(task.run, task.round, task.node, task.plan_digest, outcome)


class Participant(Protocol):
    """Anything that performs tasks."""

    def perform(self, task: Task) -> Reply: ...

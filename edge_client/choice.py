"""Ways to work by a Plan, and the choice among them for the memory that there is.

Tried in this order, and the first that fits is taken:

1. the Plan as it is;
2. the same with large tensors given back to the system as soon as they are done with, which costs time;
3. smaller micro-batches, and more of them in a step;
4. the same two with checkpointed blocks;
5. the Plan's `tuning.alternatives` in their order, each from 2 on.

The first four change nothing about the result but its rounding, and which values dropout drops: a step's loss is the
mean over all targets of its group, however the group is cut, and an epoch has as many steps. The fifth is a method that
trains the same tensors, or a part of them, as the Plan allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from farfield.emulator import methods
from farfield.protocols.errors import BackboneError, TuningError
from farfield.protocols.plan import Plan

from .probe import Device
from .traced import Traced, trace

MARGIN: Final = 0.07
"""The share of the limit that is left free: what the prediction may be too low by."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a client works by a Plan.

    Attributes:
        alternative: which of `tuning.alternatives` it takes; None is none.
        batch_size, gradient_accumulation: how a step's group is cut.
        checkpointing: whether blocks are computed once more on the way back.
        evaluation: the batch size of evaluations.
        frugal: whether large tensors go back to the system at once (`device.save_memory`).
    """

    alternative: int | None
    batch_size: int
    gradient_accumulation: int
    checkpointing: bool
    evaluation: int
    frugal: bool

    def plan(self, plan: Plan) -> Plan:
        """What is worked by: the Plan with this put in."""
        base = plan if self.alternative is None else plan.alternative(self.alternative, methods.registered())
        cut = {name: getattr(self, name) for name in ("batch_size", "gradient_accumulation", "checkpointing")}
        return base.model_copy(
            update={
                "training": base.training.model_copy(update=cut),
                "evaluation": base.evaluation.model_copy(update={"batch_size": self.evaluation}),
            }
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """What a way is predicted to come to.

    Attributes:
        memory: bytes of resident memory of the client at its highest.
        seconds: of one optimiser step.
        fits: whether that is within the limit, its margin left free.
    """

    way: Way
    memory: int
    seconds: float
    fits: bool


def promised(plan: Plan) -> Way:
    """The Plan as it is."""
    training = plan.training
    cut = (training.batch_size, training.gradient_accumulation, training.checkpointing)
    return Way(None, *cut, plan.evaluation.batch_size, frugal=False)


def fits(plan: Plan, folder: Path, device: Device, most: int | None, allowed: Collection[str] = ()) -> Iterator[Fit]:
    """The ways to work by `plan`, in the order in which they are tried, each with what it comes to.

    Args:
        folder: of the backbone or the emulator.
        most: bytes that the client may take; None is no limit.
        allowed: tuning methods that the owner of the data consents to; empty is any.

    Raises:
        BackboneError, TuningError, EmulatorError: the Plan does not fit the backbone.
    """
    for alternative in (None, *range(len(plan.tuning.alternatives))):
        whole = promised(plan)
        base = plan if alternative is None else plan.alternative(alternative, methods.registered())
        if allowed and base.tuning.kind not in allowed:
            continue
        for checkpointing in _checkpointing(base):
            way = Way(
                alternative, whole.batch_size, whole.gradient_accumulation, checkpointing, whole.evaluation, frugal=True
            )
            try:
                cost = _Cost(plan, way, folder)
            except (BackboneError, TuningError):
                if way.checkpointing == plan.training.checkpointing and alternative is None:
                    raise
                continue  # this model cannot be checkpointed, or the alternative does not fit it
            if alternative is None and checkpointing == plan.training.checkpointing:
                yield cost.fit(whole, device, most)
            for size in _divisors(whole.batch_size):
                yield cost.fit(cost.cut(size), device, most)


class _Cost:
    """What a way costs by the size of its micro-batches, from traces of the largest and the smallest."""

    def __init__(self, plan: Plan, way: Way, folder: Path) -> None:
        self._plan, self._way, self._folder = plan, way, folder
        self._traced: dict[int, Traced] = {}
        self._at(way.batch_size)

    def cut(self, size: int) -> Way:
        """The same with micro-batches of `size`, and evaluations that take no more than training does."""
        way, evaluation = self._way, self._way.evaluation
        while evaluation > 1 and self._evaluating(evaluation) > self._training(size):
            evaluation //= 2
        accumulation = way.gradient_accumulation * way.batch_size // size
        return replace(way, batch_size=size, gradient_accumulation=accumulation, evaluation=evaluation)

    def fit(self, way: Way, device: Device, most: int | None) -> Fit:
        whole = self._at(self._way.batch_size)
        tensors = max(self._training(way.batch_size), self._evaluating(way.evaluation))
        if not way.frugal:
            tensors = whole.weights + in_heap(tensors - whole.weights)
        work = whole.step
        seconds = work.flops / device.flops + work.moved / device.moved + way.frugal * work.made / device.fresh
        memory = device.program + tensors
        return Fit(way, memory, seconds, most is None or within(memory, most))

    def _at(self, size: int) -> Traced:
        if size not in self._traced:
            way = self._way
            accumulation = way.gradient_accumulation * way.batch_size // size
            cut = replace(way, batch_size=size, gradient_accumulation=accumulation)
            self._traced[size] = trace(cut.plan(self._plan), self._folder, self._plan.tuning.adapter_rank)
        return self._traced[size]

    def _training(self, size: int) -> int:
        """On the straight line between the smallest and the largest, which what is needed follows within a percent."""
        largest = self._way.batch_size
        if size == largest:
            return self._at(size).training
        return _between(self._at(1).training, self._at(largest).training, (size - 1) / (largest - 1))

    def _evaluating(self, size: int) -> int:
        traced, largest = self._at(self._way.batch_size), self._way.evaluation
        share = 1.0 if size == largest else (size - 1) / (largest - 1)
        return _between(traced.evaluating_one, traced.evaluating, share)


def within(memory: int, most: int) -> bool:
    """Whether so much fits under a limit of `most` bytes, its margin left free."""
    return memory <= (1 - MARGIN) * most


def in_heap(count: int) -> int:
    """What the C library's heap takes for so many bytes of tensors that come and go; fitted to few cases.

    LoRA on 134 million parameters: 0.93 GB of tensors took 1.67, and 0.19 with checkpointing 0.60 (docs/memory.md).
    """
    return round(1.5 * count + min(350e6, 1.75 * count))


def _between(low: int, high: int, share: float) -> int:
    return max(low, round(low + share * (high - low)))


def _checkpointing(plan: Plan) -> tuple[bool, ...]:
    """As the Plan has it, then with it; what makes no way back, or cannot do without a block's results, has none."""
    as_it_is, tuning = plan.training.checkpointing, plan.tuning
    return (False, True) if tuning.by_gradient and tuning.checkpoints and not as_it_is else (as_it_is,)


def _divisors(size: int) -> list[int]:
    """The sizes that a batch of `size` can be cut into, from itself to one; each at most about half of the last."""
    found, last = [size], size
    for one in range(size // 2, 0, -1):
        if size % one == 0 and (2 * one <= last or one == 1):
            found.append(one)
            last = one
    return found

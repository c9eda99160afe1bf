"""The conductor: takes a run from a checkpoint to its end, whatever carries the messages.

A *carrier* knows where the participants are: in this process, or behind Flower's grid. It gathers who is there, carries
the tasks of one round to them and their replies back, and says what that took. Everything that decides about a result
is done here and in `rounds.py`, so a simulation and a deployment cannot differ in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from farfield.protocols.errors import PlanError
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State

from .aggregation import SumRule, registered
from .rounds import EvaluationRound, TrainingRound, cohort_size, sample_cohort, sample_evaluators
from .runs import Checkpoint, RoundRecord
from .server_optimizer import Moments, step

Round: TypeAlias = TrainingRound | EvaluationRound


@dataclass(slots=True)
class Traffic:
    """Bytes of parcels in one round, and by node what went wrong."""

    down: int = 0
    up: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    def note(self, problems: Mapping[str, str]) -> None:
        """Add these; where a node had a problem before, in training, that one is the cause of what came after."""
        self.problems = {**problems, **self.problems}


class Carrier(Protocol):
    """Brings tasks to participants and their replies back."""

    def now(self) -> float:
        """Seconds on a clock that does not go backwards; what rounds are timed by."""
        ...

    def gather(self, at_least: int) -> Sequence[str]:
        """The participants that are there, once they are `at_least` so many."""
        ...

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        """Do the round until it is closed, and add to `traffic` what it took."""
        ...


class Journal(Protocol):
    """Where finished rounds are kept."""

    def resume(self) -> Checkpoint | None: ...
    def save(self, checkpoint: Checkpoint) -> None: ...


class Conductor:
    """One run of a Plan, from its last checkpoint to the end."""

    def __init__(self, plan: Plan, run: str, carrier: Carrier, journal: Journal) -> None:
        """Raises PlanError when the Plan's aggregation rule needs more than the sum of the updates."""
        self._plan, self._run, self._carrier, self._journal = plan, run, carrier, journal
        rule = registered()[plan.aggregation.rule](plan.aggregation)
        if not isinstance(rule, SumRule):
            raise PlanError(f"aggregation.rule = {plan.aggregation.rule!r} must see each update; there are sums only")
        self._rule: SumRule = rule

    def go(self, initial: State) -> Checkpoint:
        """Do the rounds that are left, each ended by a checkpoint, and return the last.

        Args:
            initial: the adapter before the first round, used when there is no checkpoint yet.
        """
        last = self._journal.resume()
        if last is None:
            last = self._begin(initial)
            self._journal.save(last)
        for number in range(last.record.round + 1, self._plan.training.rounds + 1):
            last = self._round(number, last)
            self._journal.save(last)
        return last

    def _begin(self, initial: State) -> Checkpoint:
        began, traffic = time.monotonic(), Traffic()
        present = self._carrier.gather(self._plan.cohort.minimum)
        loss, accuracy = self._evaluate(0, initial, present, traffic)
        seconds = time.monotonic() - began
        record = RoundRecord(0, 0, None, loss, accuracy, traffic.down, traffic.up, seconds, problems=traffic.problems)
        return Checkpoint(record, initial, Moments())

    def _round(self, number: int, last: Checkpoint) -> Checkpoint:
        plan, began, traffic = self._plan, time.monotonic(), Traffic()
        present = self._carrier.gather(plan.cohort.minimum)
        cohort = sample_cohort(plan, number, present)
        wanted = cohort_size(plan.cohort, len(present)) if plan.cohort.over_selection else None
        now = self._carrier.now()
        training = TrainingRound(plan, self._run, number, last.adapter, cohort, self._rule, now, wanted)
        self._carrier.carry(training, "training", traffic)
        aggregate = training.result()
        adapter, moments = last.adapter, last.moments
        if aggregate is not None:
            adapter, moments = step(plan.aggregation, adapter, aggregate.update, moments)
        loss, accuracy = None, None
        if number % plan.evaluation.every == 0 or number == plan.training.rounds:
            loss, accuracy = self._evaluate(number, adapter, present, traffic)
        record = RoundRecord(
            round=number,
            clients=len(aggregate.clients) if aggregate else 0,
            train_loss=aggregate.loss if aggregate else None,
            eval_loss=loss,
            eval_accuracy=accuracy,
            bytes_down=traffic.down,
            bytes_up=traffic.up,
            seconds=time.monotonic() - began,
            steps=aggregate.steps if aggregate else 0,
            problems=traffic.problems,
        )
        return Checkpoint(record, adapter, moments)

    def _evaluate(
        self, number: int, adapter: State, present: Sequence[str], traffic: Traffic
    ) -> tuple[float | None, float | None]:
        evaluators = sample_evaluators(self._plan, present)
        evaluation = EvaluationRound(self._plan, self._run, number, adapter, evaluators, self._carrier.now())
        self._carrier.carry(evaluation, "evaluating", traffic)
        score = evaluation.result()
        return (score.loss, score.accuracy) if score else (None, None)


def improvement(before: float | None, after: float | None) -> float | None:
    """Share by which the loss fell, or None where one of the two is missing."""
    return None if not before or after is None else 1 - after / before

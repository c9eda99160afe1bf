"""The conductor: takes a run from a checkpoint to its end, whatever carries the messages.

A *carrier* knows where the participants are: in this process, or behind Flower's grid. It gathers who is there, carries
the tasks of one round to them and their replies back, and says what that took. Everything that decides about a result
is done here and in `rounds.py`, so a simulation and a deployment cannot differ in it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeAlias

from farfield.protocols.envelope import Charter
from farfield.protocols.messages import Evaluate, Train
from farfield.protocols.plan import Plan
from farfield.protocols.summing import Shapes, Subject
from farfield.protocols.tensors import State, digest, pack_state, unpack_state
from farfield.protocols.turns import takes_part

from . import bounds, grouping
from .aggregation import GroupRule, ViewRule, registered
from .releasing import Aggregate, release
from .rounds import (
    EvaluationRound,
    Score,
    TrainingRound,
    cohort_size,
    sample_cohort,
    sample_evaluators,
    trained_shapes,
)
from .runs import Checkpoint, RoundRecord
from .secure_rounds import SecureRound, SecureStep, scored
from .server_optimizer import Moments, step

_ALL: Final = "the round"
"""Stands for a node where a problem is nobody's own."""

Round: TypeAlias = TrainingRound | EvaluationRound | SecureStep


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

    @property
    def charter(self) -> Charter:
        """What the participants are told about the run."""
        ...

    def gather(self, at_least: int) -> Sequence[str]:
        """The participants that are there, once they are `at_least` so many."""
        ...

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        """By node, the key (Ed25519, raw) that signs for it; without those that have left."""
        ...

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        """Do the round until it is closed, and add to `traffic` what it took."""
        ...


class Journal(Protocol):
    """Where finished rounds are kept."""

    def resume(self) -> Checkpoint | None: ...
    def save(self, checkpoint: Checkpoint) -> None: ...


class Accounts(Protocol):
    """Where it is written down what a run spends of its population's privacy."""

    def spend(self, number: int) -> None:
        """Write down what round `number` spends, before anything of it is released.

        Raises:
            PrivacyError: the budget does not allow it, and nothing was spent.
        """
        ...


class Owner(Protocol):
    """The backbone's owner, where clients get an emulator of it."""

    def ready(self, number: int, adapter: State) -> None:
        """Make sure that clients get the emulator that is meant for round `number`; `adapter` is from before it."""
        ...

    def measure(self, adapter: State) -> tuple[float, float] | None:
        """Loss of the adapter on the emulator, and plugged into the backbone; None without text of the owner's own."""
        ...


class Conductor:
    """One run of a Plan, from its last checkpoint to the end."""

    def __init__(
        self,
        plan: Plan,
        run: str,
        carrier: Carrier,
        journal: Journal,
        accounts: Accounts | None = None,
        owner: Owner | None = None,
        watch: Callable[[int, Aggregate], None] | None = None,
    ) -> None:
        """
        Args:
            accounts: where privacy is accounted for; needed where the Plan promises any.
            owner: who makes and judges emulators; needed where the Plan ships one.
            watch: is told the aggregate of each round, which is all that a coordinator learns of its clients' updates.
        """
        self._plan, self._run, self._carrier, self._journal = plan, run, carrier, journal
        self._accounts, self._owner, self._watch = accounts, owner, watch
        self._rule = registered()[plan.aggregation.rule](plan.aggregation)
        self._secure = plan.protection.kind == "secagg"
        self._first = True

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
        present = self._carrier.gather(self._plan.smallest_round)
        score = self._evaluate(0, initial, present, traffic)
        emulator_loss, plug_in_loss = self._plugged(0, initial)
        record = RoundRecord(
            round=0,
            clients=0,
            train_loss=None,
            eval_loss=score.loss if score else None,
            eval_accuracy=score.accuracy if score else None,
            bytes_down=traffic.down,
            bytes_up=traffic.up,
            seconds=time.monotonic() - began,
            problems=traffic.problems,
            emulator_loss=emulator_loss,
            plug_in_loss=plug_in_loss,
        )
        return Checkpoint(record, initial, Moments(), bounds.first(self._plan, initial))

    def _round(self, number: int, last: Checkpoint) -> Checkpoint:
        plan, began, traffic = self._plan, time.monotonic(), Traffic()
        if self._owner is not None:
            self._owner.ready(number, last.adapter)
        present = self._carrier.gather(plan.smallest_round)
        aggregate = self._train(number, last, present, traffic)
        adapter, moments, following = last.adapter, last.moments, last.bounds
        if aggregate is not None:
            if self._watch is not None:
                self._watch(number, aggregate)
            adapter, moments = step(plan.aggregation, adapter, aggregate.update, moments)
            following = bounds.following(plan, last.bounds, aggregate)
        score = None
        if number % plan.evaluation.every == 0 or number == plan.training.rounds:
            score = self._evaluate(number, adapter, present, traffic)
        emulator_loss, plug_in_loss = self._plugged(number, adapter)
        record = RoundRecord(
            round=number,
            clients=len(aggregate.clients) if aggregate else 0,
            train_loss=aggregate.loss if aggregate else None,
            eval_loss=score.loss if score else None,
            eval_accuracy=score.accuracy if score else None,
            bytes_down=traffic.down,
            bytes_up=traffic.up,
            seconds=time.monotonic() - began,
            steps=aggregate.steps if aggregate else 0,
            problems=traffic.problems,
            clipping_norm=last.bounds.clipping_norm,
            emulator_loss=emulator_loss,
            plug_in_loss=plug_in_loss,
            lost=aggregate.lost if aggregate else None,
        )
        return Checkpoint(record, adapter, moments, following)

    def _plugged(self, number: int, adapter: State) -> tuple[float | None, float | None]:
        """What the owner measures after round `number`, where it is time to."""
        due = number % self._plan.delivery.plug_in_every == 0 or number == self._plan.training.rounds
        measured = self._owner.measure(adapter) if self._owner is not None and due else None
        return measured or (None, None)

    def _train(self, number: int, last: Checkpoint, present: Sequence[str], traffic: Traffic) -> Aggregate | None:
        plan = self._plan
        eligible = [node for node in present if takes_part(plan, node, number)]
        if len(eligible) < plan.smallest_round:
            traffic.note({_ALL: f"it is the turn of {len(eligible)} clients, and it takes {plan.smallest_round}"})
            return None
        if plan.privacy.kind != "none":
            assert self._accounts is not None
            self._accounts.spend(number)
        cohort = sample_cohort(plan, number, eligible)
        wanted = cohort_size(plan, len(eligible)) if plan.cohort.over_selection else None
        norm = last.bounds.clipping_norm
        if not self._secure:
            assert not isinstance(self._rule, GroupRule), "the Plan refuses groups without secure aggregation"
            now = self._carrier.now()
            training = TrainingRound(plan, self._run, number, last.adapter, cohort, self._rule, now, wanted, norm)
            self._carrier.carry(training, "training", traffic)
            return training.result()
        assert not isinstance(self._rule, ViewRule), "the Plan refuses secure aggregation with a rule that must see"
        work = Train(pack_state(last.adapter, plan.delivery.dtype), norm)
        shapes = trained_shapes(plan, last.adapter, number)
        ranges = tuple(last.bounds.ranges[name] for name in sorted(shapes))
        add_up = partial(self._add_up, number, work, shapes, ranges)
        if isinstance(self._rule, GroupRule):
            groups = grouping.split(plan, number, cohort)
            return self._middle(self._rule, groups, wanted, add_up, traffic)
        secure = add_up(cohort, wanted, traffic)
        if secure is None or secure.sum is None:
            return None
        return release(plan, self._rule, secure.sum, secure.clients, norm)

    def _middle(
        self,
        rule: GroupRule,
        groups: Sequence[Sequence[str]],
        wanted: int | None,
        add_up: partial[SecureRound | None],
        traffic: Traffic,
    ) -> Aggregate | None:
        """Have each group add up by itself, one after another, and combine their means; None when too few are left."""
        sums: list[grouping.GroupSum] = []
        first = self._first
        for place, group in enumerate(groups):
            self._first = first  # none of the group's clients was in the groups before it
            name = f"group {place + 1}"
            share = None if wanted is None else len(range(place, wanted, len(groups)))
            secure = add_up(group, share, traffic, name)
            if secure is None or secure.sum is None:
                continue
            if secure.sum.weight:
                sums.append(grouping.GroupSum(secure.sum, secure.clients))
            else:
                traffic.note({name: "its clients say that they have no example"})
        if len(sums) < (least := grouping.fewest(len(groups))):
            traffic.note({_ALL: f"{len(sums)} of {len(groups)} groups were added up, and it takes {least}"})
            return None
        return grouping.combined(rule, sums)

    def _evaluate(self, number: int, adapter: State, present: Sequence[str], traffic: Traffic) -> Score | None:
        plan = self._plan
        if not plan.measures:
            return None
        evaluators = sample_evaluators(plan, present)
        if self._secure:
            work = Evaluate(pack_state(adapter, plan.delivery.dtype))
            secure = self._add_up(number, work, {}, (), evaluators, None, traffic)
            return None if secure is None or secure.sum is None else scored(secure.sum, secure.clients)
        evaluation = EvaluationRound(plan, self._run, number, adapter, evaluators, self._carrier.now())
        self._carrier.carry(evaluation, "evaluating", traffic)
        return evaluation.result()

    def _add_up(
        self,
        number: int,
        work: Train | Evaluate,
        shapes: Shapes,
        ranges: tuple[float, ...],
        nodes: Sequence[str],
        wanted: int | None,
        traffic: Traffic,
        name: str = _ALL,
    ) -> SecureRound | None:
        """Have `nodes` do the work and add up what it comes to, so that nobody sees anything but the sum.

        None when they are too few to begin. A problem that is nobody's own is told under `name`.
        """
        plan, charter = self._plan, self._carrier.charter
        identities = self._carrier.identities(nodes)
        if len(identities) < plan.smallest_cohort:
            traffic.note({name: f"{len(identities)} clients could be asked, and it takes {plan.smallest_cohort}"})
            return None
        subject = Subject(
            plan=bytes.fromhex(plan.digest),
            backbone=bytes.fromhex(charter.backbone),
            frozen=bytes.fromhex(charter.frozen),
            purpose="train" if isinstance(work, Train) else "evaluate",
            adapter=bytes.fromhex(digest(unpack_state(work.adapter))),
            clipping_norm=work.clipping_norm if isinstance(work, Train) else None,
            ranges=ranges,
        )
        session = secrets.token_bytes(32)
        secure = SecureRound(
            plan, self._run, number, work, subject, shapes, identities, session, self._carrier.now, wanted, self._first
        )
        self._first = False
        for activity, one in secure.steps():
            self._carrier.carry(one, activity, traffic)
        traffic.note(secure.problems)
        if secure.failure:
            traffic.note({name: secure.failure})
        return secure


def improvement(before: float | None, after: float | None) -> float | None:
    """Share by which the loss fell, or None where one of the two is missing."""
    return None if not before or after is None else 1 - after / before

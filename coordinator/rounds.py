"""One round as a state machine without I/O.

    round = TrainingRound(plan, run, number, adapter, cohort, rule, now)
    round.tasks()                     what to send, and to whom
    round.receive(reply, now)         once per reply, in the order they come; its update is added and forgotten
    round.lose(node, reason)          a participant that will not answer
    round.tick(now)                   closes the round when its time is up
    round.closed, round.result()      enough answers or no time left; the aggregate, or None with too few updates

Whatever carries the messages drives the same object. A round never sleeps, reads no clock and touches
neither disk nor network; `now` is in seconds on any clock that does not go backwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import WireError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Refused, Reply, Task, Train, Trained
from farfield.protocols.plan import Cohort, Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import ITEM_BYTES, State, Tensor, pack_state, unpack

from .aggregation import SumRule


class Verdict(Enum):
    """What became of a reply."""

    ACCEPTED = "accepted"
    LATE = "late"
    STRAY = "stray"
    FAILED = "failed"
    REFUSED = "refused"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What a training round came to.

    Attributes:
        update: Δ, the aggregated update, float32, by tensor name.
        loss: mean training loss of the counted clients in nats, weighted by their targets.
        clients: nodes whose updates were counted.
    """

    update: State
    loss: float
    clients: tuple[str, ...]
    examples: int
    targets: int
    steps: int


@dataclass(frozen=True, slots=True)
class Score:
    """An adapter measured over several clients' held-out examples: loss in nats per target, hits per target."""

    loss: float
    accuracy: float
    targets: int
    clients: tuple[str, ...]


def cohort_size(settings: Cohort, present: int) -> int:
    """How many of `present` clients one round wants."""
    if settings.size is not None:
        return min(settings.size, present)
    if settings.fraction is not None:
        return min(present, max(settings.minimum, round(settings.fraction * present)))
    return present


def sample_cohort(plan: Plan, number: int, present: Iterable[str]) -> list[str]:
    """The nodes of round `number`: uniformly, without replacement, the same for the same Plan and the same nodes.

    With over-selection they are more than `cohort_size`, and stand in the order in which they were drawn.
    """
    nodes = sorted(present)
    generator = random.Random(derive(plan.training.seed, "cohort", number))
    wanted = cohort_size(plan.cohort, len(nodes))
    if not plan.cohort.over_selection:
        return sorted(generator.sample(nodes, wanted))
    return generator.sample(nodes, min(len(nodes), math.ceil(wanted * (1 + plan.cohort.over_selection))))


def sample_evaluators(plan: Plan, present: Iterable[str]) -> list[str]:
    """The nodes that measure the adapter: the same ones every time, so that losses can be compared over rounds."""
    nodes = sorted(present)
    generator = random.Random(derive(plan.training.seed, "evaluators"))
    return sorted(generator.sample(nodes, min(plan.evaluation.clients, len(nodes))))


@dataclass(slots=True)
class _Ledger:
    """Who was asked, who still owes an answer, and what went wrong: the part that all rounds share."""

    plan: Plan
    run: str
    number: int
    nodes: tuple[str, ...]
    deadline: float
    wanted: int | None = None
    waiting: set[str] = field(init=False)
    counted: int = 0
    expired: bool = False
    problems: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = set(self.nodes)

    @property
    def closed(self) -> bool:
        return self.expired or not self.waiting or self.counted == self.wanted

    def admit(self, reply: Reply, now: float) -> Verdict | None:
        """None for a reply that may count; the sender is then no longer waited for."""
        addressed = (reply.run, reply.round, reply.plan_digest) == (self.run, self.number, self.plan.digest)
        if not addressed or reply.node not in self.nodes:
            return Verdict.STRAY
        self.tick(now)
        if reply.node not in self.waiting:
            return Verdict.LATE if reply.node in self.problems else Verdict.STRAY
        if self.closed:
            return Verdict.LATE
        self.waiting.discard(reply.node)
        match reply.outcome:
            case Failed(reason):
                self.problems[reply.node] = reason
                return Verdict.FAILED
            case Refused(reason):
                self.problems[reply.node] = f"refused: {reason}"
                return Verdict.REFUSED
        return None

    def lose(self, node: str, reason: str) -> None:
        if node in self.waiting:
            self.waiting.discard(node)
            self.problems[node] = reason

    def tick(self, now: float) -> None:
        if not self.closed and now >= self.deadline:
            self.expired = True
            for node in sorted(self.waiting):
                self.lose(node, f"no answer within {self.plan.cohort.round_seconds:g} s")

    def reject(self, node: str, reason: str) -> Verdict:
        self.problems[node] = reason
        return Verdict.INVALID


class _Round:
    """What all rounds share: tasks of one kind go out, and the ledger knows who still owes an answer."""

    def __init__(self, ledger: _Ledger, work: Train | Evaluate) -> None:
        self._ledger = ledger
        self._work = work

    @property
    def closed(self) -> bool:
        return self._ledger.closed

    @property
    def number(self) -> int:
        return self._ledger.number

    @property
    def work(self) -> Train | Evaluate:
        return self._work

    @property
    def waiting(self) -> frozenset[str]:
        """Who has not answered yet. They may still be there when the round has closed without them."""
        return frozenset(self._ledger.waiting)

    @property
    def problems(self) -> Mapping[str, str]:
        return self._ledger.problems

    def tasks(self) -> Iterable[Task]:
        ledger = self._ledger
        for node in ledger.nodes:
            yield Task(ledger.run, ledger.number, node, ledger.plan.digest, self._work, len(ledger.nodes))

    def lose(self, node: str, reason: str) -> None:
        self._ledger.lose(node, reason)

    def tick(self, now: float) -> None:
        self._ledger.tick(now)


class TrainingRound(_Round):
    """A cohort trains from one adapter; the weighted sum of its updates is all that is kept of them.

    Memory is one update's size whatever the number of clients: the sum. `problems` says by node what went wrong.
    """

    def __init__(
        self,
        plan: Plan,
        run: str,
        number: int,
        adapter: State,
        cohort: Sequence[str],
        rule: SumRule,
        now: float,
        wanted: int | None = None,
    ) -> None:
        """`wanted`: with how many updates the round closes, if others of the cohort still work; None waits for all."""
        ledger = _Ledger(plan, run, number, tuple(cohort), now + plan.cohort.round_seconds, wanted)
        super().__init__(ledger, Train(pack_state(adapter, plan.delivery.dtype)))
        self._rule = rule
        self._shapes = {name: array.shape for name, array in adapter.items()}
        self._sum: State = {}
        self._weight = 0.0
        self._counted: list[str] = []
        self._examples = self._targets = self._steps = 0
        self._loss = 0.0

    def receive(self, reply: Reply, now: float) -> Verdict:
        """Count the reply, if it may count. A reply that is not counted changes no number."""
        refused = self._ledger.admit(reply, now)
        if refused is not None:
            return refused
        if not isinstance(reply.outcome, Trained):
            return self._ledger.reject(reply.node, "answered a training task with something else")
        try:
            self._check(reply.outcome)
        except WireError as error:
            return self._ledger.reject(reply.node, str(error))
        self._add(reply.node, reply.outcome)
        return Verdict.ACCEPTED

    def result(self) -> Aggregate | None:
        """The aggregate of a closed round, once; None when fewer than `cohort.minimum` updates came."""
        if not self.closed:
            raise RuntimeError("the round is still open")
        if len(self._counted) < self._ledger.plan.cohort.minimum:
            return None
        update = self._rule.finish(self._sum, self._weight)
        self._sum = {}
        loss = self._loss / self._targets
        return Aggregate(update, loss, tuple(self._counted), self._examples, self._targets, self._steps)

    def _check(self, trained: Trained) -> None:
        """Raises WireError unless the update's tensors are what was asked for, finite, and remain so in the sum."""
        if not (trained.examples and trained.targets):
            raise WireError("an update from no example")
        _check_loss(trained, len(self._ledger.nodes))
        shapes = {name: tensor.shape for name, tensor in trained.update.items()}
        if shapes != self._shapes:
            odd = sorted(set(shapes.items()) ^ set(self._shapes.items()))
            raise WireError(f"the update's tensors differ from the adapter's, first at {odd[0][0]!r} {odd[0][1]}")
        # Half of what a sum of so many can hold: what is added is rounded.
        largest = np.finfo(np.float32).max / 2 / len(self._ledger.nodes) / self._rule.weight(trained)
        for name, tensor in trained.update.items():
            if not all((np.abs(block) <= largest).all() for block in _unpacked(tensor)):  # of NaN, too
                raise WireError(f"the update has values that are not finite, or too large to add, first in {name!r}")

    def _add(self, node: str, trained: Trained) -> None:
        weight = self._rule.weight(trained)
        for name, tensor in trained.update.items():
            total = self._sum.setdefault(name, np.zeros(tensor.shape, np.float32))
            for part, block in zip(_blocks(total), _unpacked(tensor), strict=True):
                part += np.float32(weight) * block
        self._weight += weight
        self._ledger.counted += 1
        self._counted.append(node)
        self._examples += trained.examples
        self._targets += trained.targets
        self._steps += trained.steps
        self._loss += trained.loss * trained.targets


class EvaluationRound(_Round):
    """Several clients measure one adapter on what they held out. Driven like a TrainingRound."""

    def __init__(
        self, plan: Plan, run: str, number: int, adapter: State, evaluators: Sequence[str], now: float
    ) -> None:
        ledger = _Ledger(plan, run, number, tuple(evaluators), now + plan.cohort.round_seconds)
        super().__init__(ledger, Evaluate(pack_state(adapter, plan.delivery.dtype)))
        self._scores: dict[str, Evaluated] = {}

    def receive(self, reply: Reply, now: float) -> Verdict:
        refused = self._ledger.admit(reply, now)
        if refused is not None:
            return refused
        if not isinstance(reply.outcome, Evaluated):
            return self._ledger.reject(reply.node, "answered an evaluation task with something else")
        try:
            _check_loss(reply.outcome, len(self._ledger.nodes))
        except WireError as error:
            return self._ledger.reject(reply.node, str(error))
        if reply.outcome.targets:  # a client with a single example holds none out
            self._scores[reply.node] = reply.outcome
        return Verdict.ACCEPTED

    def result(self) -> Score | None:
        """Loss and accuracy over all targets together; None when nobody held anything out."""
        if not self.closed:
            raise RuntimeError("the round is still open")
        scores = self._scores.values()
        targets = sum(score.targets for score in scores)
        if not targets:
            return None
        loss = sum(score.loss * score.targets for score in scores) / targets
        return Score(loss, sum(score.correct for score in scores) / targets, targets, tuple(sorted(self._scores)))


def _check_loss(outcome: Trained | Evaluated, nodes: int) -> None:
    """Raises WireError when the mean over `nodes` clients with such a loss would not be finite."""
    if not math.isfinite(outcome.loss * outcome.targets * nodes):
        raise WireError(f"a loss of {outcome.loss:g} over {outcome.targets} targets")


_BLOCK = 1 << 18


def _blocks(array: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Views that together are `array`: what is computed from one is small, however large the array."""
    flat = array.reshape(-1)
    return (flat[at : at + _BLOCK] for at in range(0, flat.size, _BLOCK))


def _unpacked(tensor: Tensor) -> Iterator[NDArray[np.float32]]:
    """The values of `tensor` in blocks of the same sizes."""
    raw, size = memoryview(tensor.data), ITEM_BYTES[tensor.dtype]
    for at in range(0, len(raw), _BLOCK * size):
        block = raw[at : at + _BLOCK * size]
        yield unpack(Tensor(tensor.dtype, (len(block) // size,), block))

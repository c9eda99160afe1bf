"""One round as a state machine without I/O.

    round = TrainingRound(plan, run, number, adapter, cohort, rule, now)
    round.tasks()                     what to send, and to whom
    round.receive(reply, now)         once per reply, in the order they come; its update is added, or kept
    round.lose(node, reason)          a participant that will not answer
    round.tick(now)                   closes the round when its time is up
    round.closed, round.result()      enough answers or no time left; the aggregate, or None with too few updates

Whatever carries the messages drives the same object. A round never sleeps, reads no clock and touches
neither disk nor network; `now` is in seconds on any clock that does not go backwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farfield.emulator.factors import shapes_at
from farfield.emulator.methods import TuningMethod
from farfield.protocols.errors import WireError
from farfield.protocols.messages import Evaluate, Evaluated, Reply, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State, pack_state

from .aggregation import SumRule, ViewRule
from .asking import Answers, Asking, Verdict
from .keeping import Keeping, KeptSum, KeptViews
from .releasing import Aggregate


@dataclass(frozen=True, slots=True)
class Score:
    """An adapter measured over several clients' held-out examples: loss in nats per target, hits per target."""

    loss: float
    accuracy: float
    targets: int
    clients: tuple[str, ...]


def cohort_size(plan: Plan, present: int) -> int:
    """How many of `present` clients one round wants."""
    if plan.cohort.size is not None:
        return min(plan.cohort.size, present)
    if plan.cohort.fraction is not None:
        return min(present, max(plan.smallest_round, round(plan.cohort.fraction * present)))
    return present


def sample_cohort(plan: Plan, number: int, present: Iterable[str]) -> list[str]:
    """The nodes of round `number`: uniformly, without replacement, the same for the same Plan and the same nodes.

    With over-selection they are more than `cohort_size`, and stand in the order in which they were drawn.
    """
    nodes = sorted(present)
    generator = random.Random(derive(plan.training.seed, "cohort", number))
    wanted = cohort_size(plan, len(nodes))
    if not plan.cohort.over_selection:
        return sorted(generator.sample(nodes, wanted))
    return generator.sample(nodes, min(len(nodes), math.ceil(wanted * (1 + plan.cohort.over_selection))))


def sample_evaluators(plan: Plan, present: Iterable[str]) -> list[str]:
    """The nodes that measure the adapter: the same ones every time, so that losses can be compared over rounds."""
    nodes = sorted(present)
    generator = random.Random(derive(plan.training.seed, "evaluators"))
    return sorted(generator.sample(nodes, min(plan.evaluation.clients, len(nodes))))


def trained_shapes(plan: Plan, adapter: State, number: int) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of what is trained in round `number`: all of the adapter, or a part of it by turns."""
    assert isinstance(plan.tuning, TuningMethod)
    trained = plan.tuning.sharing.trained_in
    return {name: array.shape for name, array in adapter.items() if trained(name, number)}


class TrainingRound(Asking):
    """A cohort trains from one adapter; of its updates their weighted sum is kept, or each where a rule must see it.

    An update holds what the tuning method trains in this round: all of the adapter, or a half of it by turns; and of
    LoRA's factors all, or the first ranks, where the Plan's alternatives allow it.

    Memory is one update's size whatever the number of clients, and that of all updates with a ViewRule. `problems` says
    by node what went wrong.
    """

    def __init__(
        self,
        plan: Plan,
        run: str,
        number: int,
        adapter: State,
        cohort: Sequence[str],
        rule: SumRule | ViewRule,
        now: float,
        wanted: int | None = None,
        clipping_norm: float | None = None,
    ) -> None:
        """
        Args:
            wanted: with how many updates the round closes, if others of the cohort still work; None waits for all.
            clipping_norm: the L2 norm to which clients clip their updates; any longer one is clipped again here.
        """
        answers = Answers(plan, run, number, tuple(cohort), now, plan.cohort.round_seconds, wanted)
        super().__init__(answers, Train(pack_state(adapter, plan.delivery.dtype), clipping_norm))
        shapes = trained_shapes(plan, adapter, number)
        self._shapes = [shapes, *(shapes_at(shapes, rank) for rank in sorted(plan.ranks))]
        self._kept: Keeping
        if isinstance(rule, SumRule):
            self._kept = KeptSum(plan, rule, shapes, len(cohort), clipping_norm)
        else:
            self._kept = KeptViews(plan, rule, adapter)

    def receive(self, reply: Reply, now: float) -> Verdict:
        """Count the reply, if it may count. A reply that is not counted changes no number."""
        refused = self._answers.admit(reply, now)
        if refused is not None:
            return refused
        if not isinstance(reply.outcome, Trained):
            return self._answers.reject(reply.node, "answered a training task with something else")
        try:
            self._check(reply.outcome)
        except WireError as error:
            return self._answers.reject(reply.node, str(error))
        self._kept.add(reply.node, reply.outcome)
        self._answers.counted += 1
        return Verdict.ACCEPTED

    def result(self) -> Aggregate | None:
        """The aggregate of a closed round, once; None when fewer than `cohort.minimum` updates came."""
        if not self.closed:
            raise RuntimeError("the round is still open")
        return None if self._answers.counted < self._answers.plan.cohort.minimum else self._kept.aggregate()

    def _check(self, trained: Trained) -> None:
        """Raises WireError unless the update's tensors are what was asked for, finite, and remain so."""
        if self._answers.plan.privacy.kind == "none" and not (trained.examples and trained.targets):
            raise WireError("an update from no example")
        _check_loss(trained, len(self._answers.nodes))
        shapes = {name: tensor.shape for name, tensor in trained.update.items()}
        if shapes not in self._shapes:
            odd = sorted(set(shapes.items()) ^ set(self._shapes[0].items()))
            raise WireError(f"the update's tensors differ from the adapter's, first at {odd[0][0]!r} {odd[0][1]}")
        self._kept.check(trained)


class EvaluationRound(Asking):
    """Several clients measure one adapter on what they held out. Driven like a TrainingRound."""

    def __init__(
        self, plan: Plan, run: str, number: int, adapter: State, evaluators: Sequence[str], now: float
    ) -> None:
        answers = Answers(plan, run, number, tuple(evaluators), now, plan.cohort.round_seconds)
        super().__init__(answers, Evaluate(pack_state(adapter, plan.delivery.dtype)))
        self._scores: dict[str, Evaluated] = {}

    def receive(self, reply: Reply, now: float) -> Verdict:
        refused = self._answers.admit(reply, now)
        if refused is not None:
            return refused
        if not isinstance(reply.outcome, Evaluated):
            return self._answers.reject(reply.node, "answered an evaluation task with something else")
        try:
            _check_loss(reply.outcome, len(self._answers.nodes))
        except WireError as error:
            return self._answers.reject(reply.node, str(error))
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

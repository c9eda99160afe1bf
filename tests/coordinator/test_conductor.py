"""A run from checkpoint to checkpoint, over a carrier that needs no model: what is decided here, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from farfield.coordinator import conductor, plans
from farfield.coordinator.aggregation import ViewRule
from farfield.coordinator.conductor import Carrier, Conductor, Journal, Round, Traffic, improvement
from farfield.coordinator.rounds import TrainingRound, sample_cohort, sample_evaluators
from farfield.coordinator.runs import Checkpoint, RoundRecord
from farfield.coordinator.server_optimizer import Moments
from farfield.protocols.errors import PlanError
from farfield.protocols.messages import Evaluated, Failed, Outcome, Refused, Reply, Task, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

NODES = ("ann", "bob", "cy", "dan")
INITIAL: State = {"a": np.zeros(2, np.float32)}


def plan_of(extra: str = "", rounds: int = 3) -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n'
    return plans.parse(f"{text}[training]\nrounds = {rounds}\nsteps = 1\n{extra}")


def honest(task: Task) -> Outcome:
    """Each client moves the adapter by one, and its loss is how far the adapter is from ten."""
    value = float(unpack_state(task.work.adapter)["a"][0])
    if isinstance(task.work, Train):
        return Trained(pack_state({"a": np.ones(2, np.float32)}, "float32"), 2, 1, 1, 10.0 - value)
    return Evaluated(1, 4, 10.0 - value, 1)


@dataclass
class Hall:
    """A carrier whose participants answer at once, in the order in which they are asked."""

    perform: Callable[[Task], Outcome] = honest
    present: Sequence[str] = NODES
    asked: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    gathered: list[int] = field(default_factory=list)
    clock: float = 0.0

    def now(self) -> float:
        return self.clock

    def gather(self, at_least: int) -> Sequence[str]:
        self.gathered.append(at_least)
        return self.present

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        tasks = list(round_.tasks())
        assert activity == ("training" if isinstance(round_, TrainingRound) else "evaluating")
        self.asked.append((activity, round_.number, tuple(task.node for task in tasks)))
        for task in tasks:
            if round_.closed:
                break
            traffic.down += 100
            outcome = self.perform(task)
            traffic.up += 10
            round_.receive(Reply.to(task, outcome), self.now())
        round_.tick(self.now() + 1e9)
        traffic.problems |= round_.problems


@dataclass
class Shelf:
    """A journal in memory."""

    saved: list[Checkpoint] = field(default_factory=list)

    def resume(self) -> Checkpoint | None:
        return self.saved[-1] if self.saved else None

    def save(self, checkpoint: Checkpoint) -> None:
        self.saved.append(checkpoint)


def conduct(plan: Plan, hall: Hall | None = None, shelf: Shelf | None = None) -> tuple[Hall, Shelf]:
    hall, shelf = hall or Hall(), shelf or Shelf()
    carrier: Carrier = hall
    journal: Journal = shelf
    last = Conductor(plan, "run", carrier, journal).go(INITIAL)
    assert last is shelf.saved[-1]
    return hall, shelf


def records(shelf: Shelf) -> list[RoundRecord]:
    return [one.record for one in shelf.saved]


def test_a_run_from_its_beginning_to_its_end() -> None:
    plan = plan_of("[cohort]\nminimum = 2\n")
    hall, shelf = conduct(plan)
    assert hall.asked == [
        ("evaluating", 0, NODES),
        *((what, number, NODES) for number in (1, 2, 3) for what in ("training", "evaluating")),
    ]
    assert hall.gathered == [2, 2, 2, 2]
    assert [float(one.adapter["a"][0]) for one in shelf.saved] == [0.0, 1.0, 2.0, 3.0]
    assert [one.round for one in records(shelf)] == [0, 1, 2, 3]
    assert [one.clients for one in records(shelf)] == [0, 4, 4, 4]
    assert [one.steps for one in records(shelf)] == [0, 4, 4, 4]
    assert [one.train_loss for one in records(shelf)] == [None, 10.0, 9.0, 8.0]
    assert [one.eval_loss for one in records(shelf)] == [10.0, 9.0, 8.0, 7.0]
    assert {one.eval_accuracy for one in records(shelf)} == {0.25}
    assert [one.bytes_down for one in records(shelf)] == [400, 800, 800, 800]
    assert [one.bytes_up for one in records(shelf)] == [40, 80, 80, 80]
    assert all(one.seconds >= 0 and not one.problems for one in records(shelf))


@pytest.mark.parametrize("server", ["none", "momentum", "adam"])
def test_a_run_goes_on_where_it_was(server: str) -> None:
    """From every checkpoint, the moments of the server optimiser with it."""
    plan = plan_of(f'[aggregation]\nserver_optimizer = "{server}"\n[cohort]\nsize = 2\n')
    hall, whole = conduct(plan)
    for number in range(len(whole.saved)):
        rest, shelf = conduct(plan, shelf=Shelf(whole.saved[: number + 1]))
        assert rest.asked == [one for one in hall.asked if one[1] > number]
        assert [digest(one.adapter) for one in shelf.saved] == [digest(one.adapter) for one in whole.saved]


def test_a_finished_run_asks_nobody() -> None:
    _, shelf = conduct(plan_of())
    again, same = conduct(plan_of(), shelf=Shelf(list(shelf.saved)))
    assert (again.asked, again.gathered) == ([], [])
    assert same.saved == shelf.saved


def test_the_initial_adapter_is_for_the_beginning_only() -> None:
    plan = plan_of(rounds=1)
    begun = Checkpoint(RoundRecord(0, 0, None, None, None, 0, 0, 0.0), {"a": np.full(2, 5, np.float32)}, Moments())
    _, shelf = conduct(plan, shelf=Shelf([begun]))
    np.testing.assert_array_equal(shelf.saved[-1].adapter["a"], 6.0)


def test_evaluation_every_so_many_rounds_and_at_the_end() -> None:
    hall, shelf = conduct(plan_of("[evaluation]\nevery = 2\nclients = 3\n", rounds=5))
    evaluators = tuple(sample_evaluators(plan_of("[evaluation]\nclients = 3\n"), NODES))
    assert [one[1:] for one in hall.asked if one[0] == "evaluating"] == [(n, evaluators) for n in (0, 2, 4, 5)]
    assert [one.eval_loss for one in records(shelf)] == [10.0, None, 8.0, None, 6.0, 5.0]


def test_a_round_without_enough_updates_changes_nothing() -> None:
    """Neither the adapter nor the moments, and says why."""

    def perform(task: Task) -> Outcome:
        if task.round == 2 and isinstance(task.work, Train) and task.node != "cy":
            return Refused("not tonight") if task.node == "ann" else Failed("no data")
        return honest(task)

    plan = plan_of('[cohort]\nminimum = 2\n[aggregation]\nserver_optimizer = "momentum"\n')
    _, shelf = conduct(plan, Hall(perform))
    before, after = shelf.saved[1], shelf.saved[2]
    assert (after.adapter, after.moments) == (before.adapter, before.moments)
    assert (after.record.clients, after.record.train_loss, after.record.steps) == (0, None, 0)
    assert after.record.problems == {"ann": "refused: not tonight", "bob": "no data", "dan": "no data"}
    assert after.record.eval_loss == before.record.eval_loss
    assert [one.clients for one in records(shelf)] == [0, 4, 0, 4]


def test_problems_in_an_evaluation_are_recorded_too() -> None:
    def perform(task: Task) -> Outcome:
        failing = task.node == "bob" and not isinstance(task.work, Train)
        return Failed("no held-out example") if failing else honest(task)

    _, shelf = conduct(plan_of(rounds=1), Hall(perform))
    assert [one.problems for one in records(shelf)] == [{"bob": "no held-out example"}] * 2
    assert [one.eval_loss for one in records(shelf)] == [10.0, 9.0]


def test_a_run_that_nobody_measures_has_no_loss() -> None:
    def perform(task: Task) -> Outcome:
        return honest(task) if isinstance(task.work, Train) else Evaluated(0, 0, 0.0, 0)

    _, shelf = conduct(plan_of(rounds=1), Hall(perform))
    assert [(one.eval_loss, one.eval_accuracy) for one in records(shelf)] == [(None, None)] * 2


def test_over_selection_asks_more_and_counts_as_many_as_wanted() -> None:
    plan = plan_of("[cohort]\nsize = 2\nover_selection = 0.5\n")
    hall, shelf = conduct(plan)
    for what, number, nodes in hall.asked:
        if what == "training":
            assert list(nodes) == sample_cohort(plan, number, NODES)
            assert len(nodes) == 3
    assert [one.clients for one in records(shelf)] == [0, 2, 2, 2]
    assert not any(one.problems for one in records(shelf))

    def perform(task: Task) -> Outcome:
        first = sample_cohort(plan, task.round, NODES)[0]
        failing = task.node == first and isinstance(task.work, Train)
        return Failed("no") if failing else honest(task)

    _, shelf = conduct(plan, Hall(perform))
    assert [one.clients for one in records(shelf)] == [0, 2, 2, 2]
    assert [len(one.problems) for one in records(shelf)] == [0, 1, 1, 1]


def test_without_over_selection_everybody_is_waited_for() -> None:
    _, shelf = conduct(plan_of("[cohort]\nsize = 3\n", rounds=1))
    assert shelf.saved[-1].record.clients == 3


def test_a_round_is_timed_by_the_carriers_clock() -> None:
    """The deadline counts from the carrier's `now`, which may be anything that does not go backwards."""
    deadlines = []

    class Late(Hall):
        def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
            round_.tick(1000.0 + 59.9)
            assert not round_.closed
            round_.tick(1000.0 + 60.0)
            deadlines.append(round_.closed)
            traffic.problems |= round_.problems

    hall, shelf = Late(clock=1000.0), Shelf()
    Conductor(plan_of("[cohort]\nround_seconds = 60.0\n", rounds=1), "run", hall, shelf).go(INITIAL)
    assert deadlines == [True] * 3
    assert shelf.saved[-1].record.problems == dict.fromkeys(NODES, "no answer within 60 s")


def test_rounds_are_those_of_the_run_and_its_plan() -> None:
    seen: set[tuple[str, str]] = set()

    def perform(task: Task) -> Outcome:
        seen.add((task.run, task.plan_digest))
        return honest(task)

    plan = plan_of(rounds=1)
    conduct(plan, Hall(perform))
    assert seen == {("run", plan.digest)}


def test_a_rule_that_must_see_each_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Median(ViewRule):
        def combine(self, updates: Mapping[str, State], weights: Mapping[str, float]) -> State:
            raise AssertionError

    monkeypatch.setattr(conductor, "registered", lambda: {"mean": lambda settings: Median()})
    with pytest.raises(PlanError, match="'mean' must see each update"):
        Conductor(plan_of(), "run", Hall(), Shelf())


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(4.0, 3.0, 0.25), (4.0, 5.0, -0.25), (None, 3.0, None), (4.0, None, None)]
)
def test_the_improvement(before: float | None, after: float | None, expected: float | None) -> None:
    assert improvement(before, after) == expected

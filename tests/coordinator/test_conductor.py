"""A run from checkpoint to checkpoint, over a carrier that needs no model: what is decided here, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from secure_clients import Clients, Work

from farfield.coordinator import conductor, plans
from farfield.coordinator.aggregation import Combined, ViewRule
from farfield.coordinator.conductor import Carrier, Conductor, Journal, Round, Traffic, improvement
from farfield.coordinator.rounds import sample_cohort, sample_evaluators
from farfield.coordinator.runs import Checkpoint, RoundRecord
from farfield.coordinator.server_optimizer import Moments
from farfield.protocols.envelope import Charter
from farfield.protocols.errors import DataError, PlanError, PrivacyError
from farfield.protocols.messages import (
    Evaluate,
    Evaluated,
    Failed,
    Outcome,
    Refused,
    Reply,
    Secure,
    Task,
    Train,
    Trained,
)
from farfield.protocols.plan import Plan
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

NODES = ("ann", "bob", "cy", "dan")
CHARTER = Charter("run", b"", "ab" * 32, 0, "cd" * 32)
INITIAL: State = {"a": np.zeros(2, np.float32)}


def plan_of(extra: str = "", rounds: int = 3) -> Plan:
    """What is decided of a round is the same whether answers are sealed or added up unseen; sealed is the shorter."""
    return secure_plan(f'[protection]\nkind = "sealed"\n{extra}', rounds)


def secure_plan(extra: str = "", rounds: int = 3) -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n'
    return plans.parse(f"{text}[training]\nrounds = {rounds}\nsteps = 1\n{extra}")


def honest(task: Task) -> Outcome:
    """Each client moves the adapter by one, and its loss is how far the adapter is from ten."""
    assert not isinstance(task.work, Secure)
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
    charter: Charter = CHARTER

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        return {}

    def now(self) -> float:
        return self.clock

    def gather(self, at_least: int) -> Sequence[str]:
        self.gathered.append(at_least)
        return self.present

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        tasks = list(round_.tasks())
        self.asked.append((activity, round_.number, tuple(task.node for task in tasks)))
        for task in tasks:
            if round_.closed:
                break
            traffic.down += 100
            outcome = self.perform(task)
            traffic.up += 10
            round_.receive(Reply.to(task, outcome), self.now())
        round_.tick(self.now() + 1e9)
        traffic.note(round_.problems)


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
            traffic.note(round_.problems)

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


def test_a_rule_that_must_see_each_update_gets_them_in_the_order_of_their_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Median(ViewRule):
        def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
            assert list(updates) == list(weights) == sorted(NODES)
            assert set(weights.values()) == {2.0}
            together = np.stack([update["a"] for update in updates.values()])
            return Combined({"a": np.median(together, axis=0).astype(np.float32)}, lost=0.25)

    monkeypatch.setattr(conductor, "registered", lambda: {"mean": lambda settings: Median()})
    _, shelf = conduct(plan_of(rounds=2), Hall(present=tuple(reversed(NODES))))
    np.testing.assert_array_equal(shelf.saved[-1].adapter["a"], 2.0)
    assert [one.record.lost for one in shelf.saved] == [None, 0.25, 0.25]


def added(task: Task, asked: Train | Evaluate) -> Part:
    """The honest client's part of a sum."""
    value = float(unpack_state(asked.adapter)["a"][0])
    if isinstance(asked, Train):
        return Part({"a": np.ones(2, np.float32)}, 2, 1, 10.0 - value, 1)
    return Part({}, 1, 4, 4 * (10.0 - value), correct=1)


@dataclass
class Vault(Hall):
    """A hall whose participants take the steps of secure aggregations.

    Attributes:
        clients: they; `perform` is theirs.
        gone: who has left, so that no key of theirs is known.
    """

    clients: Clients = field(kw_only=True)
    gone: tuple[str, ...] = ()

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        return self.clients.identities(node for node in nodes if node not in self.gone)


def vault(plan: Plan, work: Work = added, present: Sequence[str] = NODES) -> Vault:
    clients = Clients(plan, work)
    return Vault(clients.answer, present, clients=clients)


STEPS = ["agreeing on keys", "sharing keys", "{}", "confirming who is there", "unmasking the sum"]


@pytest.mark.parametrize("server", ["none", "momentum", "adam"])
def test_a_secure_run_comes_to_what_a_sealed_one_does(server: str) -> None:
    """Within a level of the fixed point, and with the same losses, clients and steps in its records."""
    extra = f'[aggregation]\nserver_optimizer = "{server}"\n[protection]\nclip_range = 2.0\n'
    plan = secure_plan(extra)
    assert plan.protection.kind == "secagg"
    _, sealed = conduct(secure_plan(extra + 'kind = "sealed"\n'))
    hall, shelf = conduct(plan, vault(plan))
    told = [[step.format(what) for step in STEPS] for what in ("evaluating", *("training", "evaluating") * 3)]
    assert [one[0] for one in hall.asked] == [step for steps in told for step in steps]
    assert hall.gathered == [3, 3, 3, 3]
    for mine, other in zip(shelf.saved, sealed.saved, strict=True):
        np.testing.assert_allclose(mine.adapter["a"], other.adapter["a"], rtol=0, atol=1e-3)
        assert mine.record.clients == other.record.clients
        assert mine.record.steps == other.record.steps
        assert mine.record.eval_accuracy == other.record.eval_accuracy
        assert mine.record.train_loss == pytest.approx(other.record.train_loss, abs=1e-3)
        assert mine.record.eval_loss == pytest.approx(other.record.eval_loss, abs=1e-3)
        assert not mine.record.problems


def test_ranges_follow_the_sums_from_round_to_round() -> None:
    plan = secure_plan()
    _, shelf = conduct(plan, vault(plan, lambda task, asked: replace_update(added(task, asked), 1e-4)))
    assert [one.bounds.ranges["a"] for one in shelf.saved] == pytest.approx([0.002, 8e-4, 8e-4, 8e-4], rel=0.1)


def replace_update(part: Part, value: float) -> Part:
    return replace(part, update={name: np.full_like(one, value) for name, one in part.update.items()})


def test_too_few_to_begin_is_a_round_that_changes_nothing() -> None:
    """They were there when the round began and had left when their keys were asked for."""
    plan = secure_plan()
    hall = vault(plan)
    hall.gone = ("ann", "bob")
    _, shelf = conduct(plan, hall)
    assert hall.asked == []
    for one in shelf.saved:
        assert one.record.problems == {"the round": "2 clients could be asked, and it takes 3"}
        np.testing.assert_array_equal(one.adapter["a"], 0.0)
        assert (one.record.clients, one.record.eval_loss) == (0, None)


def test_a_sum_that_could_not_be_opened_says_why_and_the_run_goes_on() -> None:
    plan = secure_plan()

    def work(task: Task, asked: Train | Evaluate) -> Part:
        if task.round == 2 and isinstance(asked, Train) and task.node in ("ann", "bob"):
            raise DataError("no data")
        return added(task, asked)

    _, shelf = conduct(plan, vault(plan, work))
    assert [one.record.clients for one in shelf.saved] == [0, 4, 0, 4]
    problems = shelf.saved[2].record.problems
    assert {node: problems[node] for node in ("ann", "bob")} == {"ann": "no data", "bob": "no data"}
    assert "too few for a sum of 3 or more" in problems["the round"]
    assert shelf.saved[2].adapter is shelf.saved[1].adapter
    assert shelf.saved[2].bounds == shelf.saved[1].bounds


def test_over_selection_of_a_secure_round() -> None:
    plan = secure_plan("[cohort]\nsize = 4\nover_selection = 0.5\n")
    nodes = [f"n{number}" for number in range(9)]
    hall, shelf = conduct(plan, vault(plan, present=nodes))
    trained = [one for one in hall.asked if one[0] == "training"]
    assert [list(one[2]) for one in trained] == [sorted(sample_cohort(plan, n, nodes)) for n in (1, 2, 3)]
    assert [len(one[2]) for one in trained] == [6] * 3
    assert [one.record.clients for one in shelf.saved] == [0, 4, 4, 4]


def test_every_aggregation_has_a_session_of_its_own() -> None:
    plan = secure_plan()
    hall, sessions = vault(plan), []

    def perform(task: Task) -> Outcome:
        assert isinstance(task.work, Secure)
        if task.node == "ann" and task.work.step == "advertise":
            sessions.append(bytes(task.work.session))
        return hall.clients.answer(task)

    hall.perform = perform
    conduct(plan, hall)
    assert len(set(sessions)) == len(sessions) == 7
    assert {len(one) for one in sessions} == {32}


PRIVATE = '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 1e-4\n'


@dataclass
class Book:
    """An account that notes what was asked of whom before each of its entries.

    Attributes:
        afford: how many entries there is room for.
    """

    hall: Hall
    afford: int = 1000
    spent: list[tuple[int, int]] = field(default_factory=list)

    def spend(self, number: int) -> None:
        if len(self.spent) == self.afford:
            raise PrivacyError("over the budget")
        self.spent.append((number, len(self.hall.asked)))


@pytest.mark.parametrize("kind", ["sealed", "secagg"])
@pytest.mark.parametrize("noise", ["central", "distributed"])
def test_a_round_is_paid_for_before_anybody_is_asked(kind: str, noise: str) -> None:
    """And once; nothing is evaluated where ε would not cover it."""
    if (kind, noise) == ("sealed", "distributed"):
        with pytest.raises(PlanError, match="hides in a sum"):
            secure_plan(f'[protection]\nkind = "sealed"\n{PRIVATE}noise = "distributed"\n')
        return
    strong = PRIVATE.replace("1e-4", "0.1") if noise == "distributed" else PRIVATE
    plan = secure_plan(f'[protection]\nkind = "{kind}"\nclip_range = 1.0\n{strong}noise = "{noise}"\n')
    hall = vault(plan, clipped) if kind == "secagg" else Hall(plainly_clipped)
    book, shelf = Book(hall), Shelf()
    Conductor(plan, "run", hall, shelf, book).go(INITIAL)
    steps = 5 if kind == "secagg" else 1
    assert book.spent == [(1, 0), (2, steps), (3, 2 * steps)]
    assert {one[0] for one in hall.asked} >= {"training"}
    assert "evaluating" not in {one[0] for one in hall.asked}
    assert [one.record.clients for one in shelf.saved] == [0, 4, 4, 4]
    assert [one.record.train_loss for one in shelf.saved] == [None] * 4
    assert [one.record.clipping_norm for one in shelf.saved] == [None, 1.0, 1.0, 1.0]
    if noise == "central":
        np.testing.assert_allclose(shelf.saved[-1].adapter["a"], 1.5, atol=0.01)


def clipped(task: Task, asked: Train | Evaluate) -> Part:
    assert isinstance(asked, Train)
    assert asked.clipping_norm == 1.0
    return Part({"a": np.full(2, 0.5, np.float32)})


def plainly_clipped(task: Task) -> Outcome:
    assert isinstance(task.work, Train)
    return Trained(pack_state(clipped(task, task.work).update, "float32"), 0, 0, 1, 0.0)


@pytest.mark.parametrize("kind", ["sealed", "secagg"])
def test_a_round_that_cannot_be_paid_for_asks_nobody(kind: str) -> None:
    plan = secure_plan(f'[protection]\nkind = "{kind}"\n{PRIVATE}')
    hall = vault(plan, clipped) if kind == "secagg" else Hall(plainly_clipped)
    book, shelf = Book(hall, afford=2), Shelf()
    with pytest.raises(PrivacyError, match="over the budget"):
        Conductor(plan, "run", hall, shelf, book).go(INITIAL)
    assert [number for number, _ in book.spent] == [1, 2]
    assert {one[1] for one in hall.asked} == {1, 2}
    assert [one.record.round for one in shelf.saved] == [0, 1, 2]


def test_an_interrupted_round_is_paid_for_again() -> None:
    """What was spent and not saved stays spent: something of it may have been seen."""
    plan = plan_of(PRIVATE)
    hall, shelf = Hall(), Shelf()

    def dying(task: Task) -> Outcome:
        if task.round == 2:
            raise KeyboardInterrupt
        return plainly_clipped(task)

    hall.perform = dying
    book = Book(hall)
    with pytest.raises(KeyboardInterrupt):
        Conductor(plan, "run", hall, shelf, book).go(INITIAL)
    assert [one.record.round for one in shelf.saved] == [0, 1]
    hall.perform = plainly_clipped
    Conductor(plan, "run", hall, shelf, book).go(INITIAL)
    assert [number for number, _ in book.spent] == [1, 2, 2, 3]


def test_what_is_private_is_not_conducted_without_an_account() -> None:
    with pytest.raises(AssertionError):
        Conductor(plan_of(PRIVATE), "run", Hall(plainly_clipped), Shelf()).go(INITIAL)


def test_turns_are_kept() -> None:
    """Each client is asked in one round of every turn of two, and nobody twice in one."""
    plan = plan_of(PRIVATE + "participations = 2\n", rounds=4)
    nodes = [f"n{number}" for number in range(12)]
    hall = Hall(plainly_clipped, nodes)
    Conductor(plan, "run", hall, Shelf(), Book(hall)).go(INITIAL)
    asked = [set(one[2]) for one in hall.asked]
    assert asked[0] == asked[2]
    assert asked[1] == asked[3]
    assert asked[0] | asked[1] == set(nodes)
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(4.0, 3.0, 0.25), (4.0, 5.0, -0.25), (None, 3.0, None), (4.0, None, None)]
)
def test_the_improvement(before: float | None, after: float | None, expected: float | None) -> None:
    assert improvement(before, after) == expected

"""Rounds that add up in groups: who is with whom, what the groups' sums come to, and what falls out with whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import refused, running
from numpy.typing import NDArray
from secure_clients import Clients, Work, carry
from tiny import Place, Silent, write_backbone

from farfield.coordinator import aggregation, grouping, plans
from farfield.coordinator.aggregation import GroupRule
from farfield.coordinator.conductor import Conductor, Round, Traffic
from farfield.coordinator.grouping import GroupSum
from farfield.coordinator.rounds import cohort_size
from farfield.coordinator.runs import Checkpoint, RunFolder
from farfield.coordinator.secure_rounds import SecureRound
from farfield.coordinator.simulate import Request, simulate
from farfield.protocols.envelope import Charter
from farfield.protocols.errors import DataError, PlanError
from farfield.protocols.messages import Evaluate, Reply, Secure, Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Terms
from farfield.protocols.summing import Part, Subject, Sum
from farfield.protocols.tensors import State, digest, pack_state

INITIAL: State = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
SHAPES = {name: array.shape for name, array in INITIAL.items()}
CHARTER = Charter("run", b"", "ab" * 32, 0, "cd" * 32)
NODES = tuple(f"n{number:02}" for number in range(9))
Vector = NDArray[np.float64]

LEVEL = 3 * 4096 * 2.0**-19 / 30
"""How far the mean of three clients of weight 10 or more is from the exact one: a level of fixed point for each."""


def plan_of(groups: int = 3, rule: str = "median_of_means", extra: str = "", rounds: int = 1) -> Plan:
    text = f'[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = {rounds}\n'
    text += f'steps = 1\n[aggregation]\nrule = "{rule}"\ngroups = {groups}\n'
    return plans.parse(text + "[protection]\nclip_range = 1.0\nadapt_range = false\n" + extra)


def update_of(node: str) -> State:
    random = np.random.default_rng(list(node.encode()))
    return {name: random.uniform(-0.1, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}


def examples_of(node: str) -> int:
    return 10 + int(node[1:])


def work(task: Task, asked: Train | Evaluate) -> Part:
    if isinstance(asked, Train):
        return Part(update_of(task.node), examples_of(task.node), 7, 3.5, 2)
    return Part({}, 2, 8, 4.0, correct=3)


@dataclass
class Hall:
    """A carrier whose participants take every step at once.

    Attributes:
        asked: by session, who was asked in its first step, and how many they were told that they are.
        gone: who has left, so that no key of theirs is known.
    """

    clients: Clients
    present: Sequence[str] = NODES
    gone: tuple[str, ...] = ()
    charter: Charter = CHARTER
    gathered: list[int] = field(default_factory=list)
    asked: list[tuple[tuple[str, ...], set[int]]] = field(default_factory=list)
    activities: list[str] = field(default_factory=list)
    patience: list[float] = field(default_factory=list)

    def now(self) -> float:
        return 0.0

    def gather(self, at_least: int) -> Sequence[str]:
        self.gathered.append(at_least)
        return self.present

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        return self.clients.identities(node for node in nodes if node not in self.gone)

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        tasks = list(round_.tasks())
        assert isinstance(round_.work, Secure)
        self.activities.append(activity)
        if round_.work.step == "advertise":
            self.asked.append((tuple(task.node for task in tasks), {task.cohort for task in tasks}))
        for task in tasks:
            if not round_.closed:
                round_.receive(Reply.to(task, self.clients.answer(task)), 0.0)
        round_.tick(1e9)
        traffic.note(round_.problems)


@dataclass
class Shelf:
    saved: list[Checkpoint] = field(default_factory=list)

    def resume(self) -> Checkpoint | None:
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        self.saved.append(checkpoint)


def conduct(plan: Plan, do: Work = work, terms: Terms | None = None, **hall: Any) -> tuple[Hall, list[Checkpoint]]:
    clients = Clients(plan, do) if terms is None else Clients(plan, do, terms=terms)
    carrier, shelf = Hall(clients, **hall), Shelf()
    Conductor(plan, "run", carrier, shelf).go(INITIAL)
    return carrier, shelf.saved


def mean_of(nodes: Iterable[str]) -> Mapping[str, Vector]:
    nodes = list(nodes)
    total = sum(map(examples_of, nodes))
    return {
        name: sum((examples_of(node) * update_of(node)[name].astype(np.float64) for node in nodes), np.zeros(shape))
        / total
        for name, shape in SHAPES.items()
    }


def median_of(groups: Iterable[Iterable[str]]) -> Mapping[str, Vector]:
    means = [mean_of(group) for group in groups]
    return {name: np.median([mean[name] for mean in means], axis=0) for name in SHAPES}


def assert_close(found: State, expected: Mapping[str, NDArray[np.floating]]) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=LEVEL)


# --- who is with whom -----------------------------------------------------------------------------


@given(st.integers(3, 7), st.integers(0, 40), st.integers(1, 50))
def test_each_client_is_in_one_group_and_groups_are_as_large_as_each_other(groups: int, more: int, number: int) -> None:
    plan, cohort = plan_of(groups), [f"n{k}" for k in range(3 * groups + more)]
    found = grouping.split(plan, number, cohort)
    assert sorted(node for group in found for node in group) == sorted(cohort)
    sizes = [len(group) for group in found]
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1
    assert found == grouping.split(plan, number, list(reversed(cohort)))


def test_groups_are_drawn_anew_in_each_round_and_for_each_seed() -> None:
    """Uniformly: any two of nine are in one of three groups in a quarter of the rounds (4 σ)."""
    plan = plan_of()
    together = [any({"n00", "n01"} <= set(group) for group in grouping.split(plan, k, NODES)) for k in range(2000)]
    assert abs(np.mean(together) - 2 / 8) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    training = plan.training.model_copy(update={"seed": 1})
    other = plan.model_copy(update={"training": training})
    assert grouping.split(plan, 1, NODES) != grouping.split(other, 1, NODES)


@pytest.mark.parametrize(("groups", "left"), [(3, 3), (4, 3), (5, 3), (6, 4), (7, 4), (9, 5)])
def test_how_many_groups_must_be_left(groups: int, left: int) -> None:
    assert grouping.fewest(groups) == left


# --- a round --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "clients"), [(3, 9), (3, 11), (4, 12)])
def test_the_update_is_the_median_of_the_groups_means(groups: int, clients: int) -> None:
    plan = plan_of(groups)
    nodes = tuple(f"n{number:02}" for number in range(clients))
    _, (_, after) = conduct(plan, present=nodes)
    split = grouping.split(plan, 1, nodes)
    assert_close(after.adapter, median_of(split))
    assert max(float(np.abs(median_of(split)[name] - mean_of(nodes)[name]).max()) for name in SHAPES) > 5 * LEVEL
    assert (after.record.clients, after.record.steps, after.record.train_loss) == (clients, 2 * clients, 0.5)
    assert not after.record.problems


def test_each_group_has_a_session_of_its_own_and_an_evaluation_one_for_all() -> None:
    plan = plan_of()
    hall, _ = conduct(plan)
    groups = [(tuple(group), {3}) for group in grouping.split(plan, 1, NODES)]
    assert hall.asked == [(NODES, {9}), *groups, (NODES, {9})]
    assert hall.activities.count("training") == 3
    assert hall.gathered == [9, 9]


def test_the_geometric_median_of_means() -> None:
    plan = plan_of(5, "geometric_median_of_means")
    nodes = tuple(f"n{number:02}" for number in range(15))
    _, (_, after) = conduct(plan, present=nodes)
    made = aggregation.registered()[plan.aggregation.rule](plan.aggregation)
    assert isinstance(made, GroupRule)
    means = [{name: one.astype(np.float32) for name, one in mean_of(g).items()} for g in grouping.split(plan, 1, nodes)]
    assert_close(after.adapter, made.combine(means).update)


def test_one_client_that_sends_all_it_can_moves_the_median_no_further_than_honest_groups_reach() -> None:
    """And the mean a hundred times as far."""

    def hostile(task: Task, asked: Train | Evaluate) -> Part:
        part = work(task, asked)
        if task.node == "n04" and isinstance(asked, Train):
            return replace(
                part, update={name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, examples=4096
            )
        return part

    plan = plan_of()
    _, (_, after) = conduct(plan, hostile)
    honest = [mean_of(group) for group in grouping.split(plan, 1, NODES) if "n04" not in group]
    for name in SHAPES:
        means = np.stack([mean[name] for mean in honest])
        assert (after.adapter[name] >= means.min(axis=0) - LEVEL).all()
        assert (after.adapter[name] <= means.max(axis=0) + LEVEL).all()
    mean = plans.parse(
        '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 1\nsteps = 1\n'
        "[protection]\nclip_range = 1.0\n"
    )
    _, (_, carried) = conduct(mean, hostile)
    assert min(float(array.min()) for array in carried.adapter.values()) > 0.9


def test_a_group_that_cannot_be_added_up_is_left_out() -> None:
    plan = plan_of(5)
    nodes = tuple(f"n{number:02}" for number in range(15))
    split = grouping.split(plan, 1, nodes)
    failing = {split[0][1], split[3][2]}

    def some(task: Task, asked: Train | Evaluate) -> Part:
        if task.node in failing and isinstance(asked, Train):
            raise DataError("no data")
        return work(task, asked)

    _, (_, after) = conduct(plan, some, present=nodes)
    counted = [split[1], split[2], split[4]]
    assert_close(after.adapter, median_of(counted))
    assert (after.record.clients, after.record.steps) == (9, 18)
    told = after.record.problems
    assert {node: told.pop(node) for node in failing} == dict.fromkeys(failing, "no data")
    assert set(told) == {"group 1", "group 4"}
    assert all("too few for a sum of 3 or more" in text for text in told.values())


def test_with_too_few_groups_left_a_round_changes_nothing_and_says_why() -> None:
    plan = plan_of(rounds=2, extra="[cohort]\nminimum = 3\n")
    lost = grouping.split(plan, 1, NODES)[1][0]

    def some(task: Task, asked: Train | Evaluate) -> Part:
        if (task.node, task.round) == (lost, 1) and isinstance(asked, Train):
            raise DataError("no data")
        return work(task, asked)

    _, (before, after, last) = conduct(plan, some)
    assert after.adapter is before.adapter
    assert after.bounds == before.bounds
    assert (after.record.clients, after.record.train_loss) == (0, None)
    assert after.record.problems["the round"] == "2 of 3 groups were added up, and it takes 3"
    assert last.record.clients == 9
    assert_close(last.adapter, median_of(grouping.split(plan, 2, NODES)))


def test_who_left_before_its_group_was_asked_costs_that_group() -> None:
    plan = plan_of(4)
    nodes = tuple(f"n{number:02}" for number in range(12))
    hall, (_, after) = conduct(plan, present=nodes, gone=("n05",))
    (short,) = (k for k, group in enumerate(grouping.split(plan, 1, nodes), 1) if "n05" in group)
    assert after.record.problems == {f"group {short}": "2 clients could be asked, and it takes 3"}
    assert after.record.clients == 9
    assert not any("n05" in nodes for nodes, _ in hall.asked)


def test_a_group_whose_clients_weigh_nothing_is_no_mean() -> None:
    plan = plan_of()
    empty = set(grouping.split(plan, 1, NODES)[2])

    def idle(task: Task, asked: Train | Evaluate) -> Part:
        part = work(task, asked)
        return replace(part, examples=0) if task.node in empty and isinstance(asked, Train) else part

    _, (_, after) = conduct(plan, idle)
    assert after.record.problems == {
        "group 3": "its clients say that they have no example",
        "the round": "2 of 3 groups were added up, and it takes 3",
    }


def test_too_few_for_all_groups_ask_nobody() -> None:
    """They were there when the round was to begin and it was not their turn; `gather` waits for as many as it takes."""
    hall, (_, after) = conduct(plan_of(), present=NODES[:8])
    assert after.record.problems == {"the round": "it is the turn of 8 clients, and it takes 9"}
    assert [len(nodes) for nodes, _ in hall.asked] == [8, 8]


@pytest.mark.parametrize(("size", "asked", "counted"), [(9, 13, [4, 3, 3]), (12, 17, [4, 4, 4])])
def test_over_selection_is_shared_among_the_groups(size: int, asked: int, counted: list[int]) -> None:
    """Each closes with its part of what the round wants, but never with fewer than two thirds of those asked."""
    plan = plan_of(extra=f"[cohort]\nsize = {size}\nover_selection = 0.4\n")
    nodes = tuple(f"n{number:02}" for number in range(30))
    hall, (_, after) = conduct(plan, present=nodes)
    groups = [len(nodes) for nodes, _ in hall.asked if len(nodes) < 16]
    assert sum(groups) == asked
    assert max(groups) - min(groups) <= 1
    assert after.record.clients == sum(counted)


def test_a_round_by_fraction_is_never_too_small_for_its_groups() -> None:
    plan = plan_of(extra="[cohort]\nfraction = 0.1\n")
    assert cohort_size(plan, 40) == 9
    assert cohort_size(plan, 200) == 20


def test_the_first_step_of_every_group_of_a_first_round_is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients may have to load their backbone, whatever the groups before it have done."""
    plan = plan_of(rounds=2)
    seen: list[bool] = []
    begin = SecureRound.__init__

    def noted(self: SecureRound, *args: Any) -> None:
        seen.append(args[-1])
        begin(self, *args)

    monkeypatch.setattr(SecureRound, "__init__", noted)
    monkeypatch.setattr(Plan, "measures", False)
    conduct(plan)
    assert seen == [True] * 3 + [False] * 3


# --- what a client sees to ------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [Terms(4, 2), Terms(3, 4)])
def test_a_client_holds_its_owners_terms_against_the_group(terms: Terms) -> None:
    """Nine are in the round, and its update would hide among three."""
    _, (_, after) = conduct(plan_of(), terms=terms)
    assert after.record.clients == 0
    assert after.record.problems["the round"] == "0 of 3 groups were added up, and it takes 3"
    wanted = "this one takes part from 4 on" if terms.smallest_cohort == 4 else "4"
    assert all(wanted in after.record.problems[node] for node in NODES)


def test_a_client_is_added_to_one_group_of_a_round() -> None:
    """A coordinator that has it in a second one, in other company, could tell its part apart, and is refused it."""
    plan = plan_of()
    clients = Clients(plan, work)
    asked = Train(pack_state(INITIAL, "float32"))
    subject = Subject(
        plan=bytes.fromhex(plan.digest),
        backbone=bytes.fromhex(clients.backbone),
        frozen=bytes.fromhex(clients.frozen),
        purpose="train",
        adapter=bytes.fromhex(digest(INITIAL)),
        clipping_norm=None,
        ranges=(1.0, 1.0),
    )
    sums = []
    for number, group in enumerate((("n00", "n01", "n02", "n03"), ("n00", "n04", "n05", "n06"))):
        identities = clients.identities(group)
        session = bytes([number]) * 32
        one = SecureRound(plan, "run", 1, asked, subject, SHAPES, identities, session, lambda: 0.0)
        carry(one, lambda step, task: clients.answer(task))
        sums.append(one)
    assert sums[0].sum is not None
    assert "this part was added to the parts of other clients before" in sums[1].problems["n00"]


# --- in a Plan, and in a simulation ---------------------------------------------------------------


def test_a_rule_of_groups_goes_with_secure_aggregation() -> None:
    known = aggregation.traits()["median_of_means"]
    assert (known.views, known.groups) == (False, True)
    plan = plan_of()
    assert plan.protection.kind == "secagg"
    assert (plan.smallest_cohort, plan.smallest_round) == (3, 9)
    larger = plan_of(5, extra="[cohort]\nminimum = 4\n")
    assert (larger.smallest_cohort, larger.smallest_round) == (4, 20)


PLAIN = '[model]\nbackbone = "b"\n[tuning]\nkind = "lora"\n[training]\nrounds = 1\nsteps = 1\n'


@pytest.mark.parametrize(
    ("section", "extra", "reason"),
    [
        (
            "groups = 3",
            '[protection]\nkind = "sealed"\n',
            'works on sums .* "sealed" there are none: use "secagg", or a',
        ),
        ("groups = 3", '[protection]\nkind = "none"\n', "works on sums that hide their parts"),
        ("", "", "'median_of_means' needs aggregation.groups"),
        ("groups = 2", "", "aggregation.groups = 2"),
        ("groups = 3", "[cohort]\nsize = 8\n", "3 groups of at least 3 clients take 9, and cohort.size is 8"),
        ("groups = 3", "[cohort]\nsize = 14\nminimum = 5\n", "3 groups of at least 5 clients take 15"),
        (
            'groups = 3\nweighting = "uniform"',
            '[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n',
            "adds noise to one sum of the whole cohort, .* 'median_of_means' makes one of each group",
        ),
    ],
)
def test_a_plan_that_cannot_have_groups_is_refused(section: str, extra: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plans.parse(f'{PLAIN}[aggregation]\nrule = "median_of_means"\n{section}\n{extra}')


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def test_plan_check_and_simulate_say_how_many_clients_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, backbone: Path
) -> None:
    place = Place.make(tmp_path, backbone)
    file = place.plan(aggregation={"rule": "median_of_means", "groups": 3})
    said = " ".join(running(monkeypatch, capsys, "plan", "check")(file).out.split())
    assert "at least 9" in said
    assert "groups 3, each with a sum of its own over 3 clients or more: a round takes 9 clients, and counts" in said
    ended = running(monkeypatch, capsys, "simulate")(file, "--data", place.path / "data", "--runs", place.path / "runs")
    refused(ended, "3 groups of at least 3 clients take 9, and there are 3")


def test_a_simulation_in_groups_learns_and_comes_out_the_same_twice(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone, clients=9)
    file = place.plan(training={"rounds": 2, "steps": 4}, aggregation={"rule": "median_of_means", "groups": 3})
    results = [simulate(Request(file, data=place.path / "data", runs=place.path / runs), Silent()) for runs in "ab"]
    losses = [record.eval_loss for record in results[0].rounds]
    assert all(loss is not None for loss in losses)
    assert losses[-1] < losses[0] - 0.02  # type: ignore[operator]
    assert [record.clients for record in results[0].rounds] == [0, 9, 9]
    assert results[0].adapter_digest == results[1].adapter_digest
    assert RunFolder.open(results[0].folder).load(2).adapter.keys()


def test_a_mean_of_a_group_is_its_sum_by_its_weight() -> None:
    total = {"a": np.full((2, 3), 6.0), "b": np.array([3.0, -1.5])}
    mean = GroupSum(Sum(total, weight=3.0), ("ann",)).mean
    assert all(array.dtype == np.float32 for array in mean.values())
    np.testing.assert_array_equal(mean["b"], [1.0, -0.5])

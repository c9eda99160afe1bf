from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.coordinator import plans
from farfield.coordinator.aggregation.mean import WeightedMean
from farfield.coordinator.rounds import (
    EvaluationRound,
    TrainingRound,
    Verdict,
    cohort_size,
    sample_cohort,
    sample_evaluators,
)
from farfield.protocols.messages import Evaluated, Failed, Reply, Task, Trained
from farfield.protocols.plan import Cohort, Plan
from farfield.protocols.tensors import State, pack_state

NODES = ["ann", "bob", "cy"]
ADAPTER: State = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32), "c": np.zeros((), np.float32)}


def plan(extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(text + extra)


def opened(extra: str = "", nodes: list[str] = NODES) -> TrainingRound:
    chosen = plan(extra)
    return TrainingRound(chosen, "run", 1, ADAPTER, nodes, WeightedMean(chosen.aggregation), now=100.0)


def trained(task: Task, value: float = 1.0, **changes: Any) -> Reply:
    update = pack_state({name: np.full_like(array, value) for name, array in ADAPTER.items()}, "float32")
    values = {"update": update, "examples": 10, "targets": 5, "steps": 1, "loss": 2.0, **changes}
    return Reply.to(task, Trained(**values))


def test_a_full_round() -> None:
    round_ = opened()
    tasks = list(round_.tasks())
    assert [task.node for task in tasks] == NODES
    for value, task in zip((1.0, 2.0, 6.0), tasks, strict=True):
        assert not round_.closed
        assert round_.receive(trained(task, value), now=101.0) is Verdict.ACCEPTED
    assert round_.closed
    result = round_.result()
    assert result is not None
    np.testing.assert_allclose(result.update["a"], 3.0, rtol=1e-6)
    assert (result.clients, result.examples, result.targets, result.loss) == (tuple(NODES), 30, 15, 2.0)


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.floats(-100, 100, width=32), st.floats(-1, 1, width=32)),
        min_size=1,
        max_size=20,
    )
)
def test_the_mean_equals_the_reference(clients: list[tuple[int, float, float]]) -> None:
    nodes = [f"n{i:02d}" for i in range(len(clients))]
    round_ = opened(nodes=nodes)
    for task, (examples, a, b) in zip(round_.tasks(), clients, strict=True):
        update = {"a": np.full((2, 2), a, np.float32), "b": np.full(3, b, np.float32), "c": np.full((), b, np.float32)}
        round_.receive(trained(task, update=pack_state(update, "float32"), examples=examples), now=100.0)
    result = round_.result()
    assert result is not None
    weights = np.array([examples for examples, _, _ in clients], np.float64)
    for name, column in (("a", 1), ("b", 2), ("c", 2)):
        values = np.array([client[column] for client in clients], np.float64)
        reference = (weights * values).sum() / weights.sum()
        scale = max(1e-6, np.abs(values).max())
        np.testing.assert_allclose(result.update[name] / scale, reference / scale, atol=1e-6)


def test_uniform_weighting_ignores_the_number_of_examples() -> None:
    round_ = opened('[aggregation]\nweighting = "uniform"\n')
    for task, examples, value in zip(round_.tasks(), (1, 1000, 1000), (3.0, 0.0, 0.0), strict=True):
        round_.receive(trained(task, value, examples=examples), now=100.0)
    result = round_.result()
    assert result is not None
    np.testing.assert_allclose(result.update["b"], 1.0, rtol=1e-6)


def test_what_is_not_addressed_to_this_round_changes_nothing() -> None:
    round_ = opened()
    task = next(iter(round_.tasks()))
    good = trained(task)
    strays = [
        Reply("other", 1, "ann", task.plan_digest, good.outcome),
        Reply("run", 2, "ann", task.plan_digest, good.outcome),
        Reply("run", 1, "eve", task.plan_digest, good.outcome),
        Reply("run", 1, "ann", "00" * 32, good.outcome),
    ]
    assert [round_.receive(stray, now=100.0) for stray in strays] == [Verdict.STRAY] * 4
    assert round_.receive(good, now=100.0) is Verdict.ACCEPTED
    assert round_.receive(good, now=100.0) is Verdict.STRAY
    round_.tick(1e9)
    result = round_.result()
    assert result is not None
    assert result.clients == ("ann",)


def test_a_round_ends_when_its_time_is_up_and_tells_the_late() -> None:
    round_ = opened("[cohort]\nround_seconds = 60.0\n")
    ann, bob, cy = round_.tasks()
    assert round_.receive(trained(ann), now=159.9) is Verdict.ACCEPTED
    assert round_.receive(trained(bob), now=160.0) is Verdict.LATE
    assert round_.closed
    assert round_.problems == {"bob": "no answer within 60 s", "cy": "no answer within 60 s"}
    assert round_.receive(trained(cy), now=161.0) is Verdict.LATE
    result = round_.result()
    assert result is not None
    assert result.clients == ("ann",)


def test_failures_and_losses_are_remembered_with_their_reason() -> None:
    round_ = opened()
    ann, bob, _ = round_.tasks()
    assert round_.receive(Reply.to(ann, Failed("no usable example")), now=100.0) is Verdict.FAILED
    round_.lose("cy", "connection closed")
    round_.receive(trained(bob), now=100.0)
    assert round_.closed
    assert round_.problems == {"ann": "no usable example", "cy": "connection closed"}


def test_fewer_updates_than_the_minimum_come_to_nothing() -> None:
    round_ = opened("[cohort]\nminimum = 3\n")
    ann, bob, _ = round_.tasks()
    round_.receive(trained(ann), now=100.0)
    round_.receive(trained(bob), now=100.0)
    round_.lose("cy", "gone")
    assert round_.result() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"update": {}}, "tensors differ from the adapter's"),
        ({"update": pack_state({**ADAPTER, "d": np.ones(1, np.float32)}, "float32")}, "first at 'd'"),
        ({"update": pack_state({**ADAPTER, "b": np.ones(4, np.float32)}, "float32")}, "first at 'b'"),
        (
            {"update": pack_state({**ADAPTER, "b": np.full(3, np.inf, np.float32)}, "float32")},
            "not finite, first in 'b'",
        ),
        ({"examples": 0}, "from no example"),
        ({"targets": 0}, "from no example"),
    ],
)
def test_an_update_that_cannot_be_added_is_refused_whole(change: dict[str, Any], reason: str) -> None:
    round_ = opened(nodes=["ann", "bob"])
    ann, bob = round_.tasks()
    assert round_.receive(trained(ann, **change), now=100.0) is Verdict.INVALID
    assert reason in round_.problems["ann"]
    round_.receive(trained(bob, 7.0), now=100.0)
    result = round_.result()
    assert result is not None
    np.testing.assert_array_equal(result.update["a"], 7.0)


def test_a_training_round_takes_no_measurement_for_an_update() -> None:
    round_ = opened(nodes=["ann"])
    (task,) = round_.tasks()
    assert round_.receive(Reply.to(task, Evaluated(1, 1, 1.0, 1)), now=100.0) is Verdict.INVALID


def test_an_open_round_has_no_result() -> None:
    with pytest.raises(RuntimeError):
        opened().result()


def test_an_evaluation_weighs_by_targets() -> None:
    round_ = EvaluationRound(plan(), "run", 1, ADAPTER, NODES, now=0.0)
    ann, bob, cy = round_.tasks()
    round_.receive(Reply.to(ann, Evaluated(1, 10, 1.0, 5)), now=0.0)
    round_.receive(Reply.to(bob, Evaluated(1, 30, 3.0, 5)), now=0.0)
    assert round_.receive(Reply.to(cy, Evaluated(0, 0, 0.0, 0)), now=0.0) is Verdict.ACCEPTED
    score = round_.result()
    assert score is not None
    assert (score.loss, score.accuracy, score.clients) == (2.5, 0.25, ("ann", "bob"))


@pytest.mark.parametrize(
    ("cohort", "present", "expected"),
    [
        (Cohort(), 7, 7),
        (Cohort(size=5), 7, 5),
        (Cohort(size=5), 3, 3),
        (Cohort(fraction=0.5), 7, 4),
        (Cohort(fraction=0.1, minimum=3), 7, 3),
        (Cohort(fraction=0.1, minimum=3), 2, 2),
    ],
)
def test_the_size_of_a_cohort(cohort: Cohort, present: int, expected: int) -> None:
    assert cohort_size(cohort, present) == expected


def test_cohorts_are_drawn_afresh_for_each_round_and_evaluators_are_not() -> None:
    chosen = plan("[cohort]\nsize = 8\n[evaluation]\nclients = 8\n")
    nodes = [f"n{i}" for i in range(100)]
    cohorts = [sample_cohort(chosen, number, reversed(nodes)) for number in range(1, 200)]
    assert cohorts[0] == sample_cohort(chosen, 1, nodes)
    assert cohorts[0] != cohorts[1]
    counts = np.bincount([int(node[1:]) for cohort in cohorts for node in cohort], minlength=100)
    assert counts.min() > 0
    assert counts.max() < 40  # 16 expected; 5 standard deviations are 19
    assert sample_evaluators(chosen, nodes) == sample_evaluators(chosen, reversed(nodes))

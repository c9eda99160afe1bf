import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from farfield.coordinator import keeping, plans
from farfield.coordinator.aggregation.mean import WeightedMean
from farfield.coordinator.asking import Verdict
from farfield.coordinator.rounds import (
    EvaluationRound,
    TrainingRound,
    cohort_size,
    sample_cohort,
    sample_evaluators,
)
from farfield.protocols.messages import Evaluated, Failed, Refused, Reply, Task, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import DType, State, pack_state, unpack_state

NODES = ["ann", "bob", "cy"]
ADAPTER: State = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32), "c": np.zeros((), np.float32)}


def plan(extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(f'{text}[protection]\nkind = "sealed"\n{extra}')


def opened(
    extra: str = "", nodes: list[str] = NODES, wanted: int | None = None, adapter: State = ADAPTER
) -> TrainingRound:
    chosen = plan(extra)
    return TrainingRound(chosen, "run", 1, adapter, nodes, WeightedMean(chosen.aggregation), now=100.0, wanted=wanted)


def trained(task: Task, value: float = 1.0, **changes: Any) -> Reply:
    update = pack_state({name: np.full_like(array, value) for name, array in ADAPTER.items()}, "float32")
    values = {"update": update, "examples": 10, "targets": 5, "steps": 1, "loss": 2.0, **changes}
    return Reply.to(task, Trained(**values))


def test_a_full_round() -> None:
    round_ = opened()
    tasks = list(round_.tasks())
    assert [task.node for task in tasks] == NODES
    assert {task.cohort for task in tasks} == {3}
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


def test_a_refusal_is_a_problem_with_its_reason() -> None:
    round_ = opened(nodes=["ann", "bob"])
    ann, bob = round_.tasks()
    assert round_.receive(Reply.to(ann, Refused("no training after 18:00")), now=100.0) is Verdict.REFUSED
    assert round_.problems == {"ann": "refused: no training after 18:00"}
    assert round_.waiting == {"bob"}
    assert round_.receive(trained(ann), now=100.0) is Verdict.LATE
    round_.receive(trained(bob, 7.0), now=100.0)
    result = round_.result()
    assert result is not None
    assert result.clients == ("bob",)


def test_an_evaluation_can_be_refused() -> None:
    round_ = EvaluationRound(plan(), "run", 1, ADAPTER, ["ann"], now=0.0)
    (task,) = round_.tasks()
    assert round_.receive(Reply.to(task, Refused("not here")), now=0.0) is Verdict.REFUSED
    assert (round_.closed, round_.result(), round_.problems) == (True, None, {"ann": "refused: not here"})


def test_a_round_closes_with_as_many_as_it_wants() -> None:
    nodes = ["ann", "bob", "cy", "dan", "eve"]
    round_ = opened(nodes=nodes, wanted=2)
    ann, bob, cy, dan, eve = round_.tasks()
    assert {task.cohort for task in (ann, eve)} == {5}
    assert round_.receive(trained(eve, 1.0), now=101.0) is Verdict.ACCEPTED
    assert not round_.closed
    assert round_.receive(trained(bob, 2.0), now=102.0) is Verdict.ACCEPTED
    assert round_.closed
    assert round_.waiting == {"ann", "cy", "dan"}
    for late in (ann, cy, cy):
        assert round_.receive(trained(late, 100.0), now=103.0) is Verdict.LATE
    assert round_.receive(Reply.to(dan, Failed("no")), now=103.0) is Verdict.LATE
    assert round_.receive(trained(eve, 100.0), now=103.0) is Verdict.STRAY
    round_.tick(1e9)
    assert round_.problems == {}, "it is nobody's fault that the others were faster"
    result = round_.result()
    assert result is not None
    np.testing.assert_allclose(result.update["a"], 1.5, rtol=1e-6)
    assert (result.clients, result.examples) == (("eve", "bob"), 20)


def test_only_what_counts_brings_the_close_nearer() -> None:
    round_ = opened(nodes=["ann", "bob", "cy", "dan", "eve"], wanted=2)
    ann, bob, cy, dan, eve = round_.tasks()
    round_.receive(trained(ann), now=100.0)
    assert round_.receive(Reply.to(bob, Failed("no")), now=100.0) is Verdict.FAILED
    assert round_.receive(Reply.to(cy, Refused("no")), now=100.0) is Verdict.REFUSED
    assert round_.receive(trained(dan, math.nan), now=100.0) is Verdict.INVALID
    assert not round_.closed
    round_.receive(trained(eve), now=100.0)
    assert round_.closed
    assert sorted(round_.problems) == ["bob", "cy", "dan"]


def test_a_round_that_cannot_have_what_it_wants_still_closes() -> None:
    round_ = opened("[cohort]\nround_seconds = 60.0\n", wanted=2)
    ann, *_ = round_.tasks()
    round_.receive(trained(ann), now=100.0)
    round_.lose("bob", "gone")
    assert not round_.closed
    round_.lose("cy", "gone")
    assert round_.closed
    late = opened("[cohort]\nround_seconds = 60.0\n", wanted=2)
    late.tick(160.0)
    assert late.closed
    assert sorted(late.problems) == NODES


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
        ({"update": pack_state({**ADAPTER, "b": np.full(3, np.inf, np.float32)}, "float32")}, "first in 'b'"),
        ({"update": pack_state({**ADAPTER, "c": np.full((), np.nan, np.float32)}, "float32")}, "first in 'c'"),
        ({"update": pack_state({**ADAPTER, "b": np.full(3, -1e37, np.float32)}, "float32")}, "too large to add"),
        ({"update": pack_state({**ADAPTER, "b": np.full(3, 1e20, np.float32)}, "float32"), "examples": 2**63}, "too l"),
        ({"loss": 1e308, "targets": 2**40}, "a loss of 1e+308 over 1099511627776 targets"),
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


largest = st.floats(2.0**60, float(np.finfo(np.float32).max), width=32)


@given(
    st.lists(
        st.tuples(largest, st.booleans(), st.one_of(st.integers(1, 8), st.integers(1, 2**64 - 1))),
        min_size=1,
        max_size=8,
    )
)
def test_no_finite_updates_make_a_sum_that_is_not(clients: list[tuple[float, bool, int]]) -> None:
    """A sum that overflowed would be every later round's adapter; a warning of numpy would fail this test, too."""
    nodes = [f"n{i}" for i in range(len(clients))]
    round_ = opened(nodes=nodes)
    for task, (value, negative, examples) in zip(round_.tasks(), clients, strict=True):
        round_.receive(trained(task, -value if negative else value, examples=examples), now=100.0)
    result = round_.result()
    if result is not None:
        assert all(np.isfinite(array).all() for array in result.update.values())


BLOCK = 4

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=2 * BLOCK + 1)
values = st.floats(-100, 100, width=32)


@given(
    hnp.arrays(np.float32, shapes, elements=values),
    st.lists(st.tuples(values, st.integers(1, 1000)), min_size=1, max_size=4),
    st.sampled_from(("float32", "bfloat16")),
)
def test_a_sum_in_blocks_is_bit_by_bit_the_sum_of_the_whole(
    array: np.ndarray, clients: list[tuple[float, int]], dtype: DType
) -> None:
    nodes = [f"n{i}" for i in range(len(clients))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keeping, "_BLOCK", BLOCK)
        round_ = opened(nodes=nodes, adapter={"a": np.zeros_like(array), "b": np.zeros(1, np.float32)})
        whole, weight = np.zeros_like(array), 0.0
        for task, (factor, examples) in zip(round_.tasks(), clients, strict=True):
            update = pack_state({"a": array * np.float32(factor), "b": np.ones(1, np.float32)}, dtype)
            assert round_.receive(trained(task, update=update, examples=examples), 100.0) is Verdict.ACCEPTED
            whole = whole + np.float32(examples) * unpack_state(update)["a"]
            weight += examples
        result = round_.result()
    assert result is not None
    np.testing.assert_array_equal(result.update["a"], whole / weight, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "position", [0, keeping._BLOCK - 1, keeping._BLOCK, 2 * keeping._BLOCK, 2 * keeping._BLOCK + 6]
)
def test_a_value_that_is_not_finite_is_found_in_any_block(position: int, bad: float, dtype: DType) -> None:
    adapter = {"a": np.zeros((2 * keeping._BLOCK + 7, 1), np.float32)}
    round_ = opened(nodes=["ann", "bob"], adapter=adapter)
    ann, bob = round_.tasks()
    poisoned = adapter["a"].copy()
    poisoned[position] = bad
    reply = trained(ann, update=pack_state({"a": poisoned}, dtype))
    assert round_.receive(reply, now=100.0) is Verdict.INVALID
    assert "not finite" in round_.problems["ann"]
    assert round_.receive(trained(bob, update=pack_state({"a": adapter["a"] + 1}, dtype)), 100.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    np.testing.assert_array_equal(result.update["a"], 1.0)


def test_many_sealed_replies_take_less_memory_than_three() -> None:
    """In a process of its own; `benchmarks/aggregation.py` says what is counted."""
    script = Path(__file__).parents[2] / "benchmarks" / "aggregation.py"
    command = [sys.executable, str(script), "--clients", "20", "--megabytes", "10", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert (measured["clients"], round(measured["reply"] / 1e6)) == (20, 10)
    assert 1 < measured["ratio"] < 3  # the sum alone is one


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


def test_a_measurement_that_makes_no_mean_is_refused() -> None:
    round_ = EvaluationRound(plan(), "run", 1, ADAPTER, ["ann", "bob"], now=0.0)
    ann, bob = round_.tasks()
    assert round_.receive(Reply.to(ann, Evaluated(1, 2**40, 1e308, 1)), now=0.0) is Verdict.INVALID
    assert round_.problems == {"ann": "a loss of 1e+308 over 1099511627776 targets"}
    round_.receive(Reply.to(bob, Evaluated(1, 2, 1.0, 1)), now=0.0)
    score = round_.result()
    assert score is not None
    assert (score.loss, score.clients) == (1.0, ("bob",))


@pytest.mark.parametrize(
    ("cohort", "present", "expected"),
    [
        ("", 7, 7),
        ("size = 5", 7, 5),
        ("size = 5", 3, 3),
        ("fraction = 0.5", 7, 4),
        ("fraction = 0.1", 7, 1),
        ("fraction = 0.1\nminimum = 3", 7, 3),
        ("fraction = 0.1\nminimum = 3", 2, 2),
    ],
)
def test_the_size_of_a_cohort(cohort: str, present: int, expected: int) -> None:
    assert cohort_size(plan(f"[cohort]\n{cohort}\n"), present) == expected


def test_a_share_of_few_is_still_as_many_as_a_sum_takes() -> None:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    chosen = plans.parse(text + "[cohort]\nfraction = 0.1\n")
    assert chosen.protection.kind == "secagg"
    assert [cohort_size(chosen, present) for present in (2, 7, 100)] == [2, 3, 10]
    assert len(sample_cohort(chosen, 1, [f"n{i}" for i in range(7)])) == 3


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


@pytest.mark.parametrize(
    ("cohort", "present", "asked"),
    [
        ("size = 4\nover_selection = 0.5", 100, 6),
        ("size = 4\nover_selection = 0.1", 100, 5),
        ("size = 4\nover_selection = 0.5", 5, 5),
        ("size = 4\nover_selection = 0.5", 3, 3),
        ("size = 4\nover_selection = 4.0", 100, 20),
        ("fraction = 0.1\nover_selection = 0.25", 40, 5),
        ("size = 4", 100, 4),
    ],
)
def test_over_selection_asks_more(cohort: str, present: int, asked: int) -> None:
    chosen = plan(f"[cohort]\n{cohort}\n")
    nodes = [f"n{i:02d}" for i in range(present)]
    drawn = [sample_cohort(chosen, number, reversed(nodes)) for number in range(1, 30)]
    assert drawn == [sample_cohort(chosen, number, nodes) for number in range(1, 30)]
    assert all(len(one) == len(set(one)) == asked and set(one) <= set(nodes) for one in drawn)
    # With over-selection those who are asked last must not be the same ones each time.
    assert any(a > b for one in drawn for a, b in pairwise(one)) == (chosen.cohort.over_selection > 0)

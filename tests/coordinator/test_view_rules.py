"""Rules that see each update: what they get, what they make of factors by hand, and what a Plan says to them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from farfield.coordinator import aggregation, plans
from farfield.coordinator.aggregation import Combined, ViewRule
from farfield.coordinator.aggregation.flexlora import FlexLora
from farfield.coordinator.aggregation.hetlora import HetLora
from farfield.coordinator.asking import Verdict
from farfield.coordinator.releasing import Aggregate
from farfield.coordinator.rounds import TrainingRound
from farfield.emulator.factors import part
from farfield.protocols.errors import PlanError
from farfield.protocols.messages import Reply, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State, pack_state

A, B, HEAD = "block.q.lora_A.default.weight", "block.q.lora_B.default.weight", "score.weight"
D, K, RANK = 12, 10, 4
RANKS = {"ann": 4, "bob": 2, "cy": 1}

Matrix = NDArray[np.floating]


def plan(rule: str = "flexlora", tuning: str = "", extra: str = "") -> Plan:
    """Of rank 4, where clients may have 2 or 1."""
    return plans.parse(
        '[model]\nbackbone = "builtin:tiny-llama-py"\n'
        f'[tuning]\nkind = "lora"\nrank = 4\nalternatives = [{{rank = 2}}, {{rank = 1}}]\n{tuning}\n'
        f'[training]\nrounds = 3\nsteps = 1\n[aggregation]\nrule = "{rule}"\n{extra}'
    )


def drawn(seed: int, ranks: Mapping[str, int] = RANKS) -> tuple[State, dict[str, State]]:
    """An adapter, and by node an update of the first of its ranks."""
    rng = np.random.default_rng(seed)

    def like(rank: int) -> State:
        shapes = {A: (rank, K), B: (D, rank), HEAD: (3,)}
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return like(RANK), {node: like(rank) for node, rank in ranks.items()}


def trained(adapter: State, update: State) -> State:
    small = part(adapter, RANK, len(update[A]))
    return {name: small[name] + change for name, change in update.items()}


def product(state: Mapping[str, Matrix]) -> Matrix:
    return np.asarray(state[B].astype(np.float64) @ state[A].astype(np.float64))


def after(adapter: State, combined: Combined) -> State:
    assert {name: (one.shape, one.dtype) for name, one in combined.update.items()} == {
        name: (one.shape, one.dtype) for name, one in adapter.items()
    }
    return {name: adapter[name] + change for name, change in combined.update.items()}


WEIGHTS = {"ann": 1.0, "bob": 2.0, "cy": 5.0}


@pytest.mark.parametrize("seed", range(5))
def test_flexlora_is_the_best_adapter_of_its_rank(seed: int) -> None:
    """float32 factors of size 1: their products are exact to about 1e-6 of their size."""
    adapter, updates = drawn(seed)
    whole = np.asarray(sum(WEIGHTS[n] / 8 * product(trained(adapter, one)) for n, one in updates.items()))
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    combined = FlexLora(Aggregation()).combine(adapter, updates, WEIGHTS)
    new = after(adapter, combined)
    for rank in (4, 2, 1):
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(product(part(new, RANK, rank)), best, atol=1e-5 * values[0])
    assert combined.lost == pytest.approx((values[4:] ** 2).sum() / (values**2).sum(), rel=1e-5)
    assert float((values[4:] ** 2).sum()) > 1e-4
    np.testing.assert_allclose(
        new[HEAD], adapter[HEAD] + sum(WEIGHTS[n] / 8 * updates[n][HEAD] for n in RANKS), atol=1e-6
    )


def test_flexlora_is_exact_where_the_mean_is_not() -> None:
    """Two clients of rank 1 in an adapter of rank 2 that differ in both factors."""
    adapter, updates = drawn(1, {"ann": 2, "bob": 2})
    adapter = {name: np.zeros_like(array) for name, array in adapter.items()}
    updates["ann"][B][:, 1] = updates["bob"][B][:, 1] = 0
    whole = (product(updates["ann"]) + product(updates["bob"])) / 2
    combined = FlexLora(Aggregation()).combine(adapter, updates, {"ann": 1.0, "bob": 1.0})
    np.testing.assert_allclose(product(after(adapter, combined)), whole, atol=1e-5)
    assert combined.lost == pytest.approx(0.0, abs=1e-12)
    mean = {name: (updates["ann"][name] + updates["bob"][name]) / 2 for name in (A, B)}
    assert np.abs(product(mean) - whole).max() > 0.1


def test_flexlora_keeps_a_rank_that_nothing_is_left_for() -> None:
    """A client of rank 1 alone: the other ranks have no change, and keep an A from which B can grow."""
    adapter, updates = drawn(2, {"cy": 1})
    adapter[B] = np.zeros_like(adapter[B])
    new = after(adapter, FlexLora(Aggregation()).combine(adapter, updates, {"cy": 3.0}))
    np.testing.assert_allclose(product(new), product(trained(adapter, updates["cy"])), atol=1e-5)
    np.testing.assert_array_equal(new[B][:, 1:], 0.0)
    np.testing.assert_array_equal(new[A][1:], adapter[A][1:])


def test_flexlora_leaves_the_signs_as_they_were() -> None:
    """So that a server's momentum does not add what a change of sign did."""
    adapter, updates = drawn(3)
    first = after(adapter, FlexLora(Aggregation()).combine(adapter, updates, WEIGHTS))
    still = {"ann": {name: np.zeros_like(array) for name, array in first.items()}}
    for sign in (1, -1):
        turned = first | {A: sign * first[A], B: sign * first[B]}
        np.testing.assert_allclose(
            after(turned, FlexLora(Aggregation()).combine(turned, still, {"ann": 1.0}))[A], turned[A], atol=1e-5
        )


def test_hetlora_weighs_by_the_norm_of_the_product() -> None:
    adapter, updates = drawn(4)
    new = after(adapter, HetLora(Aggregation()).combine(adapter, updates, WEIGHTS))
    whole = {node: trained(adapter, one) for node, one in updates.items()}
    sizes = {node: WEIGHTS[node] * float(np.linalg.norm(product(one))) for node, one in whole.items()}
    expected_a, expected_b = np.zeros((RANK, K)), np.zeros((D, RANK))
    for node, one in whole.items():
        expected_a[: RANKS[node]] += sizes[node] / sum(sizes.values()) * one[A]
        expected_b[:, : RANKS[node]] += sizes[node] / sum(sizes.values()) * one[B]
    np.testing.assert_allclose(new[A], expected_a, atol=1e-5)
    np.testing.assert_allclose(new[B], expected_b, atol=1e-5)


def test_hetlora_leaves_alone_what_nobody_has() -> None:
    adapter, updates = drawn(5, {"bob": 2, "cy": 1})
    new = after(adapter, HetLora(Aggregation()).combine(adapter, updates, {"bob": 1.0, "cy": 1.0}))
    np.testing.assert_array_equal(new[A][2:], adapter[A][2:])
    np.testing.assert_array_equal(new[B][:, 2:], adapter[B][:, 2:])
    assert np.abs(new[A][:2] - adapter[A][:2]).max() > 0.1


def test_hetlora_of_clients_that_do_nothing_is_their_plain_mean() -> None:
    """All products are zero, so no norm says who counts more."""
    adapter, updates = drawn(6, {"ann": 4, "bob": 4})
    adapter[B] = np.zeros_like(adapter[B])
    for update in updates.values():
        update[B] = np.zeros_like(update[B])
    new = after(adapter, HetLora(Aggregation()).combine(adapter, updates, {"ann": 1.0, "bob": 3.0}))
    np.testing.assert_allclose(new[A], adapter[A] + (updates["ann"][A] + 3 * updates["bob"][A]) / 4, atol=1e-6)


# --- in a round -----------------------------------------------------------------------------------


def outcome(update: State, node: str) -> Trained:
    examples = int(WEIGHTS[node])
    return Trained(pack_state(update, "float32"), examples, 7 * examples, 2, 1.0 / (1 + examples))


def opened(adapter: State, rule: str = "flexlora", extra: str = "") -> TrainingRound:
    chosen = plan(rule, extra=extra)
    made = aggregation.registered()[rule](chosen.aggregation)
    assert isinstance(made, aggregation.SumRule | aggregation.ViewRule)
    return TrainingRound(chosen, "run", 1, adapter, list(RANKS), made, now=0.0)


def rounded(order: list[str], rule: str, seed: int = 7) -> Aggregate:
    adapter, updates = drawn(seed)
    round_ = opened(adapter, rule)
    tasks = {task.node: task for task in round_.tasks()}
    for node in order:
        assert round_.receive(Reply.to(tasks[node], outcome(updates[node], node)), 1.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    return result


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
@given(order=st.permutations(list(RANKS)))
def test_the_order_of_replies_changes_no_bit(rule: str, order: list[str]) -> None:
    one, other = rounded(sorted(RANKS), rule), rounded(order, rule)
    for name, change in one.update.items():
        np.testing.assert_array_equal(change, other.update[name], strict=True)
    told = [(x.loss, x.clients, x.examples, x.targets, x.steps, x.lost) for x in (one, other)]
    assert told[0] == told[1]
    assert told[0][1:5] == (("ann", "bob", "cy"), 8, 56, 6)


def test_a_round_gives_the_rule_the_weights_of_the_plan() -> None:
    adapter, updates = drawn(7)
    expected = FlexLora(Aggregation()).combine(adapter, updates, WEIGHTS)
    found = rounded(["bob", "cy", "ann"], "flexlora")
    for name, change in expected.update.items():
        np.testing.assert_array_equal(found.update[name], change)
    assert found.lost == expected.lost


def test_a_sum_takes_a_smaller_rank_as_no_change_of_the_others() -> None:
    adapter, updates = drawn(8)
    round_ = opened(adapter, "mean", '[protection]\nkind = "sealed"\n')
    for task in round_.tasks():
        assert round_.receive(Reply.to(task, outcome(updates[task.node], task.node)), 1.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    expected_a, expected_b = np.zeros((RANK, K)), np.zeros((D, RANK))
    for node, rank in RANKS.items():
        expected_a[:rank] += WEIGHTS[node] / 8 * updates[node][A]
        expected_b[:, :rank] += WEIGHTS[node] / 8 * updates[node][B]
    np.testing.assert_allclose(result.update[A], expected_a, atol=1e-5)
    np.testing.assert_allclose(result.update[B], expected_b, atol=1e-5)


@pytest.mark.parametrize("rule", ["flexlora", "mean"])
@pytest.mark.parametrize(
    ("ranks", "what"),
    [((3, 3), "a rank that nobody may have"), ((2, 1), "two ranks in one update"), ((5, 5), "more than there is")],
)
def test_other_shapes_are_refused(rule: str, ranks: tuple[int, int], what: str) -> None:
    adapter, updates = drawn(9)
    round_ = opened(adapter, rule, '[protection]\nkind = "sealed"\n')
    ann, *others = round_.tasks()
    odd = {A: np.ones((ranks[0], K), np.float32), B: np.ones((D, ranks[1]), np.float32), HEAD: updates["ann"][HEAD]}
    assert round_.receive(Reply.to(ann, outcome(odd, "ann")), 1.0) is Verdict.INVALID, what
    assert "differ from the adapter's" in round_.problems["ann"]
    for task in others:
        assert round_.receive(Reply.to(task, outcome(updates[task.node], task.node)), 1.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    assert result.clients == ("bob", "cy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e13])
def test_what_could_not_be_multiplied_is_refused(bad: float) -> None:
    adapter, updates = drawn(10)
    round_ = opened(adapter)
    ann, *_ = round_.tasks()
    updates["ann"][B][3, 1] = bad
    assert round_.receive(Reply.to(ann, outcome(updates["ann"], "ann")), 1.0) is Verdict.INVALID
    assert "not finite, or too large" in round_.problems["ann"]


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
def test_the_largest_values_that_are_taken_give_numbers(rule: str) -> None:
    adapter, updates = drawn(11)
    round_ = opened(adapter, rule)
    for task in round_.tasks():
        wild = {name: np.sign(array) * np.float32(1e12) for name, array in updates[task.node].items()}
        assert round_.receive(Reply.to(task, outcome(wild, task.node)), 1.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    assert all(np.isfinite(change).all() for change in result.update.values())


def test_too_few_views_come_to_nothing() -> None:
    adapter, updates = drawn(12)
    round_ = opened(adapter, extra="[cohort]\nminimum = 2\n")
    ann, *_ = round_.tasks()
    round_.receive(Reply.to(ann, outcome(updates["ann"], "ann")), 1.0)
    round_.tick(1e9)
    assert round_.result() is None


# --- in a Plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
def test_a_rule_that_sees_factors_gets_sealed_replies(rule: str) -> None:
    assert aggregation.traits()[rule].views
    assert issubclass(aggregation.registered()[rule], ViewRule)  # type: ignore[arg-type]
    assert plan(rule).protection.kind == "sealed"
    assert plan("mean").protection.kind == "secagg"
    with pytest.raises(PlanError, match='must see each update, and with kind = "secagg" nobody can'):
        plan(rule, extra='[protection]\nkind = "secagg"\n')


@pytest.mark.parametrize("key", ["freeze_a", "alternate", "local_b"])
def test_where_one_factor_is_averaged_there_is_nothing_to_combine(key: str) -> None:
    assert plan("mean").tuning.adapter_rank == RANK
    base = '[model]\nbackbone = "b"\n[training]\nrounds = 1\nsteps = 1\n[aggregation]\nrule = "flexlora"\n[tuning]\n'
    with pytest.raises(PlanError, match="rule = 'flexlora' combines LoRA's two factors, and this"):
        plans.parse(f'{base}kind = "lora"\n{key} = true\n')
    with pytest.raises(PlanError, match="'ia3' does not send both"):
        plans.parse(f'{base}kind = "ia3"\n')


def test_noise_for_a_sum_does_not_go_with_views() -> None:
    client = '[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n'
    base = '[model]\nbackbone = "b"\n[training]\nrounds = 1\nsteps = 1\n[tuning]\nkind = "lora"\n'
    uniform = 'weighting = "uniform"\n'
    with pytest.raises(PlanError, match=r"adds noise to a sum, and aggregation\.rule = 'flexlora' makes none"):
        plans.parse(f'{base}[aggregation]\nrule = "flexlora"\n{uniform}{client}')
    with pytest.raises(PlanError, match=r"leave other ranks out of tuning\.alternatives"):
        plan("mean", extra=f"{uniform}{client}")

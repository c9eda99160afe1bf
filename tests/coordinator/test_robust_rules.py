"""Rules against hostile clients: each against a plain reference, what all of them promise, and what a Plan must say."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import running
from numpy.typing import NDArray
from tiny import plan_text

from farfield.coordinator import aggregation, plans
from farfield.coordinator.aggregation import GroupRule, ViewRule
from farfield.coordinator.asking import Verdict
from farfield.coordinator.keeping import LARGEST_VIEWED
from farfield.coordinator.rounds import TrainingRound
from farfield.protocols.errors import PlanError, RunError
from farfield.protocols.messages import Reply, Trained
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State, pack_state

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 1, 2)}
SIZE = 21
GIVEN: dict[str, dict[str, Any]] = {"multi_krum": {"malicious": 2}, "trimmed_mean": {"malicious": 2}}
"""What a rule's section has besides its name, where it needs something."""

KNOWN = aggregation.traits()
VIEWS = sorted(name for name, rule in KNOWN.items() if rule.views and not rule.factors)
GROUPS = sorted(name for name, rule in KNOWN.items() if rule.groups)

Vector = NDArray[np.float64]


def drawn(seed: int, clients: int = 9, spread: float = 1.0) -> dict[str, State]:
    """Updates around a common one, by node, that nothing may write to."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=SIZE)
    return {f"n{k:02}": state_of(common + spread * rng.normal(size=SIZE)) for k in range(clients)}


def state_of(vector: Vector) -> State:
    state, at = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        state[name] = vector[at : at + size].reshape(shape).astype(np.float32)
        state[name].setflags(write=False)
        at += size
    return state


def flat(state: Mapping[str, NDArray[np.floating]]) -> Vector:
    return np.concatenate([state[name].reshape(-1).astype(np.float64) for name in SHAPES])


def rows(updates: Mapping[str, State]) -> Vector:
    return np.stack([flat(update) for update in updates.values()])


def combine(
    rule: str, updates: Mapping[str, State], weights: Mapping[str, float] | None = None, **given: Any
) -> Vector:
    """What the rule makes of the updates; by default with equal weights."""
    made = aggregation.registered()[rule](Aggregation(rule=rule, **{**GIVEN.get(rule, {}), **given}))
    if isinstance(made, GroupRule):
        combined = made.combine(list(updates.values()))
    else:
        assert isinstance(made, ViewRule)
        adapter = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        combined = made.combine(adapter, updates, weights or dict.fromkeys(updates, 1.0))
    assert {name: one.shape for name, one in combined.update.items()} == SHAPES
    assert {one.dtype for one in combined.update.values()} == {np.dtype(np.float32)}
    return flat(combined.update)


# --- each against its definition ------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "median_of_means"])
@pytest.mark.parametrize("clients", [3, 4, 9, 10])
def test_the_median(rule: str, clients: int) -> None:
    updates = drawn(1, clients)
    np.testing.assert_allclose(combine(rule, updates), np.median(rows(updates), axis=0), atol=1e-6)


@pytest.mark.parametrize(("clients", "malicious"), [(3, 1), (9, 2), (9, 4), (10, 3)])
def test_the_trimmed_mean(clients: int, malicious: int) -> None:
    updates = drawn(2, clients)
    expected = [np.mean(sorted(column)[malicious : clients - malicious]) for column in rows(updates).T]
    np.testing.assert_allclose(combine("trimmed_mean", updates, malicious=malicious), expected, atol=1e-6)


def krum_scores(points: Vector, malicious: int) -> list[float]:
    """s(i) = Σ ‖xᵢ - xⱼ‖² over the n - f - 2 nearest j ≠ i, by the letter."""
    scores = []
    for i, point in enumerate(points):
        apart = sorted(float(np.sum((point - other) ** 2)) for j, other in enumerate(points) if j != i)
        scores.append(sum(apart[: len(points) - malicious - 2]))
    return scores


@pytest.mark.parametrize(
    ("clients", "malicious", "kept"), [(9, 2, None), (9, 3, None), (9, 2, 1), (7, 2, 3), (12, 4, 5)]
)
def test_multi_krum(clients: int, malicious: int, kept: int | None) -> None:
    for seed in range(10):
        updates = drawn(seed, clients)
        points = rows(updates)
        best = np.argsort(krum_scores(points, malicious))[: kept or clients - malicious - 2]
        found = combine("multi_krum", updates, malicious=malicious, kept=kept)
        np.testing.assert_allclose(found, points[best].mean(axis=0), atol=1e-5)


def test_krum_finds_the_largest_cluster_among_distant_points() -> None:
    """Far from zero, where distances are small differences of large numbers."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        near = 1000 + 1e-3 * rng.normal(size=(5, SIZE))
        away = 1000 + 5e-3 * rng.normal(size=(2, SIZE))
        updates = {f"n{k}": state_of(point) for k, point in enumerate([*away, *near])}
        distances = np.linalg.norm(rows(updates) - combine("multi_krum", updates, malicious=2), axis=1)
        assert distances[2:].max() < distances[:2].min()


@pytest.mark.parametrize("rule", ["geometric_median", "geometric_median_of_means"])
@pytest.mark.parametrize("seed", range(5))
def test_at_the_geometric_median_unit_vectors_to_the_points_cancel(rule: str, seed: int) -> None:
    """The gradient of Σ ‖v - xₖ‖ is zero, and no point near by has a smaller sum."""
    updates = drawn(seed, 7)
    points, found = rows(updates), combine(rule, updates)
    apart = found - points
    lengths = np.linalg.norm(apart, axis=1, keepdims=True)
    assert np.linalg.norm((apart / lengths).sum(axis=0)) < 1e-4
    for step in 1e-2 * np.random.default_rng(seed).normal(size=(20, SIZE)):
        assert np.linalg.norm(found + step - points, axis=1).sum() > lengths.sum()


def test_the_geometric_median_weighs_as_the_weights_say() -> None:
    """Of two points that differ, any in between would do; with unequal weights it is the heavier one."""
    updates = drawn(4, 3)
    weights = dict(zip(updates, (1.0, 1.0, 3.0), strict=True))
    np.testing.assert_allclose(combine("geometric_median", updates, weights), rows(updates)[2], atol=1e-5)
    apart = combine("geometric_median", updates) - rows(updates)[2]
    assert np.linalg.norm(apart) > 0.1


def test_three_points_on_a_line_have_the_middle_one() -> None:
    points = {f"n{k}": state_of(np.full(SIZE, value)) for k, value in enumerate((0.0, 1.0, 50.0))}
    np.testing.assert_allclose(combine("geometric_median", points), 1.0, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"norm_multiple": 0.5}, {"norm_bound": 3.0}, {"norm_bound": 1e6}])
def test_the_norm_bound(given: dict[str, float]) -> None:
    updates = drawn(5, 5)
    weights = {node: 1.0 + k for k, node in enumerate(updates)}
    points = rows(updates)
    norms = [float(np.linalg.norm(point)) for point in points]
    bound = given.get("norm_bound", given.get("norm_multiple", 1.0) * sorted(norms)[2])
    clipped = [point * min(1.0, bound / norm) for point, norm in zip(points, norms, strict=True)]
    expected = sum(weight * point for weight, point in zip(weights.values(), clipped, strict=True)) / 15
    np.testing.assert_allclose(combine("norm_bound", updates, weights, **given), expected, atol=1e-6)


def test_where_most_do_nothing_nothing_longer_counts() -> None:
    still = {f"n{k}": state_of(np.zeros(SIZE)) for k in range(2)}
    np.testing.assert_array_equal(combine("norm_bound", still | {"n2": state_of(np.ones(SIZE))}), 0.0)
    half = combine("norm_bound", still | {"n2": state_of(np.ones(SIZE))}, norm_bound=1e3)
    np.testing.assert_allclose(half, 1 / 3, atol=1e-6)


# --- what all of them promise ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*VIEWS, *GROUPS])
@given(order=st.permutations(range(9)))
def test_who_is_who_plays_no_part(rule: str, order: Sequence[int]) -> None:
    updates = drawn(6)
    nodes = list(updates)
    other = {nodes[k]: updates[nodes[place]] for k, place in enumerate(order)}
    np.testing.assert_allclose(combine(rule, other), combine(rule, updates), atol=1e-5)


@pytest.mark.parametrize("rule", [*VIEWS, *GROUPS])
def test_of_equal_updates_it_makes_that_update(rule: str) -> None:
    (one,) = drawn(7, 1).values()
    for clients in (7, 8):
        found = combine(rule, {f"n{k}": one for k in range(clients)})
        np.testing.assert_allclose(found, flat(one), rtol=1e-5)


def within_hull(found: Vector, honest: Vector) -> bool:
    slack = 1e-5
    return bool(((found >= honest.min(axis=0) - slack) & (found <= honest.max(axis=0) + slack)).all())


def geometric_bound(found: Vector, honest: Vector) -> bool:
    """‖v - z‖ ≤ 2(1 - α)/(1 - 2α) · max ‖xₖ - z‖ over the honest, with α = 2/9 of the points hostile."""
    centre = honest.mean(axis=0)
    return bool(np.linalg.norm(found - centre) <= 2 * 7 / 5 * np.linalg.norm(honest - centre, axis=1).max())


def norm_within(found: Vector, honest: Vector) -> bool:
    """Two of nine move it by no more than their clipped length: that of the longest honest one, at most."""
    longest = np.linalg.norm(honest, axis=1).max()
    return bool(np.linalg.norm(found) <= longest * (1 + 1e-6))


BOUNDED: dict[str, Callable[[Vector, Vector], bool]] = {
    "geometric_median": geometric_bound,
    "geometric_median_of_means": geometric_bound,
    "norm_bound": norm_within,
}
"""How near to the honest updates a rule stays; where nothing stands, in each coordinate within them."""


@pytest.mark.parametrize("rule", [*VIEWS, *GROUPS])
@pytest.mark.parametrize("size", [10.0, 1e6, LARGEST_VIEWED])
def test_two_of_nine_move_it_no_further_than_the_honest_ones_reach(rule: str, size: float) -> None:
    """Wherever the two stand, together or apart; the mean is carried away."""
    for seed, (one, other) in itertools.product(range(3), [(0, 1), (3, 8)]):
        updates = drawn(seed)
        honest = np.delete(rows(updates), [one, other], axis=0)
        rng = np.random.default_rng(seed)
        nodes = list(updates)
        wild = size * rng.choice([-1.0, 1.0], size=SIZE)
        for pair in ((wild, wild), (wild, -wild)):
            updates |= {nodes[one]: state_of(pair[0]), nodes[other]: state_of(pair[1])}
            found = combine(rule, updates)
            assert BOUNDED.get(rule, within_hull)(found, honest), (rule, size, seed)
        updates |= {nodes[one]: state_of(wild), nodes[other]: state_of(wild)}
        assert not within_hull(rows(updates).mean(axis=0), honest)
        assert not geometric_bound(rows(updates).mean(axis=0), honest) or size == 10.0
        assert not norm_within(rows(updates).mean(axis=0), honest)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum", "median_of_means"])
def test_more_hostile_clients_than_it_is_for_do_carry_it_away(rule: str) -> None:
    """So that the test above cannot pass for nothing."""
    updates = drawn(8)
    honest = rows(updates)[5:]
    together = dict(zip(list(updates)[:5], itertools.repeat(state_of(np.full(SIZE, 1e3)))))
    assert not within_hull(combine(rule, updates | together), honest)


def test_a_claim_of_many_examples_wins_the_rules_that_weigh() -> None:
    """And no other: a hostile client's own word is its weight, unless the Plan says "uniform"."""
    updates = drawn(9) | {"n00": state_of(np.full(SIZE, 30.0))}
    weights = {node: 1e9 if node == "n00" else 10.0 for node in updates}
    honest = rows(updates)[1:]
    for rule in VIEWS:
        moved = not BOUNDED.get(rule, within_hull)(combine(rule, updates, weights), honest)
        assert moved == (rule == "geometric_median"), rule
        claimed = combine(rule, updates, weights)
        assert (np.abs(claimed - combine(rule, updates)).max() > 1e-3) == (not KNOWN[rule].asks.alike)


@pytest.mark.parametrize("rule", VIEWS)
def test_it_holds_no_second_copy_of_the_updates(rule: str) -> None:
    """A block of 2¹⁸ values a few times over, and the result; not the 24 MB of all updates."""
    rng = np.random.default_rng(10)
    updates = {f"n{k:02}": {"a": rng.normal(size=(150, 1000)).astype(np.float32)} for k in range(40)}
    made = aggregation.registered()[rule](Aggregation(**GIVEN.get(rule, {})))
    assert isinstance(made, ViewRule)
    tracemalloc.start()
    made.combine({}, updates, dict.fromkeys(updates, 1.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_tensor_larger_than_a_block_is_whole() -> None:
    rng = np.random.default_rng(11)
    updates = {f"n{k}": {"a": rng.normal(size=(3, 70_001)).astype(np.float32)} for k in range(5)}
    made = aggregation.registered()["median"](Aggregation())
    assert isinstance(made, ViewRule)
    found = made.combine({}, updates, dict.fromkeys(updates, 1.0)).update["a"]
    np.testing.assert_array_equal(found, np.median([one["a"] for one in updates.values()], axis=0))


@pytest.mark.parametrize(("rule", "fewest"), [("multi_krum", 7), ("trimmed_mean", 5)])
def test_of_too_few_updates_nothing_is_chosen(rule: str, fewest: int) -> None:
    combine(rule, drawn(12, fewest))
    with pytest.raises(RunError, match=f"{fewest - 1} updates, and the aggregation rule '{rule}' takes {fewest}"):
        combine(rule, drawn(12, fewest - 1))


# --- in a round and in a Plan ---------------------------------------------------------------------


def minimum(rule: str, fewest: int = 7) -> str:
    weighting = 'weighting = "uniform"\n' if KNOWN[rule].asks.alike else ""
    given = "".join(f"{key} = {value}\n" for key, value in GIVEN.get(rule, {}).items())
    return f'[aggregation]\nrule = "{rule}"\n{weighting}{given}[cohort]\nminimum = {fewest}\n'


@pytest.mark.parametrize("rule", VIEWS)
@pytest.mark.parametrize("order", [range(9), range(8, -1, -1)])
def test_a_round_comes_to_what_the_rule_makes_of_it(rule: str, order: range) -> None:
    updates = drawn(13)
    plan = plans.parse(plan_text() + minimum(rule))
    made = aggregation.registered()[rule](plan.aggregation)
    assert isinstance(made, ViewRule)
    adapter = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    round_ = TrainingRound(plan, "run", 1, adapter, list(updates), made, now=0.0)
    tasks = list(round_.tasks())
    for place in order:
        task = tasks[place]
        outcome = Trained(pack_state(updates[task.node], "float32"), 1 + int(task.node[1:]), 3, 1, 2.0)
        assert round_.receive(Reply.to(task, outcome), 1.0) is Verdict.ACCEPTED
    result = round_.result()
    assert result is not None
    counted = {node: 1.0 if KNOWN[rule].asks.alike else 1.0 + int(node[1:]) for node in updates}
    np.testing.assert_array_equal(flat(result.update), combine(rule, updates, counted))


def test_a_round_with_fewer_updates_than_the_rule_takes_comes_to_nothing() -> None:
    plan = plans.parse(plan_text() + minimum("median", 3))
    made = aggregation.registered()["median"](plan.aggregation)
    assert isinstance(made, ViewRule)
    updates = drawn(14, 3)
    round_ = TrainingRound(plan, "run", 1, updates["n00"], list(updates), made, now=0.0)
    first, second, _ = round_.tasks()
    for task in (first, second):
        round_.receive(Reply.to(task, Trained(pack_state(updates[task.node], "float32"), 1, 3, 1, 2.0)), 1.0)
    round_.tick(1e9)
    assert round_.result() is None


@pytest.mark.parametrize("rule", VIEWS)
def test_a_rule_that_sees_updates_has_sealed_replies(rule: str) -> None:
    plan = plans.parse(plan_text() + minimum(rule))
    assert plan.protection.kind == "sealed"
    with pytest.raises(PlanError, match="must see each update"):
        plans.parse(plan_text() + minimum(rule) + '[protection]\nkind = "secagg"\n')
    with pytest.raises(PlanError, match="adds noise to a sum"):
        uniform = (
            minimum(rule)
            if KNOWN[rule].asks.alike
            else minimum(rule).replace("[cohort]", 'weighting = "uniform"\n[cohort]')
        )
        plans.parse(f'{plan_text()}{uniform}[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n')


REFUSED = [
    ('rule = "median"', 3, "'median' counts every client alike, .* use aggregation.weighting = \"uniform\""),
    (
        'rule = "median"\nweighting = "uniform"',
        2,
        "'median' takes 3 updates or more .* cohort.minimum is 2: set it to 3",
    ),
    ('rule = "geometric_median"', 1, "'geometric_median' takes 3 updates or more"),
    ('rule = "norm_bound"', 2, "'norm_bound' takes 3 updates or more"),
    ('rule = "multi_krum"\nweighting = "uniform"', 9, "'multi_krum' needs aggregation.malicious"),
    ('rule = "trimmed_mean"\nweighting = "uniform"', 9, "'trimmed_mean' needs aggregation.malicious"),
    ('rule = "multi_krum"\nmalicious = 2\nweighting = "uniform"', 6, "takes 7 updates or more .* cohort.minimum is 6"),
    ('rule = "multi_krum"\nmalicious = 2\nkept = 4\nweighting = "uniform"', 7, "takes 8 updates or more"),
    ('rule = "trimmed_mean"\nmalicious = 2\nweighting = "uniform"', 4, "takes 5 updates or more"),
    ("malicious = 2", 9, "aggregation.malicious goes with rule = 'multi_krum' or 'trimmed_mean', .* 'mean'; leave it"),
    ('rule = "trimmed_mean"\nmalicious = 2\nkept = 1\nweighting = "uniform"', 9, "kept goes with rule = 'multi_krum',"),
    ('rule = "median"\nnorm_bound = 1.0\nweighting = "uniform"', 9, "norm_bound goes with rule = 'norm_bound',"),
    ('rule = "norm_bound"\ngroups = 3', 9, "groups goes with rule = 'geometric_median_of_means' or 'median_of_means'"),
    ('rule = "norm_bound"\nnorm_bound = 1.0\nnorm_multiple = 2.0', 9, "'norm_bound' or as 'norm_multiple', not both"),
    ('rule = "norm_bound"\nnorm_bound = 0.0', 9, "aggregation.norm_bound = 0.0"),
    ('rule = "multi_krum"\nmalicious = 0', 9, "aggregation.malicious = 0"),
]


@pytest.mark.parametrize(("section", "cohort", "reason"), REFUSED)
def test_a_plan_by_which_a_rule_could_not_do_its_work_is_refused(section: str, cohort: int, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plans.parse(f"{plan_text()}[aggregation]\n{section}\n[cohort]\nminimum = {cohort}\n")


def test_a_rule_that_holds_updates_against_each_other_wants_one_rank() -> None:
    mixed = plan_text(tuning={"alternatives": [{"rank": 1}]})
    with pytest.raises(PlanError, match="so they must have one rank"):
        plans.parse(mixed + minimum("median"))
    with pytest.raises(PlanError, match="so they must have one rank"):
        plans.parse(mixed + '[aggregation]\nrule = "median_of_means"\ngroups = 3\n')


@pytest.mark.parametrize(
    ("given", "fewest"),
    [
        ('rule = "norm_bound"\nnorm_bound = 1.0', 1),
        ('rule = "norm_bound"\nnorm_multiple = 2.0', 3),
        ('rule = "geometric_median"', 3),
        ('rule = "multi_krum"\nmalicious = 1\nkept = 2\nweighting = "uniform"', 5),
    ],
)
def test_what_is_just_enough_is_taken(given: str, fewest: int) -> None:
    plans.parse(f"{plan_text()}[aggregation]\n{given}\n[cohort]\nminimum = {fewest}\n")


def test_plan_check_names_the_rules_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(plan_text() + minimum("multi_krum"), encoding="utf-8")
    said = " ".join(running(monkeypatch, capsys, "plan", "check")(file).out.split())
    assert "aggregation multi_krum (malicious 2), weighted by uniform" in said

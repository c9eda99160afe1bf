"""ROC, the area under it and the true positives at few false ones, against counting by hand and for their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from farfield.protocols.audit.auc import auc
from farfield.protocols.audit.curves import hull, randomised_tpr_at_fpr, roc, tpr_at_fpr

few_values = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)


def area(members: list[float], others: list[float]) -> float:
    """By comparing each member with each other one."""
    return float(np.mean([(a > b) + (a == b) / 2 for a in members for b in others]))


@given(few_values, few_values)
def test_the_curve_counts_what_reaches_each_threshold(members: list[float], others: list[float]) -> None:
    curve = roc(members, others)
    for threshold, tp, fp in zip(curve.thresholds, curve.true_positives, curve.false_positives, strict=True):
        assert tp == sum(value >= threshold for value in members)
        assert fp == sum(value >= threshold for value in others)
    assert (curve.tpr[0], curve.fpr[0], curve.tpr[-1], curve.fpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(curve.thresholds) < 0).all()


@given(few_values, few_values)
def test_the_area_is_that_of_all_pairs_and_of_the_curve(members: list[float], others: list[float]) -> None:
    found, curve = auc(members, others), roc(members, others)
    assert found.value == pytest.approx(area(members, others), abs=1e-12)
    assert found.value == pytest.approx(np.trapezoid(curve.tpr, curve.fpr), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = auc(others, members)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_the_interval_is_delongs_where_that_is_wide() -> None:
    """Members of two kinds, one at chance and one far above, vary more than their number and area tell."""
    random = np.random.default_rng(3)
    members = np.append(random.normal(-3, 0.1, 200), random.normal(6, 0.1, 200))
    others = random.normal(0, 1, 5000)
    placed = (members[:, None] > others[None, :]).astype(float)
    variance = placed.mean(1).var(ddof=1) / len(members) + placed.mean(0).var(ddof=1) / len(others)
    found = auc(members, others)
    width = 1.959963984540054 * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((found.value - width, found.value + width), abs=1e-9)


def test_a_perfect_attack_on_few_leaves_room_for_doubt() -> None:
    small, large = auc([2.0] * 10, [1.0] * 10), auc([2.0] * 1000, [1.0] * 1000)
    assert small.value == small.high == large.value == 1
    assert small.low < 0.85 < 0.99 < large.low < 1


@pytest.mark.parametrize(("members", "others", "shift"), [(30, 30, 0.0), (20, 200, 1.0), (50, 50, 3.0)])
def test_intervals_of_the_area_cover_it(members: int, others: int, shift: float) -> None:
    random, truth, missed = np.random.default_rng(1), stats.norm.cdf(shift / math.sqrt(2)), 0
    for _ in range(400):
        found = auc(random.normal(shift, 1, members), random.normal(0, 1, others))
        missed += not found.low <= truth <= found.high
    assert missed <= stats.binom.ppf(0.999, 400, 0.05)


@given(few_values, few_values, st.sampled_from([0.05, 0.1, 0.25, 0.29, 0.5, 0.9]))
def test_true_positives_are_those_of_the_loosest_rule_that_is_strict_enough(
    members: list[float], others: list[float], fpr: float
) -> None:
    found = tpr_at_fpr(members, others, fpr)
    assert found.needed == math.ceil(round(1 / fpr, 9))
    if len(others) < found.needed:
        assert found.tpr is None and found.measured_fpr is None and found.threshold is None
        return
    curve = roc(members, others)
    allowed = curve.false_positives <= fpr * len(others) + 1e-9
    assert found.tpr is not None and found.measured_fpr is not None
    assert found.tpr.successes == curve.true_positives[allowed].max()
    assert found.measured_fpr.value <= fpr + 1e-12
    assert randomised_tpr_at_fpr(members, others, fpr) >= found.tpr.value - 1e-12


def test_too_few_non_members_give_no_number() -> None:
    members = np.arange(50) + 1000.0
    assert tpr_at_fpr(members, np.arange(999), 0.001).tpr is None
    found = tpr_at_fpr(members, np.arange(1000), 0.001)
    assert found.tpr is not None and found.tpr.value == 1 and found.needed == 1000
    assert found.threshold == 998
    assert found.tpr.low == pytest.approx(0.025 ** (1 / 50))


def test_a_share_that_is_a_whole_number_of_non_members_is_used_up() -> None:
    """0.29 · 100 is a little below 29 in floating point."""
    found = tpr_at_fpr([50.0], np.arange(100), 0.29)
    assert found.measured_fpr is not None and found.measured_fpr.successes == 29


def test_members_alike_to_the_non_members_at_the_threshold_are_not_counted() -> None:
    found = tpr_at_fpr([5.0] * 8, [5.0] * 90 + [1.0] * 10, 0.1)
    assert found.tpr is not None and found.tpr.value == 0
    assert found.measured_fpr is not None and found.measured_fpr.value == 0


def test_intervals_of_the_true_positives_cover_them_at_the_threshold() -> None:
    random, missed = np.random.default_rng(2), 0
    for _ in range(400):
        found = tpr_at_fpr(random.normal(1, 1, 100), random.normal(0, 1, 500), 0.01)
        assert found.tpr is not None and found.threshold is not None
        missed += not found.tpr.low <= stats.norm.sf(found.threshold - 1) <= found.tpr.high
    assert missed <= stats.binom.ppf(0.999, 400, 0.05)


@given(few_values, few_values)
def test_the_hull_is_concave_and_nowhere_below_the_curve(members: list[float], others: list[float]) -> None:
    curve, best = roc(members, others), hull(roc(members, others))
    assert {(x, y) for x, y in zip(best.fpr, best.tpr, strict=True)} <= set(zip(curve.fpr, curve.tpr, strict=True))
    x, y = np.diff(best.false_positives), np.diff(best.true_positives)
    assert (y[:-1] * x[1:] > y[1:] * x[:-1]).all()
    assert (np.interp(curve.fpr, best.fpr, best.tpr) >= curve.tpr - 1e-12).all()


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, float("nan")]])
def test_what_is_no_list_of_scores_is_refused(values: list[float]) -> None:
    for call in (roc, auc):
        with pytest.raises(ValueError, match="scores"):
            call(values, [1.0])
    with pytest.raises(ValueError, match="scores"):
        tpr_at_fpr([1.0], values, 0.01)


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1])
def test_a_rate_that_is_none_is_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="false positive rate"):
        tpr_at_fpr([1.0], [1.0], fpr)

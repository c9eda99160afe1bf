"""Exposure against counting ranks, and against what chance gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from farfield.protocols.audit.exposure import by_rank, by_sample, chance_of_all


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 9))
def test_exposure_is_what_the_rank_says(others: list[int], secret: int) -> None:
    above, equal = sum(one > secret for one in others), others.count(secret)
    found, space = by_rank(secret, others), len(others) + 1
    assert found.space == space and found.compared == len(others)
    assert found.high == pytest.approx(math.log2(space / (1 + above)))
    assert found.low == pytest.approx(math.log2(space / (1 + above + equal)))
    assert found.low <= found.value <= found.high <= found.maximum == math.log2(space)
    assert found.chance == pytest.approx((1 + above + equal) / space)


def test_the_likeliest_of_a_thousand_has_ten_bits_and_the_least_likely_none() -> None:
    assert by_rank(2000, np.arange(1023)).value == by_rank(2000, np.arange(1023)).maximum == 10
    assert by_rank(-1, np.arange(1023)).value == 0


def test_a_model_that_finds_all_equally_likely_knows_nothing() -> None:
    found = by_rank(0.0, np.zeros(1023))
    assert found.value == pytest.approx(1, abs=0.01)
    assert (found.low, found.chance) == (0, 1)


@given(st.integers(1, 500), st.data(), st.integers(501, 10**12), st.sampled_from([0.8, 0.95, 0.999]))
def test_a_sample_says_no_more_than_it_can(count: int, data: st.DataObject, space: int, confidence: float) -> None:
    above = data.draw(st.integers(0, count))
    found = by_sample(count - above - 0.5, np.arange(count), space, confidence)
    assert 0 <= found.low <= found.value <= found.high <= found.maximum == pytest.approx(math.log2(space))
    assert found.low <= found.resolution < math.log2(1 + count)
    if above == 0:
        assert found.low == found.resolution
        assert found.high == found.maximum
    nearer = by_sample(count, np.arange(count), space, confidence)
    assert nearer.low >= found.low and nearer.value >= found.value


def test_intervals_from_samples_cover_the_exposure_in_the_whole_space() -> None:
    random, missed = np.random.default_rng(1), 0
    space = random.normal(size=20_000)
    for _ in range(300):
        secret, *others = random.permutation(len(space))
        truth = by_rank(space[secret], space[others])
        found = by_sample(space[secret], space[random.choice(others, 200)], len(space))
        missed += not found.low <= truth.value <= found.high
    assert missed <= stats.binom.ppf(0.999, 300, 0.05)


def test_chance_of_unseen_secrets_is_no_smaller_than_it_says() -> None:
    random = np.random.default_rng(2)
    together = []
    for _ in range(400):
        together.append(chance_of_all(by_rank(random.random(), random.random(99)) for _ in range(5)))
    assert (np.array(together) < 0.05).sum() <= stats.binom.ppf(0.999, 400, 0.05)
    assert 0.4 < np.mean(together) < 0.65


def test_several_middling_ranks_are_unlikely_together() -> None:
    one = by_rank(90.5, np.arange(100))
    assert one.chance > 0.05
    assert chance_of_all([one]) == pytest.approx(one.chance)
    assert chance_of_all([one] * 6) < 0.01


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="scores"):
        by_rank(float("nan"), [1.0])
    with pytest.raises(ValueError, match="more than a space"):
        by_sample(1.0, [1.0, 2.0], 2)
    with pytest.raises(ValueError, match="no exposures"):
        chance_of_all([])
    with pytest.raises(ValueError, match="sample"):
        chance_of_all([by_sample(1.0, [1.0, 2.0], 100)])

"""Clopper–Pearson intervals against published ones, against the binomial itself, and for what must always hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from farfield.protocols.audit.intervals import lower_limit, proportion, upper_limit, upper_limits

trials = st.integers(1, 2000)
errors = st.floats(1e-6, 0.4)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 5."""
    found = proportion(successes, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == successes / count


@given(trials, st.data(), errors)
def test_limits_are_where_the_binomial_tail_has_the_error(count: int, data: st.DataObject, error: float) -> None:
    successes = data.draw(st.integers(0, count))
    low, high = lower_limit(successes, count, error), upper_limit(successes, count, error)
    if successes:
        assert stats.binom.sf(successes - 1, count, low) == pytest.approx(error, rel=1e-6)
    else:
        assert low == 0
    if successes < count:
        assert stats.binom.cdf(successes, count, high) == pytest.approx(error, rel=1e-6)
    else:
        assert high == 1
    assert low <= successes / count <= high


@given(trials, st.data(), errors)
def test_more_successes_raise_both_limits(count: int, data: st.DataObject, error: float) -> None:
    successes = data.draw(st.integers(1, count))
    assert lower_limit(successes, count, error) > lower_limit(successes - 1, count, error)
    assert upper_limit(successes, count, error) > upper_limit(successes - 1, count, error)


def test_many_limits_are_the_single_ones() -> None:
    counts = np.arange(31)
    assert upper_limits(counts, 30, 0.025).tolist() == pytest.approx([upper_limit(k, 30, 0.025) for k in range(31)])


@pytest.mark.parametrize(("successes", "count", "confidence"), [(1, 0, 0.9), (3, 2, 0.9), (-1, 2, 0.9), (1, 2, 1.0)])
def test_what_is_no_proportion_is_refused(successes: int, count: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"successes in|confidence"):
        proportion(successes, count, confidence)

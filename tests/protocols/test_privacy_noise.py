"""Noise against its distribution: exact tables, chi-square and Kolmogorov–Smirnov tests that do fail on wrong noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from farfield.protocols.privacy import noise
from farfield.protocols.privacy.noise import (
    WIDE_SIGMA,
    discrete_gaussian,
    skellam,
    skellam_tail,
    wide_gaussian,
)
from farfield.protocols.privacy.sampler import Sampler, Table
from farfield.protocols.randomness import Randomness

Draws = NDArray[np.int64]
SURE = 1e-4  # with fixed keys a test passes or fails for good; this is how unlikely a failure of good noise was


def random(label: int = 0) -> Randomness:
    return Randomness(label.to_bytes(32, "big"))


def likelihood(drawn: Draws, pmf: Callable[[Draws], NDArray[np.float64]]) -> float:
    """The p-value of a chi-square test: every value that is expected ten times or more, and the rest."""
    reach = int(np.abs(drawn).max()) + 1
    values = np.arange(-reach, reach + 1)
    expected = pmf(values) * len(drawn)
    found = np.bincount(drawn + reach, minlength=len(values))
    common = expected >= 10
    expected = np.append(expected[common], max(len(drawn) - expected[common].sum(), 1e-9))
    found = np.append(found[common], len(drawn) - found[common].sum())
    statistic = float(((found - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


def skellam_pmf(variance: float) -> Callable[[Draws], NDArray[np.float64]]:
    return lambda values: np.asarray(special.ive(np.abs(values), variance))


def gaussian_pmf(sigma: float) -> Callable[[Draws], NDArray[np.float64]]:
    support = np.arange(-40 * int(sigma + 1), 40 * int(sigma + 1) + 1)
    total = np.exp(-0.5 * (support / sigma) ** 2).sum()
    return lambda values: np.asarray(np.exp(-0.5 * (values / sigma) ** 2) / total)


weights = st.lists(st.integers(0, 2**40) | st.integers(0, 3), min_size=1, max_size=200).filter(any)


def exact_quotas(parts: list[int]) -> NDArray[np.uint64]:
    """The parts in proportion, as whole numbers that sum to 2⁶³."""
    quotas = [(part << 63) // sum(parts) for part in parts]
    quotas[quotas.index(max(quotas))] += (1 << 63) - sum(quotas)
    return np.array(quotas, np.uint64)


@given(weights)
def test_a_table_holds_exactly_what_was_asked_for(parts: list[int]) -> None:
    quotas = exact_quotas(parts)
    found = Table(quotas).quotas()
    assert found[: len(quotas)] == quotas.tolist()
    assert not any(found[len(quotas) :])


@given(st.sampled_from([1, 2, 3, 4, 64, 100, 128]))
def test_equal_weights_need_no_alias(count: int) -> None:
    quotas = exact_quotas([1] * count)
    assert Table(quotas).quotas()[:count] == quotas.tolist()


def test_a_table_draws_what_it_holds() -> None:
    parts = [5, 0, 1, 30, 0, 12, 7]
    drawn = Table(exact_quotas(parts)).draw(200_000, random())
    found = np.bincount(drawn, minlength=len(parts))
    kept = np.flatnonzero(parts)
    assert set(np.flatnonzero(found)) == set(kept)
    assert stats.chisquare(found[kept], np.array(parts)[kept] / sum(parts) * 200_000).pvalue > SURE


@pytest.mark.parametrize("variance", [0.05, 1.0, 900.0, 2.5e5, 2.0**32])
def test_a_sampler_meets_the_tails_as_exactly_as_the_middle(variance: float) -> None:
    half = noise._skellam_half(variance)
    sampler = Sampler(half)
    edge = sampler._edge
    middle = np.array(sampler._middle.quotas(), np.float64)[: 2 * edge + 2] * 2.0**-63
    np.testing.assert_allclose(middle[edge : 2 * edge + 1], half[: edge + 1], rtol=1e-6)
    np.testing.assert_array_equal(middle[:edge], middle[2 * edge : edge : -1])
    assert middle[-1] == pytest.approx(2 * half[edge + 1 :].sum(), rel=1e-5)
    assert middle[-1] <= 2.0**-24
    assert sampler._tail is not None
    tail = np.array(sampler._tail.quotas(), np.float64)[: len(half) - edge - 1] * 2.0**-63 * middle[-1]
    np.testing.assert_allclose(tail, half[edge + 1 :], rtol=1e-5, atol=2.0**-87)


@pytest.mark.parametrize("variance", [0.02, 1.0, 30.0, 2500.0])
def test_skellam_noise_has_its_distribution(variance: float) -> None:
    assert likelihood(skellam(300_000, variance, random(1)), skellam_pmf(variance)) > SURE


@pytest.mark.parametrize("sigma", [0.1, 0.7, 5.0, 60.0])
def test_discrete_gaussian_noise_has_its_distribution(sigma: float) -> None:
    assert likelihood(discrete_gaussian(300_000, sigma, random(2)), gaussian_pmf(sigma)) > SURE


def test_the_sum_of_shares_is_noise_of_the_whole() -> None:
    total = sum((skellam(300_000, 100.0, random(3 + share)) for share in range(7)), np.zeros(300_000, np.int64))
    assert likelihood(total, skellam_pmf(700.0)) > SURE


def test_wide_noise_is_a_gaussian_down_to_its_last_bits() -> None:
    drawn = wide_gaussian(300_000, random(4))
    assert stats.kstest(drawn / WIDE_SIGMA, "norm").pvalue > SURE
    assert stats.chisquare(np.bincount(drawn & 1023, minlength=1024)).pvalue > SURE
    assert stats.chisquare(np.bincount((drawn >> 12) & 1023, minlength=1024)).pvalue > SURE


def test_weaker_noise_is_noticed() -> None:
    """Half the noise, a tenth less of it, a bias of a twentieth of its deviation, or one share left out: all fail."""
    drawn = skellam(300_000, 900.0, random(5))
    assert likelihood(skellam(300_000, 225.0, random(5)), skellam_pmf(900.0)) < 1e-12
    assert likelihood(skellam(300_000, 729.0, random(5)), skellam_pmf(900.0)) < 1e-12
    assert likelihood(drawn // 2, skellam_pmf(900.0)) < 1e-12
    assert likelihood(drawn + 2, skellam_pmf(900.0)) < 1e-12
    assert (
        likelihood(sum((skellam(300_000, 100.0, random(share)) for share in range(8)), drawn * 0), skellam_pmf(900.0))
        < 1e-12
    )
    assert stats.kstest(wide_gaussian(300_000, random(6)) / WIDE_SIGMA * 0.98, "norm").pvalue < 1e-4


def test_values_are_independent_of_their_neighbours() -> None:
    drawn = skellam(300_000, 900.0, random(7)).astype(np.float64)
    for lag in (1, 2, 1 << 15):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4 / np.sqrt(len(drawn) - lag)


@pytest.mark.parametrize("variance", [1000.0, 12_345.6, 3e4])
def test_large_variances_agree_with_scipy_where_scipy_is_exact(variance: float) -> None:
    half = noise._skellam_half(variance)
    np.testing.assert_allclose(half, special.ive(np.arange(len(half)), variance), rtol=5e-13)


@pytest.mark.parametrize("variance", [1000.0, 1e7, 2.0**32])
def test_probabilities_sum_to_one_and_have_the_variance(variance: float) -> None:
    half = noise._skellam_half(variance)
    steps = np.arange(len(half))
    assert half[0] + 2 * half[1:].sum() == pytest.approx(1, abs=1e-12)
    assert 2 * (half * steps**2.0).sum() == pytest.approx(variance, rel=1e-11)


@given(st.floats(0.01, 1e8), st.floats(1, 100))
def test_the_tail_bound_bounds_the_tail(variance: float, bits: float) -> None:
    beyond = skellam_tail(variance, bits)
    if variance < 1000 or bits < 40:
        assert 2 * stats.skellam.sf(beyond, variance / 2, variance / 2) <= 2.0**-bits * (1 + 1e-6)
    deviations = beyond / np.sqrt(variance)
    assert deviations <= np.sqrt(2 * np.log(2) * (bits + 1)) * (1 + 40 / np.sqrt(variance)) + 100 / np.sqrt(variance)


def test_noise_repeats_with_its_key_and_never_without() -> None:
    assert (skellam(1000, 50.0, random(8)) == skellam(1000, 50.0, random(8))).all()
    assert (skellam(1000, 50.0, Randomness()) != skellam(1000, 50.0, Randomness())).any()
    assert len(skellam(0, 50.0, random())) == 0


@pytest.mark.parametrize("variance", [0.0, -1.0, 2.0**33, float("nan")])
def test_a_variance_that_no_table_holds_is_refused(variance: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        skellam(1, variance, random())

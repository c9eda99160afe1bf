"""Bounds from many releases: below the true ε as often as they promise, and above a claim that is false."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from farfield.protocols.audit import gaussian_dp
from farfield.protocols.audit.noise import compare_noise
from farfield.protocols.audit.releases import Claim, at_threshold, audit, lower_epsilon, lower_mu

CLAIMS: tuple[Claim, ...] = ("(ε, δ)-DP", "Gaussian DP")
DELTA, NOISE_MULTIPLIER, RELEASES = 1e-5, 1.0, 2000
EPSILON = gaussian_dp.epsilon(1 / NOISE_MULTIPLIER, DELTA)


def releases(seed: int, noise: float = NOISE_MULTIPLIER) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the Gaussian mechanism, with a canary that changes the sum by 1, and without."""
    random = np.random.default_rng(seed)
    return random.normal(1, noise, RELEASES), random.normal(0, noise, RELEASES)


@pytest.mark.parametrize(("claim", "least"), [("(ε, δ)-DP", 0.25), ("Gaussian DP", 0.75)])
def test_a_hundred_bounds_exceed_the_true_epsilon_no_oftener_than_promised(claim: Claim, least: float) -> None:
    bounds = [audit(*releases(seed), delta=DELTA, claim=claim).epsilon for seed in range(100)]
    assert sum(bound > EPSILON for bound in bounds) <= stats.binom.ppf(0.99, 100, 0.05)
    assert np.median(bounds) > least * EPSILON


def test_randomised_response_is_bound_sharply_and_rightly() -> None:
    """For the claim that assumes nothing: (ε, 0)-DP, and nothing tighter."""
    bounds, epsilon = [], 1.0
    for seed in range(100):
        random = np.random.default_rng(seed)
        right = random.random((2, RELEASES)) < 1 / (1 + math.exp(-epsilon))
        bounds.append(audit(right[0], ~right[1], delta=1e-12).epsilon)
    assert sum(bound > epsilon for bound in bounds) <= stats.binom.ppf(0.99, 100, 0.05)
    assert np.median(bounds) > 0.8 * epsilon


def test_half_the_noise_is_caught() -> None:
    """By the bound, which is above the claim, and by the size of the noise."""
    for seed in range(20):
        found = audit(*releases(seed, NOISE_MULTIPLIER / 2), delta=DELTA, claim="Gaussian DP")
        assert found.epsilon > EPSILON
        noise = compare_noise(releases(seed, NOISE_MULTIPLIER / 2)[1], NOISE_MULTIPLIER)
        assert noise.refused and noise.too_small
        assert noise.deviation.high < NOISE_MULTIPLIER


def test_a_threshold_chosen_where_it_is_measured_would_promise_too_much() -> None:
    """What the split is for: of many events on noise alone, the best always looks like a leak."""
    honest, greedy = 0, 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        inside, outside = random.normal(size=60), random.normal(size=60)
        honest += audit(inside, outside, delta=DELTA, claim="Gaussian DP").epsilon > 0
        every = np.append(inside, outside)
        greedy += any(at_threshold(inside, outside, t, delta=DELTA, claim="Gaussian DP").epsilon > 0 for t in every)
    assert honest <= stats.binom.ppf(0.99, 100, 0.05)
    assert greedy > honest


@pytest.mark.parametrize("claim", CLAIMS)
def test_releases_that_are_apart_reach_the_ceiling(claim: Claim) -> None:
    found = audit(np.arange(200) + 1000, np.arange(200), delta=DELTA, claim=claim)
    assert found.epsilon == found.ceiling > 3
    assert (found.false_positives.trials, found.false_negatives.trials) == (100, 100)
    error = 1 - 0.025 ** (1 / 100)
    if claim == "Gaussian DP":
        assert found.mu == pytest.approx(2 * stats.norm.isf(error))
    else:
        assert found.epsilon == pytest.approx(math.log((1 - error - DELTA) / error))


@pytest.mark.parametrize("claim", CLAIMS)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.lists(st.integers(0, 5), min_size=2, max_size=80))
def test_a_bound_is_never_above_its_ceiling(claim: Claim, inside: list[int], outside: list[int]) -> None:
    found = audit(inside, outside, delta=DELTA, claim=claim)
    assert 0 <= found.epsilon <= found.ceiling
    assert found.false_positives.trials == len(outside) // 2
    assert found.false_positives.successes == sum(value >= found.threshold for value in outside[1::2])
    assert found.false_negatives.successes == sum(value < found.threshold for value in inside[1::2])


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(1e-9, 0.1))
def test_bounds_fit_what_they_refute(a: float, b: float, delta: float) -> None:
    """Error rates on the trade-off curve of a mechanism give its own ε or μ, and worse ones give less."""
    epsilon, mu = lower_epsilon(a, b, delta), lower_mu(a, b)
    if epsilon > 0:
        edge = max(1 - delta - math.exp(epsilon) * a, math.exp(-epsilon) * (1 - delta - a))
        assert edge == pytest.approx(b, abs=1e-9)
    if mu > 0:
        assert stats.norm.cdf(stats.norm.isf(a) - mu) == pytest.approx(b, abs=1e-9)
    assert (mu > 0) == (a + b < 1 - 1e-12) or a + b == pytest.approx(1)
    assert lower_epsilon(a * 1.01, b, delta) <= epsilon and lower_mu(a, min(1.0, b * 1.01)) <= mu


@pytest.mark.parametrize("claim", CLAIMS)
def test_at_chance_the_bound_is_nothing(claim: Claim) -> None:
    """Also where the limits of both error rates are above one half, which must not be read the other way round."""
    random = np.random.default_rng(4)
    found = at_threshold(random.normal(size=50), random.normal(size=50), 0.0, delta=DELTA, claim=claim)
    assert found.false_positives.high + found.false_negatives.high > 1
    assert found.epsilon == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        audit([1.0], [1.0, 2.0], delta=DELTA)
    with pytest.raises(ValueError, match="δ"):
        audit([1.0, 2.0], [1.0, 2.0], delta=0.0, claim="Gaussian DP")
    with pytest.raises(ValueError, match="scores"):
        audit([1.0, float("nan")], [1.0, 2.0], delta=DELTA)

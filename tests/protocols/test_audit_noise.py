"""The tests of noise: they refuse good noise as rarely as they promise, and bad noise surely."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from farfield.protocols.audit.noise import compare_noise
from farfield.protocols.privacy.noise import WIDE_SIGMA, skellam, wide_gaussian
from farfield.protocols.randomness import Randomness


def test_good_noise_is_refused_as_rarely_as_promised() -> None:
    found = [compare_noise(np.random.default_rng(seed).normal(0, 3, 200), 3.0) for seed in range(400)]
    assert 3 <= sum(one.refused for one in found) <= stats.binom.ppf(0.999, 400, 0.05)
    assert sum(not one.deviation.low <= 3 <= one.deviation.high for one in found) <= stats.binom.ppf(0.999, 400, 0.05)
    assert sum(one.too_small for one in found) <= stats.binom.ppf(0.999, 400, 0.0125)
    for p in ([one.size_p for one in found], [one.shape_p for one in found]):
        assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_the_interval_is_the_chi_square_one() -> None:
    noise = np.random.default_rng(0).normal(0, 2, 50)
    found, squares = compare_noise(noise, 2.0), float(np.square(noise).sum())
    low, high = (math.sqrt(squares / stats.chi2.ppf(tail, 50)) for tail in (0.975, 0.025))
    assert (found.deviation.low, found.deviation.high) == pytest.approx((low, high))
    assert found.deviation.value == pytest.approx(math.sqrt(squares / 50))
    both = 2 * min(stats.chi2.cdf(squares / 4, 50), stats.chi2.sf(squares / 4, 50))
    assert found.size_p == pytest.approx(both)


@pytest.mark.parametrize(("factor", "too_small"), [(0.5, True), (0.95, True), (1.05, False), (2.0, False)])
def test_noise_of_another_size_is_refused_for_its_size(factor: float, too_small: bool) -> None:
    found = compare_noise(np.random.default_rng(1).normal(0, factor, 5000), 1.0)
    assert found.refused and found.too_small == too_small
    assert found.size_p < 1e-3 < found.shape_p


@pytest.mark.parametrize(
    "wrong",
    [
        lambda random, n: random.laplace(0, math.sqrt(0.5), n),
        lambda random, n: random.uniform(-math.sqrt(3), math.sqrt(3), n),
        lambda random, n: np.where(random.random(n) < 0.9, 0.5, 2.7838) * random.normal(size=n),
        lambda random, n: np.round(random.normal(size=n)),
    ],
    ids=["Laplace", "uniform", "mixture", "grid"],
)
def test_noise_of_another_shape_is_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    found = compare_noise(wrong(np.random.default_rng(2), 3000), 1.0)
    assert found.refused
    assert found.shape_p < 1e-3


def test_noise_whose_mean_is_not_zero_has_not_the_size() -> None:
    assert compare_noise(np.random.default_rng(3).normal(0.3, 1, 3000), 1.0).refused


def test_our_own_noise_is_as_claimed() -> None:
    wide = wide_gaussian(100_000, Randomness(bytes(32)))
    assert not compare_noise(wide, WIDE_SIGMA, 0.999).refused
    assert compare_noise(wide, WIDE_SIGMA * 1.02, 0.999).too_small
    assert not compare_noise(skellam(5000, 256.0**2, Randomness(bytes(32))), 256.0, 0.999).refused


def test_extremes_have_a_p_value_too() -> None:
    """The published approximation of A² would turn round far out."""
    far = np.append(np.random.default_rng(4).normal(size=5000) * 1e-6, 1.0)
    assert compare_noise(far, 1.0).shape_p < 1e-100
    assert compare_noise(np.full(10, 2.0), 2.0).shape_p == 0


@pytest.mark.parametrize(
    ("values", "claimed"), [([1.0] * 7, 1.0), ([math.inf] * 10, 1.0), ([1.0] * 10, 0.0), ([1.0] * 10, math.inf)]
)
def test_what_cannot_be_tested_is_refused(values: list[float], claimed: float) -> None:
    with pytest.raises(ValueError, match="tested"):
        compare_noise(values, claimed)

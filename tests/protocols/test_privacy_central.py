"""Gaussian noise on a sum: as much as was asked for, on a grid that the data do not move."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy.central import deviation, noised, rounding_slack, summing_slack
from farfield.protocols.privacy.noise import WIDE_SIGMA
from farfield.protocols.randomness import Randomness

KEY = bytes(range(32))


def test_the_noise_is_the_multiplier_times_the_bound() -> None:
    sums = {"a": np.full((300, 200), 7.0), "b": np.linspace(-1, 1, 40_000)}
    noisy = noised(sums, 0.5, 3.0, Randomness(KEY))
    for name, values in sums.items():
        assert noisy[name].shape == values.shape and noisy[name].dtype == np.float64
        noise = (noisy[name] - values).ravel()
        assert stats.kstest(noise / 1.5, "norm").pvalue > 1e-4
        assert stats.kstest(noise / 0.75, "norm").pvalue < 1e-12


def test_what_comes_out_is_on_a_grid_that_no_data_decide() -> None:
    step = deviation(1000, 1.0, 2.0) / WIDE_SIGMA
    for scale in (1e-9, 1.0, 1e3):
        values = np.random.default_rng(0).standard_normal(1000) * scale
        steps = noised({"a": values}, 1.0, 2.0, Randomness(KEY))["a"] / step
        np.testing.assert_allclose(steps, np.rint(steps), rtol=1e-15, atol=1e-3)


def test_slack_and_the_grid_are_paid_for() -> None:
    assert deviation(1, 1.0, 2.0) == pytest.approx(2.0, rel=1e-6)
    assert deviation(1, 1.0, 2.0) > 2.0
    assert deviation(1, 1.0, 2.0, slack=0.5) == pytest.approx(3.0, rel=1e-6)
    size = 10_000_000
    std = deviation(size, 1.0, 2.0)
    assert std == pytest.approx(2.0 * (1 + size**0.5 * std / WIDE_SIGMA))  # z·(bound + step·√d)
    assert std < 2.0 * 1.001
    assert rounding_slack({"a": 9, "b": 16}, {"a": 1.0, "b": 0.5}) == pytest.approx(13**0.5)
    assert summing_slack(100, 1.0) < 1e-11 < summing_slack(100, 1.0, 2.0**-24)


def test_summing_slack_covers_what_summing_does() -> None:
    values = np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    total = np.zeros(1000, np.float32)
    for value in values:
        total += value
    off = float(np.linalg.norm(total - values.astype(np.float64).sum(0)))
    assert 0 < off <= summing_slack(64, 1.0, 2.0**-24) / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_sum_that_no_grid_holds_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="no grid holds it"):
        noised({"a": np.array([0.0, bad])}, 1.0, 1.0, Randomness(KEY))


def test_noise_too_strong_for_the_grid_is_refused() -> None:
    with pytest.raises(PrivacyError, match="too many for one release"):
        deviation(10_000_000, 1.0, 10_000.0)


def test_noise_without_a_key_never_repeats() -> None:
    sums = {"a": np.zeros(10)}
    assert (noised(sums, 1.0, 1.0, Randomness())["a"] != noised(sums, 1.0, 1.0, Randomness())["a"]).all()

"""ε against published values, against dp-accounting and Opacus, and against the divergence itself."""

from __future__ import annotations

import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive, logsumexp

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy.accounting import (
    Gaussian,
    Release,
    SampledGaussian,
    Skellam,
    noise_multiplier,
    spent,
)

DELTA = 1e-5


def test_published_values() -> None:
    """q = 0.01, σ = 0.8, T = 1000: 3.14 by PLD, 3.70 by RDP. Full participation, σ = 8, T = 100: 5.68."""
    sampled = spent({SampledGaussian(0.8, 0.01): 1000}, DELTA)
    assert sampled.epsilon == sampled.epsilon_pld == pytest.approx(3.14, abs=0.005)
    assert sampled.epsilon_rdp == pytest.approx(3.70, abs=0.005)
    assert sampled.accountant.startswith("PLD (dp-accounting ")
    assert spent({Gaussian(8.0): 100}, DELTA).epsilon == pytest.approx(5.68, abs=0.005)


@pytest.mark.parametrize(
    ("release", "count"),
    [(SampledGaussian(1.1, 0.004), 2000), (SampledGaussian(0.6, 0.1), 50), (Gaussian(3.0), 7), (Gaussian(40.0), 1)],
)
def test_it_is_what_dp_accounting_says(release: Release, count: int) -> None:
    event = dp_accounting.SelfComposedDpEvent(release.event(), count)
    found = spent({release: count}, DELTA)
    assert found.epsilon_pld == pytest.approx(PLDAccountant().compose(event).get_epsilon(DELTA), rel=2e-3)
    assert found.epsilon_rdp == pytest.approx(RdpAccountant().compose(event).get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.01, 1000), (1.2, 0.05, 200), (2.0, 0.3, 30)])
def test_it_is_near_what_opacus_says(noise: float, rate: float, steps: int) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    found = spent({SampledGaussian(noise, rate): steps}, DELTA)
    assert found.epsilon_rdp == pytest.approx(accountant.get_epsilon(DELTA), rel=0.01)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """ε of one Gaussian release, in closed form (Balle and Wang 2018, thm 8)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - np.exp(epsilon + norm.logcdf(-a - b)) - delta)

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (8.0, 100), (5.0, 3)])
def test_gaussians_are_as_the_closed_form_says(noise: float, count: int) -> None:
    assert spent({Gaussian(noise): count}, DELTA).epsilon == pytest.approx(
        gaussian_epsilon(noise / count**0.5, DELTA), abs=1e-3
    )


@pytest.mark.parametrize("bound", [1, 2, 5, 30])
@pytest.mark.parametrize("noise", [0.4, 1.0, 4.0])
def test_the_skellam_bound_holds_against_the_divergence_itself(bound: int, noise: float) -> None:
    """D_α of Skellam noise moved by a vector of the norm `bound`: all in one value, and spread over bound² ones."""
    variance = (noise * bound) ** 2
    reach = int(60 * variance**0.5 + 60 * bound + 200)
    values = np.arange(-reach, reach + 1)
    with np.errstate(divide="ignore"):
        log_pmf = np.log(ive(np.abs(values), variance))

    def divergence(shift: int, order: float) -> float:
        p, q = log_pmf[shift:], log_pmf[: len(log_pmf) - shift]
        known = np.isfinite(p) & np.isfinite(q)
        return float(logsumexp(order * p[known] - (order - 1) * q[known]) / (order - 1))

    for order in (2.0, 3.0, 8.0, 20.0):
        allowed = float(Skellam(noise, bound).rdp(np.array([order]))[0])
        assert divergence(bound, order) <= allowed * (1 + 1e-9)
        assert bound**2 * divergence(1, order) <= allowed * (1 + 1e-9)
        assert order / (2 * noise**2) <= allowed
        if bound == 30 and noise >= 1:
            assert divergence(bound, order) >= allowed * 0.9  # no bound that holds because it is far off


def test_the_skellam_bound_is_the_published_one() -> None:
    """α·Δ₂² / 2μ + min(((2α − 1)·Δ₂² + 6·Δ₁) / 4μ², 3·Δ₁ / 2μ), worked out by hand for Δ₁ = Δ₂² = 100."""
    np.testing.assert_allclose(Skellam(1.0, 10).rdp(np.array([2.0, 6.0])), [1 + 9 / 400, 3 + 17 / 400])
    np.testing.assert_allclose(Skellam(0.1, 10).rdp(np.array([2.0])), [100 + 150])


def test_skellam_noise_on_a_fine_grid_costs_what_gaussian_noise_does() -> None:
    skellam, gaussian = spent({Skellam(2.0): 20}, DELTA), spent({Gaussian(2.0): 20}, DELTA)
    assert skellam.epsilon_pld is None and "Skellam" in skellam.why_no_pld
    assert skellam.epsilon == skellam.epsilon_rdp == pytest.approx(gaussian.epsilon_rdp, rel=0.01)
    assert skellam.epsilon >= gaussian.epsilon_rdp
    assert spent({Skellam(2.0): 10, Gaussian(2.0): 10}, DELTA).epsilon == pytest.approx(skellam.epsilon, rel=1e-3)


releases: st.SearchStrategy[Gaussian | Skellam] = st.builds(Gaussian, st.floats(0.5, 50)) | st.builds(
    Skellam, st.floats(0.5, 50)
)


@settings(max_examples=8)
@given(releases, st.integers(1, 200), st.floats(1.05, 3))
def test_more_rounds_cost_more_and_more_noise_costs_less(
    release: Gaussian | Skellam, count: int, factor: float
) -> None:
    here = spent({release: count}, DELTA).epsilon
    assert spent({release: count + 1}, DELTA).epsilon > here
    assert spent({release.with_noise(release.noise_multiplier * factor): count}, DELTA).epsilon < here
    assert spent({release: count}, DELTA / 10).epsilon > here
    assert spent({release: count, Gaussian(5.0): 1}, DELTA).epsilon > here


makers: list[tuple[Release, int, float]] = [
    (Gaussian(1.0), 100, 8.0),
    (Gaussian(1.0), 1, 0.1),
    (Gaussian(1.0), 3, 100.0),
    (Skellam(1.0), 30, 2.0),
    (SampledGaussian(1.0, 0.05), 200, 20.0),
]


@pytest.mark.parametrize(("release", "count", "epsilon"), makers)
def test_the_noise_for_an_epsilon_is_the_least_that_is_enough(release: Release, count: int, epsilon: float) -> None:
    noise = noise_multiplier(release, count, epsilon, DELTA)
    assert noise == round(noise, 4)
    assert spent({release.with_noise(noise): count}, DELTA).epsilon <= epsilon
    assert spent({release.with_noise(noise - 1e-4): count}, DELTA).epsilon > epsilon
    assert noise_multiplier(release.with_noise(7.0), count, epsilon, DELTA) == noise


def test_what_no_noise_can_reach_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no noise is enough"):
        noise_multiplier(Gaussian(1.0), 10**6, 1e-3, 1e-12)


def test_nothing_released_is_nothing_spent() -> None:
    assert spent({}, DELTA).epsilon == 0
    assert spent({Gaussian(1.0): 0}, DELTA).epsilon == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, float("nan")])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="δ"):
        spent({}, delta)


@pytest.mark.parametrize("release", [Gaussian(0.01), SampledGaussian(0.1, 0.5), SampledGaussian(1.0, 0.2)])
def test_next_to_no_noise_gets_an_answer_too_and_no_warnings(
    release: Release, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    found = spent({release: 30}, DELTA)
    assert 1 < found.epsilon < 1e6
    assert not caplog.records and not capfd.readouterr().err


def test_importing_it_does_not_import_the_slow_accountant() -> None:
    code = (
        "import sys; from farfield.protocols.privacy import central, distributed, ledger, mechanism;"
        "assert not {'dp_accounting', 'scipy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

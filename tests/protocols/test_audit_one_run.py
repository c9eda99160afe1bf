"""One-run bounds: published ceilings, the theorem by hand, mechanisms whose ε is known, and what must always hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from farfield.protocols.audit import gaussian_dp, one_run, one_run_gaussian
from farfield.protocols.audit.canaries import Claim, audit, ceiling
from farfield.protocols.audit.guessing import Guesses, correct, standard

CLAIMS: tuple[Claim, ...] = ("(ε, δ)-DP", "Gaussian DP")
BOUNDS = (one_run.lower_bound, one_run_gaussian.lower_bound)
DELTA = 1e-5


def coins(count: int, random: np.random.Generator) -> NDArray[np.bool_]:
    return random.random(count) < 0.5


@pytest.mark.parametrize(("canaries", "expected"), [(100, 3.49), (1000, 5.81), (5000, 7.42)])
def test_published_ceilings(canaries: int, expected: float) -> None:
    found = ceiling(canaries, delta=0, plan=[Guesses(canaries, 0)])
    assert round(found, 2) == expected
    root = 0.05 ** (1 / canaries)
    assert found == pytest.approx(math.log(root / (1 - root)), abs=1e-8)


def test_seventy_per_cent_right_of_a_thousand_show_little() -> None:
    assert round(one_run.lower_bound(1000, 1000, 700, 0.0), 2) == 0.73


def test_several_numbers_of_guesses_have_their_price() -> None:
    """What `guessing.py` says of it."""
    assert round(ceiling(1000, delta=0), 2) == 5.31
    assert [one.made for one in standard(1000)] == [1000, 500, 250, 250, 125, 62, 31]
    assert standard(50) == (Guesses(25, 25), Guesses(13, 12), Guesses(6, 6), Guesses(12, 0))
    assert standard(3) == (Guesses(2, 1),)


def test_few_that_are_given_away_are_found_by_guessing_at_the_top_alone() -> None:
    included = coins(1000, np.random.default_rng(5))
    values = np.random.default_rng(6).normal(size=1000)
    values[np.flatnonzero(included)[:40]] += 9
    found = audit(values, included, delta=DELTA)
    assert found.guesses == Guesses(31, 0) and found.right == 31
    assert found.epsilon > 1.4
    assert audit(values, included, delta=DELTA, plan=[Guesses(500, 500)]).epsilon < 0.5


@given(st.integers(1, 40), st.data(), st.floats(0, 4), st.sampled_from([0.0, 1e-5, 1e-3]))
def test_the_p_value_is_the_sum_of_the_theorem(m: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(0, r))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    slack = max((sum(chances[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    expected = min(1.0, sum(chances[v:]) + 2 * m * delta * slack)
    assert one_run.p_value(m, r, v, epsilon, delta) == pytest.approx(expected, abs=1e-12)


@given(st.integers(5, 300), st.data(), st.sampled_from([1e-9, DELTA, 1e-3]), st.sampled_from(BOUNDS))
def test_bounds_grow_with_right_guesses_confidence_and_delta_as_they_must(
    m: int, data: st.DataObject, delta: float, bound: Callable[[int, int, int, float, float], float]
) -> None:
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(1, r))
    found = bound(m, r, v, delta, 0.95)
    assert 0 <= bound(m, r, v - 1, delta, 0.95) <= found + 1e-8 <= bound(m, r, r, delta, 0.95) + 2e-8
    assert bound(m, r, v, delta, 0.99) <= found + 1e-8
    assert bound(m, r, v, delta * 10, 0.95) <= found + 1e-8


@settings(max_examples=40)
@given(st.integers(20, 200), st.floats(0, 4), st.integers(0, 2**32), st.sampled_from(CLAIMS))
def test_a_bound_is_never_above_its_ceiling(m: int, shift: float, seed: int, claim: Claim) -> None:
    random = np.random.default_rng(seed)
    included = coins(m, random)
    found = audit(random.normal(included * shift), included, delta=DELTA, claim=claim)
    assert 0 <= found.epsilon <= found.ceiling + 1e-8
    assert found.ceiling == ceiling(m, delta=DELTA, claim=claim)
    assert found.right <= found.guesses.made <= found.canaries == m
    assert found.included == included.sum()


@pytest.mark.parametrize("claim", CLAIMS)
def test_scores_that_tell_all_reach_the_ceiling(claim: Claim) -> None:
    included = coins(400, np.random.default_rng(0))
    plan = [Guesses(100, 100)]  # there are a hundred of each kind, or this seed is not the one it was
    found = audit(included * 2.0, included, delta=DELTA, claim=claim, plan=plan)
    assert found.right == 200
    assert found.epsilon == found.ceiling > 3


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("first", [True, False])
def test_equal_scores_tell_nothing_in_whatever_order_the_canaries_come(claim: Claim, first: bool) -> None:
    included = np.arange(1000) < 500 if first else np.arange(1000) >= 500
    assert audit(np.zeros(1000), included, delta=DELTA, claim=claim).epsilon < 0.2


def test_the_bound_holds_for_randomised_response() -> None:
    """Each canary answered rightly with probability e^ε/(1 + e^ε): (ε, 0)-DP, and nothing tighter."""
    above, bounds, epsilon = 0, [], 1.5
    for seed in range(100):
        random = np.random.default_rng(seed)
        included = coins(300, random)
        told = included ^ (random.random(300) > 1 / (1 + math.exp(-epsilon)))
        bounds.append(audit(told.astype(float), included, delta=1e-12, seed=seed).epsilon)
        above += bounds[-1] > epsilon
    assert above <= stats.binom.ppf(0.99, 100, 0.05)
    assert np.median(bounds) > 0.7


def test_the_gaussian_bound_holds_for_gaussian_noise_and_is_the_sharper_one() -> None:
    """Each canary shown with noise of its own: μ-GDP, and nothing tighter."""
    above, bounds, others, mu = 0, [], [], 1.0
    epsilon = gaussian_dp.epsilon(mu, DELTA)
    for seed in range(60):
        random = np.random.default_rng(seed)
        included = coins(400, random)
        shown = random.normal(included * mu)
        bounds.append(audit(shown, included, delta=DELTA, claim="Gaussian DP").epsilon)
        others.append(audit(shown, included, delta=DELTA).epsilon)
        above += bounds[-1] > epsilon
    assert above <= stats.binom.ppf(0.99, 60, 0.05)
    assert np.median(bounds) > max(0.33 * epsilon, 1.4 * np.median(others))


@pytest.mark.parametrize(("mu", "delta"), [(0.05, 1e-3), (0.3, 1e-5), (1.0, 1e-5), (3.0, 1e-6), (10.0, 1e-9)])
def test_epsilon_of_gaussian_dp_is_that_of_the_gaussian_mechanism(mu: float, delta: float) -> None:
    assert gaussian_dp.epsilon(mu, delta) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(1 / mu, delta), abs=1e-5, rel=1e-5
    )


def test_guesses_count_the_top_and_the_bottom() -> None:
    included = np.array([True, False, True, False, True, False])
    values = [9.0, 8.0, 7.0, 3.0, 2.0, 1.0]
    plan = [Guesses(1, 0), Guesses(2, 0), Guesses(0, 1), Guesses(3, 3), Guesses(0, 2)]
    assert correct(values, included, plan, 0) == (1, 1, 1, 4, 1)


def test_ties_are_broken_by_lot() -> None:
    included = np.arange(20) < 10
    counts = {correct(np.ones(20), included, [Guesses(10, 0)], seed)[0] for seed in range(30)}
    assert len(counts) > 3


@pytest.mark.parametrize("plan", [[], [Guesses(3, 2)], [Guesses(0, 0)], [Guesses(-1, 2)]])
def test_a_plan_that_does_not_fit_is_refused(plan: list[Guesses]) -> None:
    with pytest.raises(ValueError, match=r"canaries|without guesses"):
        audit([1.0, 2.0, 3.0, 4.0], [True, False, True, False], delta=DELTA, plan=plan)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="booleans"):
        audit([1.0, 2.0], [1, 0], delta=DELTA)
    for bound in BOUNDS:
        with pytest.raises(ValueError, match="guesses about"):
            bound(10, 5, 6, DELTA, 0.95)
    with pytest.raises(ValueError, match="no ε"):
        audit([1.0, 2.0], [True, False], delta=0, claim="Gaussian DP")

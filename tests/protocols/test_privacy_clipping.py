"""Clipping, and a norm that follows the updates with an accounted count (Andrew et al. 2021)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy.central import noised
from farfield.protocols.privacy.clipping import CountedClipping, clip, l2_norm, next_norm
from farfield.protocols.randomness import Randomness

KEY = bytes(range(32))


def update(seed: int, size: int, norm: float) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).standard_normal(size)
    values = (drawn * (norm / np.linalg.norm(drawn))).astype(np.float32)
    return {"a": values[: size // 3].reshape(-1, 1), "b": values[size // 3 :]}


@given(st.integers(0, 100), st.integers(1, 2000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_nothing_is_longer_than_the_norm_and_directions_stay(seed: int, size: int, length: float, norm: float) -> None:
    given_update = update(seed, size, length)
    clipped, before = clip(given_update, norm)
    assert before == l2_norm(given_update)
    assert l2_norm(clipped) <= norm
    assert l2_norm(clipped) >= min(before, norm) * (1 - 1e-6)
    factor = min(1, norm / before)
    for name, tensor in given_update.items():
        assert clipped[name].dtype == np.float32 and clipped[name].shape == tensor.shape
        np.testing.assert_allclose(clipped[name], tensor * factor, rtol=1e-5)


def test_an_update_within_the_norm_stays_as_it_is_and_is_a_copy() -> None:
    given_update = update(1, 30, 0.5)
    clipped, _ = clip(given_update, 1.0)
    for name, tensor in given_update.items():
        assert (clipped[name] == tensor).all() and clipped[name] is not tensor


def test_no_update_and_zeros_are_within_any_norm() -> None:
    assert clip({}, 1.0) == ({}, 0.0)
    assert l2_norm(clip({"a": np.zeros(3, np.float32)}, 1.0)[0]) == 0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        clip({"a": np.array([1, bad], np.float32)}, 1.0)


@given(
    st.floats(0.05, 10),
    st.floats(0.1, 100),
    st.floats(1e-3, 1e3),
    st.integers(1, 500),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_longer_vector_is_within_the_bound_and_its_noise_is_split_as_the_theorem_says(
    z: float, count_noise: float, norm: float, size: int, copies: int, inside: bool
) -> None:
    if 2 * count_noise <= z:
        with pytest.raises(PrivacyError, match="count_noise"):
            CountedClipping(z, count_noise)
        return
    counted = CountedClipping(z, count_noise)
    clipped, before = clip(update(3, size, norm * (0.999999 if inside else 3)), norm)
    extra = counted.coordinates(before, norm, copies)
    assert extra.dtype == np.float32 and extra.shape == (copies,)
    bound = counted.bound(norm)
    assert l2_norm({**clipped, "count": extra}) <= bound
    deviation = z * bound
    assert deviation == pytest.approx(counted.update_noise * norm)
    assert counted.update_noise**-2 + (2 * count_noise) ** -2 == pytest.approx(z**-2)
    one = counted.share_within(extra.astype(np.float64), 1, norm)
    assert one == pytest.approx(1.0 if inside else 0.0, abs=1e-5)
    # noise of `deviation` on every copy is noise of σ_b on the count
    shift = counted.share_within(np.full(copies, deviation / math.sqrt(copies)), 1, norm) - 0.5
    assert shift == pytest.approx(count_noise)


@given(st.integers(1, 10**8), st.floats(0.1, 8), st.floats(5, 100))
def test_copies_keep_the_count_from_standing_out(dimension: int, z: float, count_noise: float) -> None:
    counted = CountedClipping(z, count_noise)
    copies = counted.copies(dimension)
    assert copies >= 1
    value = abs(float(counted.coordinates(0.0, 1.0, copies)[0]))
    assert value <= 16 * counted.bound(1.0) / math.sqrt(dimension) * 1.0001


@settings(max_examples=20)
@given(st.integers(1, 40), st.data())
def test_the_share_is_read_from_the_sum(clients: int, data: st.DataObject) -> None:
    counted = CountedClipping(1.0, 10.0)
    within = data.draw(st.integers(0, clients))
    befores = [0.5] * within + [2.0] * (clients - within)
    total = sum((counted.coordinates(before, 1.0, 3).astype(np.float64) for before in befores), np.zeros(3))
    assert counted.share_within(total, clients, 1.0) == pytest.approx(within / clients, abs=1e-6)


def test_the_norm_moves_towards_the_quantile() -> None:
    assert next_norm(2.0, 0.5, 0.5, 0.2) == 2.0
    assert next_norm(2.0, 1.0, 0.5, 0.2) == pytest.approx(2 * math.exp(-0.1))
    assert next_norm(2.0, 0.0, 0.5, 0.2) == pytest.approx(2 * math.exp(0.1))


def test_it_finds_the_median_norm_under_noise() -> None:
    """Norms between 3 and 5, C from 0.1: after eighty rounds C is near 4, as in Andrew et al., fig. 1."""
    counted, clients = CountedClipping(1.0, 10.0), 200
    norms, norm, random = np.linspace(3, 5, clients), 0.1, Randomness(KEY)
    for _ in range(80):
        total = sum((counted.coordinates(before, norm).astype(np.float64) for before in norms), np.zeros(1))
        noisy = noised({"count": total}, counted.bound(norm), 1.0, random)["count"]
        norm = next_norm(norm, counted.share_within(noisy, clients, norm), 0.5, 0.2)
    assert 3.6 < norm < 4.4

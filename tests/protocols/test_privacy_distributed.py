"""Noise in shares: bounds that hold whatever is rounded, sums that fit, and errors as small as central noise makes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy import distributed
from farfield.protocols.privacy.accounting import Skellam
from farfield.protocols.privacy.clipping import CountedClipping
from farfield.protocols.privacy.distributed import Design, decode, design, encode, smallest
from farfield.protocols.privacy.noise import skellam_tail
from farfield.protocols.randomness import Randomness

Floats = NDArray[np.float32]


def random(label: int = 0) -> Randomness:
    return Randomness(label.to_bytes(32, "big"))


def vectors(clients: int, dimension: int, norm: float, seed: int = 0) -> Floats:
    drawn = np.random.default_rng(seed).standard_normal((clients, dimension))
    lengths = np.sqrt(np.square(drawn).sum(1, keepdims=True)) * (1 + 1e-6)
    return np.asarray(drawn * (norm / lengths), np.float32)


def summed(values: Floats, bound: float, made: Design) -> NDArray[np.float64]:
    """What a coordinator gets for these clients, through the modulus as secure aggregation does it."""
    total = np.zeros(made.dimension, np.uint32)
    for label, value in enumerate(values):
        total += encode(value, bound, made, random(label))
    return decode(total & np.uint32((1 << made.modulus_bits) - 1), bound, made)


designs = st.builds(
    lambda dimension, clients, absent, bits, noise: (dimension, clients, max(1, clients - absent), bits, noise),
    st.integers(1, 10**7),
    st.integers(1, 2000),
    st.integers(0, 500),
    st.sampled_from([16, 24, 32]),
    st.floats(0.05, 20),
)


@given(designs)
def test_every_design_fits_its_modulus_and_has_the_noise_that_is_accounted(
    asked: tuple[int, int, int, int, float],
) -> None:
    try:
        made = design(*asked)
    except PrivacyError:
        return
    assert made.survivors * made.share_variance >= (made.noise_multiplier * made.grid_bound) ** 2
    assert made.grid_bound >= Skellam(1.0).grid_bound
    tail = skellam_tail(float(made.clients * made.share_variance), 40 + math.log2(made.dimension))
    assert made.clients * made.limit + tail < 1 << (made.modulus_bits - 1)
    assert made.limit >= min(made.grid_norm, 64 * made.grid_norm / math.sqrt(made.dimension))
    root = math.sqrt(made.dimension)
    likely = made.grid_norm**2 + made.dimension / 4 + 2 * (made.grid_norm + root / 2)
    assert made.grid_bound == math.ceil(min(made.grid_norm + root, math.sqrt(likely)))
    assert made.inflation >= 1


@settings(max_examples=40)
@given(st.integers(1, 3000), st.sampled_from(["even", "half", "one", "zero", "random"]), st.integers(0, 1000))
def test_no_rounding_is_longer_than_the_noise_is_made_for(dimension: int, shape: str, label: int) -> None:
    made = design(dimension, 10, 8, 24, 1.0)
    values = {
        "even": np.full(dimension, 1 / math.sqrt(dimension)),
        "half": np.minimum((np.floor(made.grid_norm / math.sqrt(dimension)) - 0.5) / made.grid_norm, 1.0)
        * np.ones(dimension),
        "one": np.eye(1, dimension)[0],
        "zero": np.zeros(dimension),
        "random": vectors(1, dimension, 1.0, label)[0],
    }[shape].astype(np.float32)
    rounded = distributed._rounded(values, made.scale(1.0), made, random(label))
    assert np.square(rounded.astype(np.int64)).sum() <= made.grid_bound**2
    exact = np.clip(values * made.scale(1.0), -made.limit, made.limit)
    assert np.abs(rounded - exact).max() <= 1.01


def test_a_rounding_that_is_too_long_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values halfway between grid points have roundings of every length; a bound near their middle refuses some."""
    made = design(4000, 10, 8, 24, 1.0)
    values = np.full(4000, 0.5 / made.scale(1.0), np.float32)
    tight = replace(made, grid_bound=45)
    lengths = [int(distributed._rounded(values, made.scale(1.0), tight, random(n)).sum()) for n in range(60)]
    assert max(lengths) <= 45**2
    free = [int(distributed._rounded(values, made.scale(1.0), made, random(n)).sum()) for n in range(60)]
    assert max(free) > 45**2


def test_rounding_is_without_bias() -> None:
    made = design(1000, 10, 8, 24, 1.0)
    values = vectors(1, 1000, 1.0)[0]
    scaled = values * made.scale(1.0)
    mean = np.mean([distributed._rounded(values, made.scale(1.0), made, random(n)) for n in range(400)], axis=0)
    deviation = np.sqrt((scaled - np.floor(scaled)) * (np.ceil(scaled) - scaled) / 400) + 1e-3
    assert stats.kstest((mean - scaled) / deviation, "norm").statistic < 0.1


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_the_noise_of_the_fewest_is_that_of_the_whole(bits: int) -> None:
    made = design(100_000, 10, 8, bits, 1.0)
    total = np.rint(summed(np.zeros((8, 100_000), np.float32), 1.0, made) * made.scale(1.0)).astype(np.int64)
    variance = 8 * made.share_variance
    edges = np.quantile(total, np.linspace(0, 1, 41)[1:-1]).astype(np.int64)
    reach = np.arange(-skellam_tail(variance, 60), skellam_tail(variance, 60) + 1)
    pmf = special.ive(np.abs(reach), variance)
    expected = np.add.reduceat(pmf, [0, *(np.searchsorted(reach, edges, side="right"))])
    found = np.bincount(np.searchsorted(edges, total, side="left"), minlength=40)
    assert stats.chisquare(found, expected / expected.sum() * len(total)).pvalue > 1e-4
    assert float(total.var()) == pytest.approx(variance, rel=0.03)
    assert float(total.var()) >= 0.97 * (made.noise_multiplier * made.grid_bound) ** 2


@pytest.mark.parametrize(("clients", "bits", "noise"), [(3, 16, 1.0), (40, 16, 0.5), (40, 24, 2.0), (200, 16, 0.3)])
def test_the_sum_is_nearly_as_good_as_with_central_noise(clients: int, bits: int, noise: float) -> None:
    dimension, bound = 20_000, 0.7
    values = vectors(clients, dimension, bound)
    made = design(dimension, clients, clients, bits, noise)
    error = summed(values, bound, made) - values.sum(0, dtype=np.float64)
    central = (noise * bound) ** 2
    rounding = clients * 0.25 / made.scale(bound) ** 2
    assert float(np.square(error).mean()) <= (made.inflation**2 * central + rounding) * 1.05
    assert float(np.square(error).mean()) >= central * 0.95
    assert made.inflation < 1.15
    assert abs(float(error.mean())) < 5 * math.sqrt(2 * central / dimension)


def test_more_survivors_make_more_noise_and_never_less() -> None:
    made = design(50_000, 20, 10, 24, 1.0)
    few = summed(np.zeros((10, 50_000), np.float32), 1.0, made).var()
    all_of_them = summed(np.zeros((20, 50_000), np.float32), 1.0, made).var()
    assert float(few) == pytest.approx(1.0, rel=0.05)
    assert float(all_of_them) == pytest.approx(2.0, rel=0.05)


def test_a_sum_at_its_limits_does_not_wrap_around() -> None:
    """All clients have the same value at the clamp: the largest sum that the modulus was chosen for."""
    for bits in (16, 24):
        made = design(1, 30, 30, bits, 1.0)
        total = summed(np.full((30, 1), 1.0, np.float32), 1.0, made)
        assert abs(total[0] - 30) < 9


def test_ten_million_values_fit_two_bytes() -> None:
    made = design(10_000_000, 100, 70, 16, 1.0)
    assert made.modulus_bits == 16 and made.inflation < 1.3
    assert design(10_000_000, 100, 70, 16, 0.5).inflation < 1.1
    assert smallest(10_000_000, 100, 70, 0.5).modulus_bits == 16
    assert smallest(10_000_000, 100, 70, 6.0).modulus_bits == 24


@pytest.mark.parametrize(
    "asked",
    [
        (10_000_000, 100, 70, 16, 6.0),
        (1000, 1000, 700, 16, 1.0),
        (10, 5, 6, 24, 1.0),
        (10, 5, 0, 24, 1.0),
        (0, 5, 3, 24, 1.0),
        (10, 5, 3, 20, 1.0),
        (10, 5, 3, 24, 0.0),
        (10, 5, 3, 24, math.nan),
    ],
)
def test_what_cannot_fit_is_refused(asked: tuple[int, int, int, int, float]) -> None:
    with pytest.raises(PrivacyError):
        design(*asked)


def test_no_modulus_at_all_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no modulus"):
        smallest(10_000_000, 10, 3, 10_000.0)


def test_the_design_does_not_know_the_norm() -> None:
    made = design(1000, 10, 8, 24, 1.0)
    assert made.scale(2.0) == made.scale(1.0) / 2


@pytest.mark.parametrize(
    "values",
    [
        np.full(1000, 0.05, np.float32),
        np.full(1000, np.nan, np.float32),
        np.full(1000, np.inf, np.float32),
        np.zeros(999, np.float32),
        np.zeros((10, 100), np.float32),
    ],
)
def test_what_is_not_a_clipped_vector_of_this_length_is_refused(values: Floats) -> None:
    with pytest.raises(PrivacyError):
        encode(values, 1.0, design(1000, 10, 8, 24, 1.0), random())


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.uint16), (24, np.uint32), (32, np.uint32)])
def test_what_is_sent_is_below_the_modulus_and_noisy(bits: int, dtype: type) -> None:
    made = design(1000, 10, 8, bits, 1.0)
    values = vectors(1, 1000, 1.0)[0]
    sent, again = encode(values, 1.0, made, Randomness()), encode(values, 1.0, made, Randomness())
    assert sent.dtype == dtype and int(sent.max()) < 1 << bits
    assert np.mean(sent == again) < 0.1


def test_the_count_of_clipped_updates_survives_the_clamp() -> None:
    counted, clients, size = CountedClipping(1.0, 10.0), 100, 200_000
    copies = counted.copies(size)
    assert copies > 1
    made = smallest(size + copies, clients, clients, 1.0)
    extra = counted.coordinates(0.5, 1.0, copies)
    assert np.abs(extra).max() * made.scale(counted.bound(1.0)) < made.limit
    values = np.zeros((clients, size + copies), np.float32)
    for client in range(clients):
        values[client, size:] = counted.coordinates(0.5 if client < 80 else 2.0, 1.0, copies)
    total = summed(values, counted.bound(1.0), made)
    assert counted.share_within(total[size:], clients, 1.0) == pytest.approx(0.8, abs=4 * 10 / clients)

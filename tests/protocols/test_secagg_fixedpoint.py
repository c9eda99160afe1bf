from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from farfield.protocols.errors import SecAggError
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import fixedpoint
from farfield.protocols.secagg.fixedpoint import (
    MODULI,
    accumulate,
    choose_modulus,
    count_limbs,
    decode,
    decode_counts,
    encode,
    encode_count,
    pack,
    unpack,
    zeros,
)
from farfield.protocols.secagg.masks import Words

moduli = st.sampled_from(MODULI)
cohorts = st.integers(1, 10_000)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Short vectors cross the seams between blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixedpoint, "BLOCK", 64)
        yield


def encoded(values: list[float], limit: float, levels: int, modulus_bits: int = 32, key: bytes | None = None) -> Words:
    out = zeros(len(values), modulus_bits)
    encode(np.array(values, np.float32), limit, levels, out, Randomness(key))
    return out


def signed(vector: Words) -> NDArray[np.int64]:
    return vector.view(np.dtype(f"i{vector.itemsize}")).astype(np.int64)


def random_words(length: int, modulus_bits: int, seed: int) -> Words:
    words = zeros(length, modulus_bits)
    words[:] = np.random.default_rng(seed).integers(0, 2**modulus_bits, length)
    return words


@given(cohorts, st.integers(2, 24))
def test_the_modulus_is_the_smallest_that_holds_the_cohort(clients: int, bits: int) -> None:
    if clients * (2**bits - 1) > 2**32:
        with pytest.raises(SecAggError, match="does not fit into 32 bits"):
            choose_modulus(clients, bits)
        return
    modulus_bits, levels = choose_modulus(clients, bits)
    assert 2 * levels + 1 >= 2**bits - 1
    assert clients * (2 * levels + 1) <= 2**modulus_bits < clients * (2 * levels + 3)
    assert all(clients * (2**bits - 1) > 2**smaller for smaller in MODULI if smaller < modulus_bits)


def test_the_moduli_of_usual_cohorts() -> None:
    assert choose_modulus(100, 16) == (24, 83885)
    assert choose_modulus(100, 9) == (16, 327)
    assert choose_modulus(3, 24) == (32, 715827882)


@pytest.mark.parametrize(("clients", "bits"), [(0, 16), (3, 1), (3, 0), (-1, 4)])
def test_a_modulus_for_nothing_is_refused(clients: int, bits: int) -> None:
    with pytest.raises(SecAggError):
        choose_modulus(clients, bits)


@settings(max_examples=50)
@given(st.lists(st.integers(-(2**23) + 1, 2**23 - 1), max_size=200), st.integers(-60, 40))
def test_a_value_on_a_level_comes_out_exactly(levels: list[int], exponent: int) -> None:
    limit = (2**23 - 1) * 2.0**exponent
    out = encoded([level * 2.0**exponent for level in levels], limit, 2**23 - 1)
    assert signed(out).tolist() == levels
    assert decode(out, 32, limit, 2**23 - 1).tolist() == pytest.approx([level * 2.0**exponent for level in levels])


def test_levels_beyond_what_float32_counts_come_out_exactly_too() -> None:
    levels = [sign * (2**power + step * 2**7) for sign in (1, -1) for power in range(23, 30) for step in (-1, 0, 1)]
    assert signed(encoded([level / 2**30 for level in levels], 1.0, 2**30)).tolist() == levels


@settings(max_examples=50)
@given(
    st.lists(st.floats(-2.0, 2.0, width=32), max_size=100),
    st.floats(1e-3, 2.0),
    st.sampled_from([(16, 1), (16, 327), (16, 32767), (24, 83885), (24, 8388607), (32, 2**24 + 1), (32, 2**31 - 1)]),
)
def test_every_value_comes_out_within_one_level_and_never_beyond_the_limit(
    values: list[float], limit: float, size: tuple[int, int]
) -> None:
    modulus_bits, levels = size
    out = signed(encoded(values, limit, levels, 16 if modulus_bits == 16 else 32))
    exact = np.clip(np.array(values, np.float64), -limit, limit) * levels / limit
    assert (np.abs(out) <= levels).all()
    # One level, and what float32 loses: half a unit in the last place each for the limit, the scale and the product.
    assert (np.abs(out - exact) <= 1 + 2.0**-22 * np.abs(exact)).all()


@pytest.mark.parametrize("value", [0.3, -0.3, 0.5, 2.25, -7.875, 99.9, -99.99, 2**-12, -(2**-12)])
def test_rounding_is_unbiased(value: float) -> None:
    """Six standard deviations of the mean of 200,000 roundings with the fraction's probability."""
    draws = 200_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixedpoint, "BLOCK", 1 << 15)
        rounded = signed(encoded([value] * draws, 128.0, 128))
    exact = float(np.float32(value))
    fraction = exact - np.floor(exact)
    assert set(rounded.tolist()) <= {int(np.floor(exact)), int(np.floor(exact)) + 1}
    assert abs(rounded.mean() - exact) < 6 * np.sqrt(fraction * (1 - fraction) / draws)


def test_rounding_errors_of_neighbouring_values_and_clients_are_independent() -> None:
    """Correlations of 20,000 pairs have a standard deviation of 0.0071."""
    first, second = (signed(encoded([0.5] * 20_001, 1.0, 1)) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.043
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.043


def test_values_beyond_the_limit_are_clipped() -> None:
    huge = float(np.finfo(np.float32).max)
    assert signed(encoded([5, -5, huge, -huge, 1e-45], 4.0, 100)).tolist()[:4] == [100, -100, 100, -100]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_a_value_that_is_not_finite_is_refused(bad: float, place: int) -> None:
    values = [0.0] * 100
    values[place] = bad
    with pytest.raises(SecAggError, match="not finite"):
        encoded(values, 1.0, 10)


@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan, np.inf, 1e-30, 1e30])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(SecAggError, match="cannot have"):
        encoded([0.0], limit, 10)


def test_levels_that_the_words_cannot_hold_are_refused() -> None:
    with pytest.raises(SecAggError, match="do not fit"):
        encoded([0.0], 1.0, 2**15, 16)
    with pytest.raises(SecAggError, match="do not fit"):
        encode(np.zeros(3, np.float32), 1.0, 5, np.zeros(4, np.uint32), Randomness())


@settings(max_examples=50)
@given(cohorts, st.integers(2, 20), st.lists(st.sampled_from([-1.0, 1.0, 0.0, 0.37]), min_size=1, max_size=100))
def test_the_sum_of_a_whole_cohort_never_overflows(clients: int, bits: int, values: list[float]) -> None:
    if clients * (2**bits - 1) > 2**32:
        return
    modulus_bits, levels = choose_modulus(clients, bits)
    one = encoded(values, 1.0, levels, modulus_bits)
    # As many times the same vector as there are clients: what repeated addition comes to.
    total = one * one.dtype.type(clients % 2 ** (8 * one.itemsize))
    assert decode(total, modulus_bits, 1.0, levels).tolist() == (signed(one) * clients * (1.0 / levels)).tolist()


@settings(max_examples=50)
@given(moduli, st.integers(0, 200), st.integers(0, 2**32))
def test_what_was_packed_is_unpacked(modulus_bits: int, length: int, seed: int) -> None:
    vector = random_words(length, modulus_bits, seed)
    raw = pack(vector, modulus_bits)
    assert len(raw) == length * modulus_bits // 8
    for form in (raw, bytes(raw)):
        assert np.array_equal(unpack(form, modulus_bits, length), vector)
    assert pack(vector, modulus_bits, b"three") == b"three" + raw
    assert unpack(raw, modulus_bits, length).dtype == vector.dtype


def test_the_packed_form_is_the_one_that_the_docstring_states() -> None:
    assert pack(np.array([0x0102, 0x0304], np.uint16), 16).hex() == "02010403"
    assert pack(np.array([0xFF010203, 0x040506], np.uint32), 24).hex() == "0302" + "0605" + "01" + "04"
    assert pack(np.array([0x01020304], np.uint32), 32).hex() == "04030201"


@settings(max_examples=50)
@given(moduli, st.integers(0, 200), st.lists(st.integers(0, 2**32), max_size=5))
def test_packed_vectors_add_up(modulus_bits: int, length: int, seeds: list[int]) -> None:
    vectors = [random_words(length, modulus_bits, seed) for seed in seeds]
    total = zeros(length, modulus_bits)
    for vector in vectors:
        accumulate(total, pack(vector, modulus_bits), modulus_bits)
    expected = sum((vector.astype(np.int64) for vector in vectors), start=np.zeros(length, np.int64)) % 2**modulus_bits
    assert np.array_equal(total.astype(np.int64) % 2**modulus_bits, expected)
    assert np.array_equal(unpack(pack(total, modulus_bits), modulus_bits, length), expected)


@pytest.mark.parametrize("modulus_bits", MODULI)
@pytest.mark.parametrize("change", [-4, -1, 1, 2, 3, 4])
def test_a_packed_vector_of_another_length_is_refused_and_nothing_is_added(modulus_bits: int, change: int) -> None:
    total = zeros(10, modulus_bits)
    with pytest.raises(SecAggError, match="has not"):
        accumulate(total, b"\1" * (10 * modulus_bits // 8 + change), modulus_bits)
    assert not total.any()
    with pytest.raises(SecAggError, match="has not"):
        unpack(b"\1" * (10 * modulus_bits // 8 + change), modulus_bits, 10)


def test_what_lies_above_the_modulus_does_not_count() -> None:
    total = np.array([0xAB000001, 0xABFFFFFF, 0xAB800000, 0x007FFFFF], np.uint32)
    assert decode(total, 24, 1.0, 1).tolist() == [1, -1, -(2**23), 2**23 - 1]
    assert decode(total.astype(np.uint16), 16, 1.0, 1).tolist() == [1, -1, 0, -1]


@settings(max_examples=100)
@given(moduli, st.lists(st.integers(0, 2**48 - 1), min_size=1, max_size=20))
def test_counts_add_up_exactly(modulus_bits: int, counts: list[int]) -> None:
    limbs = count_limbs(max(counts), len(counts), modulus_bits)
    total = zeros(limbs, modulus_bits)
    for count in counts:
        accumulate(total, pack(encode_count(count, len(counts), modulus_bits, limbs), modulus_bits), modulus_bits)
    assert decode_counts(total, len(counts), modulus_bits) == sum(counts)


@given(moduli, cohorts)
def test_the_largest_counts_of_a_whole_cohort_add_up_exactly(modulus_bits: int, clients: int) -> None:
    limbs = count_limbs(4096, clients, modulus_bits)
    one = encode_count(4096, clients, modulus_bits, limbs)
    total = (one.astype(np.int64) * clients % 2**modulus_bits).astype(one.dtype)
    assert decode_counts(total, clients, modulus_bits) == 4096 * clients


@pytest.mark.parametrize(("value", "limbs"), [(-1, 3), (2**48, 9), (2**9, 1), (2**18, 2)])
def test_a_count_that_does_not_fit_is_refused(value: int, limbs: int) -> None:
    assert decode_counts(encode_count(2**9 - 1, 100, 16, 1), 100, 16) == 2**9 - 1
    with pytest.raises(SecAggError, match="does not fit"):
        encode_count(value, 100, 16, limbs)


def test_counts_of_too_many_clients_are_refused() -> None:
    with pytest.raises(SecAggError, match="cannot be summed"):
        encode_count(1, 2**16, 16, 48)

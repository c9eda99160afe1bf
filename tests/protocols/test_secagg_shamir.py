from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import SecAggError
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import shamir
from farfield.protocols.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, combine_all, split

SECRET = bytes(range(SECRET_BYTES))

secrets = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


def held(secret: bytes, threshold: int, holders: int) -> dict[int, bytes]:
    return dict(enumerate(split(secret, threshold, holders), start=1))


def interpolated(shares: Mapping[int, bytes]) -> bytes:
    """Lagrange's formula at 0, in Python's integers."""
    secret = np.zeros(SECRET_BYTES // 2, object)
    for x, share in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        secret += np.frombuffer(share, "<u4").astype(object) * weight
    return (secret % PRIME).astype("<u2").tobytes()


@settings(max_examples=30)
@given(secrets, st.data())
def test_any_threshold_shares_give_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    holders = data.draw(st.integers(2, 60))
    threshold = data.draw(st.integers(2, holders))
    every = held(secret, threshold, holders)
    kept = data.draw(st.lists(st.sampled_from(sorted(every)), min_size=threshold, unique=True))
    shares = {x: every[x] for x in kept}
    assert combine(shares, threshold) == secret == interpolated(shares)


@settings(max_examples=30)
@given(st.lists(st.tuples(secrets, st.sets(st.integers(1, 9), min_size=4)), max_size=12))
def test_many_secrets_come_back_in_their_order_whoever_holds_them(cases: list[tuple[bytes, set[int]]]) -> None:
    shares = []
    for secret, kept in cases:
        every = held(secret, 4, 9)
        shares.append({x: every[x] for x in kept})
    assert combine_all(shares, 4) == [secret for secret, _ in cases]


def test_the_largest_numbers_of_shares_are_exact() -> None:
    every = held(b"\xff" * SECRET_BYTES, 3000, 6000)
    assert combine({x: every[x] for x in range(2900, 6001)}, 3000) == b"\xff" * SECRET_BYTES
    last = held(SECRET, 2, PRIME - 1)
    assert combine({x: last[x] for x in (1, PRIME - 1)}, 2) == SECRET


def test_too_few_shares_say_nothing() -> None:
    """Of a constant secret, two shares of three are uniform and independent: all cells of a table are as likely.

    With 16,000 pairs in 16 × 16 cells, chi-squared of 255 degrees of freedom stays below 390 but for one run in 10⁶.
    """
    pairs = [np.frombuffer(b"".join(split(bytes(SECRET_BYTES), 3, 3)[1:]), "<u4").reshape(2, -1) for _ in range(1000)]
    first, second = np.concatenate(pairs, axis=1)
    counts = np.histogram2d(first, second, bins=16, range=[[0, PRIME], [0, PRIME]])[0]
    expected = counts.sum() / counts.size
    assert float(((counts - expected) ** 2 / expected).sum()) < 390
    assert combine({1: bytes(SHARE_BYTES), 2: first[:16].tobytes()}, 2) != bytes(SECRET_BYTES)


def test_coefficients_are_drawn_again_where_a_word_would_favour_zero() -> None:
    class Words(Randomness):
        def __init__(self) -> None:
            self.words = [0xFFFFFFFF, 0, PRIME, PRIME - 1, 0xFFFFFFFE, 0xFFFFFFFF, 7]

        def words32(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
            drawn, self.words = self.words[:count], self.words[count:]
            return np.array(drawn, np.uint32)

    assert shamir._uniform(Words(), 5).tolist() == [7, 0, 0, PRIME - 1, PRIME - 1]


@settings(max_examples=50)
@given(st.integers(1, 7), st.integers(0, SHARE_BYTES * 8 - 1))
def test_a_wrong_share_among_more_than_enough_is_noticed(holder: int, bit: int) -> None:
    shares = held(SECRET, 5, 7)
    wrong = bytearray(shares[holder])
    wrong[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SecAggError):
        combine(shares | {holder: bytes(wrong)}, 5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({2: None}, "2 shares of a secret, of which 3 are needed"),
        ({2: b""}, "not 64 bytes"),
        ({2: bytes(SHARE_BYTES - 1)}, "not 64 bytes"),
        ({2: bytes(SHARE_BYTES + 4)}, "not 64 bytes"),
        ({2: PRIME.to_bytes(4, "little") * 16}, "no element of the field"),
        ({2: b"\xff" * SHARE_BYTES}, "no element of the field"),
        ({0: bytes(SHARE_BYTES)}, "holder 0"),
        ({-1: bytes(SHARE_BYTES)}, "holder -1"),
        ({PRIME: bytes(SHARE_BYTES)}, "or 65537"),
    ],
)
def test_a_malformed_share_is_refused(change: dict[int, bytes | None], problem: str) -> None:
    shares = held(SECRET, 3, 3) | change
    with pytest.raises(SecAggError, match=problem):
        combine({x: share for x, share in shares.items() if share is not None}, 3)


def test_shares_of_what_is_no_secret_are_refused() -> None:
    """f(x) = 65536 in every limb is in the field, and no 16-bit limb."""
    share = (PRIME - 1).to_bytes(4, "little") * 16
    with pytest.raises(SecAggError, match="give no secret"):
        combine({1: share, 2: share}, 2)


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (1, 3), (4, 3), (2, PRIME)])
def test_a_sharing_that_protects_nothing_or_cannot_be_is_refused(threshold: int, holders: int) -> None:
    with pytest.raises(SecAggError, match="2 ≤ threshold"):
        split(SECRET, threshold, holders)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(SecAggError, match="32 bytes"):
        split(bytes(length), 2, 3)

"""The best low-rank part of a sum of products, against the singular values of the whole matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.kernels import stacked
from farfield.kernels.stacked import Matrix, Truncated


def product(found: Truncated) -> Matrix:
    return (found.left * found.values) @ found.right


def drawn(seed: int, d: int, k: int, ranks: list[int], dtype: type = np.float64) -> tuple[list[Matrix], list[Matrix]]:
    rng = np.random.default_rng(seed)
    b: list[Matrix] = [rng.normal(size=(d, rank)).astype(dtype) for rank in ranks]
    a: list[Matrix] = [rng.normal(size=(rank, k)).astype(dtype) for rank in ranks]
    return b, a


@given(
    st.integers(0, 10**6),
    st.integers(1, 24),
    st.integers(1, 24),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 8),
    st.sampled_from((np.float64, np.float32)),
)
def test_it_equals_the_reference(seed: int, d: int, k: int, ranks: list[int], rank: int, dtype: type) -> None:
    """Also where the stacks are wider than the matrix. Sums of a few hundred products of values of size 1 are off by
    as many roundings, hence the tolerance; triples are compared by their product, for a pair of near ones may turn.
    """
    b, a = drawn(seed, d, k, ranks, dtype)
    weights = [1.0 / (1 + number) for number in range(len(ranks))]
    found, expected = stacked.truncated(b, a, weights, rank), stacked.reference_truncated(b, a, weights, rank)
    size = float(np.sqrt(expected.energy))
    tolerance = 1000 * float(np.finfo(dtype).eps)
    assert found.left.shape == expected.left.shape
    assert found.right.shape == expected.right.shape
    np.testing.assert_allclose(found.values / size, expected.values / size, atol=tolerance)
    assert found.energy == pytest.approx(expected.energy, rel=tolerance)
    assert found.lost / found.energy == pytest.approx(expected.lost / expected.energy, abs=tolerance)
    at_the_cut = np.linalg.svd(sum(w * x @ y for w, x, y in zip(weights, b, a, strict=True)), compute_uv=False)[
        rank - 1 :
    ]
    if len(at_the_cut) < 2 or at_the_cut[0] - at_the_cut[1] > 0.05 * size:
        np.testing.assert_allclose(product(found) / size, product(expected) / size, atol=100 * tolerance)


def test_the_triples_are_ordered_and_orthonormal() -> None:
    b, a = drawn(1, 20, 15, [4, 2, 3])
    found = stacked.truncated(b, a, [0.5, 0.2, 0.3], 6)
    assert (np.diff(found.values) <= 0).all()
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.right @ found.right.T, np.eye(6), atol=1e-12)


def test_what_has_the_rank_is_found_whole() -> None:
    b, a = drawn(2, 20, 15, [2, 2])
    found = stacked.truncated(b, a, [0.25, 0.75], 4)
    np.testing.assert_allclose(product(found), 0.25 * b[0] @ a[0] + 0.75 * b[1] @ a[1], atol=1e-12)
    assert found.lost == pytest.approx(0.0, abs=1e-20)


def test_what_is_lost_is_the_rest_of_the_square() -> None:
    """Of diag(4, 2, 1) at rank 1: 2² + 1² of 4² + 2² + 1²."""
    whole = np.diag([4.0, 2.0, 1.0])
    found = stacked.truncated([whole], [np.eye(3)], [1.0], 1)
    np.testing.assert_allclose([found.energy, found.lost], [21.0, 5.0])
    np.testing.assert_allclose(product(found), np.diag([4.0, 0.0, 0.0]), atol=1e-12)


@pytest.mark.parametrize("version", [stacked.truncated, stacked.reference_truncated])
def test_of_nothing_there_are_no_triples(version: object) -> None:
    assert callable(version)
    found = version([np.zeros((5, 2))], [np.ones((2, 4))], [1.0], 2)
    assert (found.left.shape, found.values.shape, found.right.shape) == ((5, 0), (0,), (0, 4))
    assert (found.energy, found.lost) == (0.0, 0.0)


def test_no_triple_is_made_of_rounding() -> None:
    """A sum of rank 1 has one, however many are asked for."""
    b, a = drawn(3, 9, 7, [1])
    found = stacked.truncated([b[0], b[0]], [a[0], a[0]], [0.5, 0.5], 2)
    assert len(found.values) == 1

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from farfield.protocols.errors import SecAggError
from farfield.protocols.secagg import parameters
from farfield.protocols.secagg.parameters import Adversary, Parameters, choose

PUBLISHED = [
    (100, 0.1, "curious", 22, 11),
    (100, 0.1, "semi-malicious", 32, 22),
    (100, 0.33, "curious", 42, 32),
    (100, 0.33, "semi-malicious", 54, 44),
    (1000, 0.1, "curious", 48, 27),
    (1000, 0.1, "semi-malicious", 96, 67),
    (1000, 0.33, "curious", 102, 72),
    (1000, 0.33, "semi-malicious", 218, 171),
    (10000, 0.1, "curious", 54, 31),
    (10000, 0.1, "semi-malicious", 122, 85),
    (10000, 0.33, "curious", 126, 88),
    (10000, 0.33, "semi-malicious", 310, 242),
]


@pytest.mark.parametrize(("clients", "corrupt", "adversary", "degree", "threshold"), PUBLISHED)
def test_the_numbers_are_those_of_googles_federated_compute(
    clients: int, corrupt: float, adversary: Adversary, degree: int, threshold: int
) -> None:
    assert choose(clients, corrupt, 0.1, adversary) == Parameters(degree, threshold)


def fewer_than(least: int, clients: int, marked: int, drawn: int) -> Fraction:
    """Pr[fewer than `least` of the drawn are marked], summed as it is defined."""
    ways = sum(comb(marked, count) * comb(clients - marked, drawn - count) for count in range(max(0, least)))
    return Fraction(ways, comb(clients, drawn))


def thresholds(clients: int, bad: int, silent: int, degree: int, adversary: Adversary) -> list[int]:
    """Every threshold that is neither too low for the corrupt neighbours nor too high for the surviving ones."""
    possible = []
    for threshold in range(2, degree + 1):
        # The fewest corrupt neighbours with which the shares suffice: t of them, or 2t - k for both kinds of share.
        enough = threshold if adversary == "curious" else 2 * threshold - degree
        opened = fewer_than(degree - enough + 1, clients, clients - bad, degree) if enough > 0 else Fraction(1)
        stuck = fewer_than(threshold, clients, clients - silent, degree)
        if opened < Fraction(1, clients * 2**41) and stuck < Fraction(1, clients * 2**20):
            possible.append(threshold)
    return possible


@pytest.mark.parametrize("adversary", ["curious", "semi-malicious"])
@pytest.mark.parametrize(("clients", "bad", "silent"), [(60, 3, 3), (101, 10, 5), (150, 0, 30), (250, 50, 0)])
def test_the_threshold_is_the_least_one_and_no_smaller_degree_has_any(
    clients: int, bad: int, silent: int, adversary: Adversary
) -> None:
    chosen = choose(clients, bad / clients, silent / clients, adversary)
    assert chosen.degree < clients - 1
    assert not parameters._may_split(clients, chosen.degree, bad + silent, 41)
    assert thresholds(clients, bad, silent, chosen.degree, adversary)[0] == chosen.threshold
    for degree in range(2, chosen.degree, 2):
        if not parameters._may_split(clients, degree, bad + silent, 41):
            assert not thresholds(clients, bad, silent, degree, adversary)


@pytest.mark.parametrize(
    ("clients", "degree", "missing", "bits"), [(12, 4, 5, 1), (14, 4, 5, 1), (16, 6, 7, 3), (20, 4, 5, 2)]
)
def test_the_bound_on_a_split_ring_is_a_bound(clients: int, degree: int, missing: int, bits: int) -> None:
    """Over all sets of missing clients: a ring is split when degree/2 or more in a row are missing in two places."""
    splits = 0
    for gone in combinations(range(clients), missing):
        left = [place for place in range(clients) if place not in gone]
        steps = [(after - here) % clients for here, after in zip(left, left[1:] + left[:1], strict=True)]
        splits += sum(step > degree // 2 for step in steps) >= 2
    assert not parameters._may_split(clients, degree, missing, bits)
    assert parameters._may_split(clients, degree, missing, bits + 1)
    assert 0 < Fraction(splits, comb(clients, missing)) < Fraction(1, 2**bits)


@pytest.mark.parametrize(("clients", "threshold"), [(3, 2), (4, 3), (10, 7), (30, 20), (50, 34)])
def test_few_clients_all_mask_with_each_other(clients: int, threshold: int) -> None:
    assert choose(clients, 0.1, 0.1, "semi-malicious") == Parameters(clients - 1, threshold)


def test_the_full_graph_stays_where_no_sparse_one_withstands_as_much() -> None:
    assert choose(52, 0.32, 0.32, "semi-malicious") == Parameters(51, 35)
    assert choose(52, 0.3, 0.3, "semi-malicious").degree < 51


@pytest.mark.parametrize(
    ("clients", "corrupt", "dropouts", "adversary"),
    [
        (10, 0.4, 0.1, "semi-malicious"),
        (10, 0.7, 0.1, "curious"),
        (10, 0.1, 0.4, "curious"),
        (60, 0.5, 0.3, "semi-malicious"),
    ],
)
def test_what_no_graph_withstands_is_refused(
    clients: int, corrupt: float, dropouts: float, adversary: Adversary
) -> None:
    with pytest.raises(SecAggError, match="no threshold withstands both"):
        choose(clients, corrupt, dropouts, adversary)


def test_one_third_corrupt_is_one_too_many_for_a_full_graph() -> None:
    assert choose(30, 9 / 30, 0.1, "semi-malicious").threshold == 20
    with pytest.raises(SecAggError, match="no threshold"):
        choose(30, 10 / 30, 0.1, "semi-malicious")


@pytest.mark.parametrize("clients", [0, 1, 2])
def test_fewer_than_three_are_refused(clients: int) -> None:
    with pytest.raises(SecAggError, match="3 are the fewest"):
        choose(clients, 0.0, 0.0, "curious")


@pytest.mark.parametrize(("corrupt", "dropouts"), [(-0.1, 0.1), (1.0, 0.1), (0.1, 1.0), (0.1, -0.1), (float("nan"), 0)])
def test_a_share_that_is_none_is_refused(corrupt: float, dropouts: float) -> None:
    with pytest.raises(SecAggError, match="shares of the clients"):
        choose(100, corrupt, dropouts, "curious")


def test_a_degree_in_the_thousands_is_found_in_seconds() -> None:
    assert choose(10_000, 0.5, 0.2, "semi-malicious") == Parameters(4616, 3566)


def test_a_share_means_the_number_that_people_mean() -> None:
    assert 0.29 * 100 < 29
    assert parameters.at_most(0.29, 100) == 29

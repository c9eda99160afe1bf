import hashlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import SecAggError
from farfield.protocols.secagg.graph import SEED_BYTES, neighbours

seeds = st.binary(min_size=SEED_BYTES, max_size=SEED_BYTES)


def reached(graph: tuple[tuple[int, ...], ...], without: frozenset[int] = frozenset()) -> set[int]:
    start = min(set(range(len(graph))) - without)
    found, open_ends = {start}, [start]
    while open_ends:
        fresh = set(graph[open_ends.pop()]) - found - without
        found |= fresh
        open_ends += fresh
    return found


@settings(max_examples=100)
@given(st.integers(3, 60), st.data(), seeds)
def test_the_graph_is_regular_symmetric_and_connected(clients: int, data: st.DataObject, seed: bytes) -> None:
    degree = data.draw(st.integers(2, clients - 1))
    assume(degree % 2 == 0 or clients % 2 == 0)
    graph = neighbours(clients, degree, seed)
    for client, near in enumerate(graph):
        assert list(near) == sorted(set(near))
        assert len(near) == degree
        assert client not in near
        assert all(client in graph[other] for other in near)
    assert reached(graph) == set(range(clients))


@settings(max_examples=30)
@given(st.integers(8, 30), seeds, st.data())
def test_it_stays_connected_while_fewer_than_its_degree_are_missing(
    clients: int, seed: bytes, data: st.DataObject
) -> None:
    missing = frozenset(data.draw(st.lists(st.integers(0, clients - 1), max_size=5, unique=True)))
    graph = neighbours(clients, 6, seed)
    assert reached(graph, missing) == set(range(clients)) - missing


def test_everybody_is_a_neighbour_in_the_full_graph() -> None:
    assert neighbours(4, 3, bytes(SEED_BYTES)) == ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))


def test_every_machine_draws_the_same_graph() -> None:
    """Written out a second time, so that a change does not go unseen: clients of two versions would not agree."""
    seed = bytes(range(SEED_BYTES))
    ring = sorted(range(11), key=lambda client: hashlib.sha256(seed + client.to_bytes(8, "big")).digest())
    assert ring == [6, 10, 3, 1, 2, 4, 0, 5, 8, 9, 7]
    graph = neighbours(11, 4, seed)
    for place, client in enumerate(ring):
        assert set(graph[client]) == {ring[(place + step) % 11] for step in (-2, -1, 1, 2)}


def test_every_pair_is_as_likely_as_any_other() -> None:
    """Over 4,000 seeds each of 45 pairs is joined 4/9 of the time; six standard deviations are 189."""
    counts: dict[tuple[int, int], int] = {}
    for seed in range(4000):
        for client, near in enumerate(neighbours(10, 4, seed.to_bytes(SEED_BYTES, "big"))):
            for other in near:
                counts[client, other] = counts.get((client, other), 0) + 1
    assert len(counts) == 90
    assert all(abs(count - 4000 * 4 / 9) < 189 for count in counts.values())


@pytest.mark.parametrize(("clients", "degree"), [(5, 3), (5, 5), (5, 1), (5, 0), (5, -2), (2, 1), (0, 0)])
def test_a_graph_that_does_not_exist_is_refused(clients: int, degree: int) -> None:
    with pytest.raises(SecAggError, match="no graph"):
        neighbours(clients, degree, bytes(SEED_BYTES))


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(SecAggError, match="32 bytes"):
        neighbours(6, 4, bytes(SEED_BYTES - 1))

"""Which blocks are tuned, and what they are called in the backbone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.emulator.split import Split, renumbered, split
from farfield.protocols.errors import EmulatorError


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_the_ends_and_the_middle_are_all_blocks_once(first: int, last: int, between: int) -> None:
    parts = split(first + between + last, (first, last))
    assert sorted((*parts.middle, *parts.outer)) == list(range(parts.depth))
    assert len(parts.middle) == between
    assert parts.outer[:first] == tuple(range(first))
    assert parts.outer[first:] == tuple(range(parts.depth - last, parts.depth))


@pytest.mark.parametrize("ends", [(2, 2), (3, 1), (1, 3), (4, 4), (10**9, 1)])
def test_ends_that_meet_are_refused(ends: tuple[int, int]) -> None:
    with pytest.raises(EmulatorError, match=r"somewhere: delivery.first = .* leave nothing between .* at most 3\.$"):
        split(4, ends, "somewhere")


def test_the_smallest_split() -> None:
    assert split(3, (1, 1)) == Split(3, 1, 1)
    assert list(split(3, (1, 1)).middle) == [1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.2.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight"),
        ("base_model.model.model.layers.2.q.lora_A.weight", "base_model.model.model.layers.10.q.lora_A.weight"),
        ("model.layers.2", "model.layers.10"),
        ("model.layers.1.layers.2.weight", "model.layers.1.layers.2.weight"),
        ("model.layers.2.model.layers.2.weight", "model.layers.10.model.layers.2.weight"),
        ("submodel.layers.2.weight", "submodel.layers.2.weight"),
        ("model.layers.2x.weight", "model.layers.2x.weight"),
        ("modelxlayers.2.weight", "modelxlayers.2.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_only_the_number_of_the_block_changes(name: str, expected: str) -> None:
    assert renumbered(name, "model.layers", [0, 1, 10]) == expected

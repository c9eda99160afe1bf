"""What a client keeps at home: the state to go on from, and the one to begin the same round again from."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.edge_client.local_state import LocalState
from farfield.protocols.errors import HomeError
from farfield.protocols.tensors import State


def state(value: float) -> State:
    return {"b": np.full((2, 3), value, np.float32), "a": np.arange(4, dtype=np.float32) + np.float32(value)}


def value(found: State | None) -> float:
    """0 for none, the untrained state."""
    return 0.0 if found is None else float(found["b"][0, 0])


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    kept = LocalState(tmp_path / "deep" / "down")
    assert kept.after(0) is None
    assert kept.after(9) is None
    kept.save(4, state(0.1))
    assert kept.after(3) is None
    for number in (4, 5, 100):
        found = kept.after(number)
        assert found is not None
        assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
            "a": (np.dtype(np.float32), (4,)),
            "b": (np.dtype(np.float32), (2, 3)),
        }
        for name, array in state(0.1).items():
            np.testing.assert_array_equal(found[name], array)


def test_two_states_at_most_take_room_and_only_the_owner_may_read_them(tmp_path: Path) -> None:
    kept = LocalState(tmp_path / "kept")
    for number in (1, 2, 5, 7):
        kept.save(number, state(number))
    files = sorted((tmp_path / "kept").iterdir())
    assert [file.name for file in files] == ["round-0005.safetensors", "round-0007.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


def test_a_round_that_is_done_again_begins_where_it_began(tmp_path: Path) -> None:
    kept = LocalState(tmp_path)
    kept.save(3, state(3))
    kept.save(6, state(6))
    assert value(kept.after(5)) == 3
    kept.save(6, state(66))
    assert value(kept.after(5)) == 3
    assert value(kept.after(6)) == 66


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    asked: list[bool], data: st.DataObject
) -> None:
    """The state counts what the client has done; a round without a checkpoint is done again, any number of times."""
    with tempfile.TemporaryDirectory() as folder:
        kept, expected = LocalState(Path(folder)), 0.0
        for number, takes_part in enumerate(asked, 1):
            for _ in range(data.draw(st.integers(1, 3))):
                begun = value(kept.after(number - 1))
                assert begun == expected
                if takes_part:
                    kept.save(number, state(begun * 1.5 + number))
            if takes_part:
                expected = float(np.float32(expected * 1.5 + number))
            assert value(kept.after(number)) == expected


def test_a_run_that_is_taken_back_too_far_is_not_begun_from_another_state(tmp_path: Path) -> None:
    kept = LocalState(tmp_path)
    for number in (1, 2, 3):
        kept.save(number, state(number))
    assert value(kept.after(2)) == 2
    with pytest.raises(HomeError, match="what was kept here from before round 2 is gone, and round 1 was before it"):
        kept.after(1)


def test_a_run_that_is_taken_back_to_before_the_client_first_trained_begins_anew(tmp_path: Path) -> None:
    kept = LocalState(tmp_path)
    kept.save(5, state(5))
    kept.save(6, state(6))
    assert kept.after(4) is None
    kept.save(2, state(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-0002.safetensors"]


def test_what_was_half_written_is_not_read(tmp_path: Path) -> None:
    kept = LocalState(tmp_path)
    kept.save(1, state(1))
    (tmp_path / "round-0002.safetensors.partial").write_bytes(b"half")
    assert value(kept.after(2)) == 1
    kept.save(2, state(2))
    assert value(kept.after(2)) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_damaged_or_refused_is_an_error_that_says_where(tmp_path: Path) -> None:
    kept = LocalState(tmp_path / "kept")
    kept.save(1, state(1))
    (tmp_path / "kept" / "round-0001.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(HomeError, match=r"round-0001\.safetensors: cannot be read"):
        kept.after(1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HomeError, match="cannot be read: Not a directory"):
        LocalState(tmp_path / "file" / "below").save(1, state(1))

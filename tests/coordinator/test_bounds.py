"""What bounds the updates of a round follows from the rounds before it, and stays within what the Plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.coordinator import bounds, plans
from farfield.coordinator.bounds import FINEST, HEADROOM, Bounds
from farfield.coordinator.releasing import Aggregate
from farfield.coordinator.runs import Checkpoint, RoundRecord, RunFolder, RunInfo
from farfield.coordinator.server_optimizer import Moments
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State

ADAPTER: State = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}
WIDEST = 0.5
CLIENT = '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n'
ADAPTIVE = 'clipping = "adaptive"\ntarget_quantile = 0.75\nquantile_rate = 0.5\n'


def plan_of(protection: str = "", extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(f"{text}[protection]\nclip_range = {WIDEST}\n{protection}\n{extra}")


def aggregate(update: State, within: float | None = None) -> Aggregate:
    return Aggregate(update, None, ("ann",), 0, 0, 0, within)


def test_at_first_the_plans_range_holds_for_every_tensor() -> None:
    assert bounds.first(plan_of(), ADAPTER) == Bounds({"a": WIDEST, "b": WIDEST}, None)
    assert bounds.first(plan_of('kind = "sealed"'), ADAPTER) == Bounds({}, None)


def test_without_a_range_of_its_own_the_plans_follows_from_its_steps() -> None:
    text = plan_of().model_copy(update={"protection": plan_of().protection.model_copy(update={"clip_range": None})})
    assert bounds.first(text, ADAPTER).ranges == pytest.approx({"a": 0.002, "b": 0.002})


def test_no_value_of_a_clipped_update_is_beyond_its_norm() -> None:
    small = bounds.first(plan_of(extra=CLIENT + "clipping_norm = 0.125\n"), ADAPTER)
    assert small == Bounds({"a": 0.125, "b": 0.125}, 0.125)
    assert bounds.first(plan_of(extra=CLIENT), ADAPTER) == Bounds({"a": WIDEST, "b": WIDEST}, 1.0)


def test_ranges_follow_each_tensors_largest_value() -> None:
    plan = plan_of()
    update: State = {"a": np.array([0.01, -0.02, 0], np.float32), "b": np.full((2, 2), 1e-3, np.float32)}
    after = bounds.following(plan, bounds.first(plan, ADAPTER), aggregate(update))
    assert after.ranges == pytest.approx({"a": HEADROOM * 0.02, "b": HEADROOM * 1e-3})
    again = bounds.following(plan, after, aggregate({"a": 2 * update["a"], "b": update["b"]}))
    assert again.ranges == pytest.approx({"a": HEADROOM * 0.04, "b": HEADROOM * 1e-3})


def test_a_tensor_that_rests_keeps_its_range() -> None:
    plan = plan_of()
    before = Bounds({"a": 0.1, "b": 0.2})
    after = bounds.following(plan, before, aggregate({"a": np.array([0.01, 0, 0], np.float32)}))
    assert after.ranges == pytest.approx({"a": 0.08, "b": 0.2})


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3))
def test_ranges_stay_within_the_plans_and_never_vanish(values: list[float]) -> None:
    plan = plan_of()
    update: State = {"a": np.array(values, np.float32), "b": np.zeros((2, 2), np.float32)}
    after = bounds.following(plan, bounds.first(plan, ADAPTER), aggregate(update))
    assert WIDEST * FINEST <= after.ranges["a"] <= WIDEST
    assert after.ranges["b"] == WIDEST * FINEST


def test_ranges_that_are_not_to_adapt_stay() -> None:
    plan = plan_of("adapt_range = false")
    before = bounds.first(plan, ADAPTER)
    assert bounds.following(plan, before, aggregate({"a": np.zeros(3, np.float32)})) == before


@pytest.mark.parametrize(("within", "moves"), [(1.0, -1), (0.9, -1), (0.75, 0), (0.5, 1), (0.0, 1), (-0.4, 1)])
@pytest.mark.parametrize("protection", ["", 'kind = "sealed"'])
def test_the_norm_moves_towards_its_quantile(protection: str, within: float, moves: int) -> None:
    plan = plan_of(protection, CLIENT + ADAPTIVE)
    before = bounds.first(plan, ADAPTER)
    after = bounds.following(plan, before, aggregate(ADAPTER, within)).clipping_norm
    assert after is not None
    assert np.sign(round(after - 1.0, 12)) == moves
    assert after == pytest.approx(np.exp(-0.5 * (within - 0.75)))


def test_a_norm_that_grows_widens_the_ranges_up_to_the_plans() -> None:
    plan = plan_of(extra=CLIENT + ADAPTIVE + "clipping_norm = 0.125\n")
    one = bounds.first(plan, ADAPTER)
    large: State = {name: np.full_like(array, 9.0) for name, array in ADAPTER.items()}
    for _ in range(20):
        one = bounds.following(plan, one, aggregate(large, 0.0))
        assert one.clipping_norm is not None
        assert one.ranges == {name: min(WIDEST, one.clipping_norm) for name in ADAPTER}
    assert one.ranges["a"] == WIDEST


def test_a_fixed_norm_stays() -> None:
    plan = plan_of(extra=CLIENT)
    assert bounds.following(plan, bounds.first(plan, ADAPTER), aggregate(ADAPTER)).clipping_norm == 1.0


@pytest.mark.parametrize("one", [Bounds(), Bounds({"a": 1 / 3, "x/y": 2e-9}, 0.1), Bounds({}, 7.25)], ids=str)
def test_a_checkpoint_keeps_them_to_the_last_bit(one: Bounds, tmp_path: Path) -> None:
    """A resumed run opens its next sum over the very ranges that it would have had."""
    told: dict[str, Any] = {"clipping_norm": one.clipping_norm}
    folder = RunFolder.create(tmp_path / "run", RunInfo("r", "ab" * 32, "folder", "cd" * 32), "# plan\n")
    folder.save(Checkpoint(RoundRecord(0, 0, None, None, None, 0, 0, 0.0, **told), ADAPTER, Moments(), one))
    loaded = folder.resume()
    assert loaded is not None
    assert loaded.bounds == one
    assert loaded.record.clipping_norm == one.clipping_norm

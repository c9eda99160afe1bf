"""Rounds of FedKSeed, whose replies are scalars: under secure aggregation, on the wire, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import Place, Silent, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.bounds import Bounds, following
from farfield.coordinator.export import export
from farfield.coordinator.releasing import Aggregate
from farfield.coordinator.results import Result
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import SimulatedParticipant
from farfield.emulator.bench import Bench
from farfield.protocols.errors import PlanError
from farfield.protocols.parcel import Parcel
from farfield.protocols.tensors import State

SCALARS = "pool.scalars"
LIMIT = 18_000
TRAINING = {"optimizer": "sgd", "learning_rate": 1e-3, "steps": 6, "rounds": 2}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of every parcel that a client sends."""
    seen: list[int] = []
    answer = SimulatedParticipant.answer

    def counted(self: SimulatedParticipant, parcel: Parcel) -> Parcel:
        reply = answer(self, parcel)
        seen.append(reply.size)
        return reply

    monkeypatch.setattr(SimulatedParticipant, "answer", counted)
    yield seen


def go(place: Place) -> Result:
    return simulate(Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs"), Silent())


def adapter(place: Place, runs: int = 0) -> State:
    return RunFolder.open(place.runs()[runs]).load(2).adapter


def test_what_clients_send_is_small_and_adds_up_the_same_whoever_may_see_it(
    tmp_path: Path, backbone: Path, sizes: list[int]
) -> None:
    found: dict[str, State] = {}
    for kind in ("sealed", "secagg"):
        place = Place.make(tmp_path / kind, backbone)
        place.plan(tuning={"kind": "fedkseed", "rank": None}, training=TRAINING, protection={"kind": kind})
        sizes.clear()
        result = go(place)
        assert [record.clients for record in result.rounds] == [0, 3, 3]
        # With 4 bytes a scalar there are 16,384 in any case; what is masked has fewer.
        assert 10_000 < max(sizes) < LIMIT
        found[kind] = adapter(place)
    sealed, summed = found["sealed"][SCALARS], found["secagg"][SCALARS]
    assert sealed.shape == summed.shape == (4096,)
    # Three clients of two rounds with six steps each, of which some took the same direction.
    assert 30 <= np.count_nonzero(sealed) <= 36
    # Two rounds, each rounded to one of 2¹⁶ values over ± rate · steps.
    assert np.abs(sealed - summed).max() <= 2 * 2 * 1e-3 * 6 / 2**16 < np.abs(sealed).max() / 100


def test_the_pool_is_part_of_what_all_machines_must_have_alike(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    digests = []
    for seed in (1, 1, 2):
        plan = plans.load(place.plan(tuning={"kind": "fedkseed", "rank": None}, training=TRAINING | {"seed": seed}))
        digests.append(Bench(plan, backbone).frozen)
    assert digests[0] == digests[1] != digests[2] != ""


def test_a_finished_run_becomes_a_plain_model(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    plan = plans.load(place.plan(tuning={"kind": "fedkseed", "rank": None}, training=TRAINING))
    go(place)
    assert export(place.run(), place.path / "merged", merged=True) == 2
    bench = Bench(plan, backbone)
    bench.load(adapter(place))
    merged = load_file(place.path / "merged" / "model.safetensors")
    ours = {name: value for name, value in bench.tuned.model.named_parameters() if name in merged}
    assert len(ours) == len(merged) and SCALARS not in merged
    assert all(torch.equal(merged[name], value.detach()) for name, value in ours.items())


def test_a_range_does_not_shrink_to_what_is_left_in_the_mean(tmp_path: Path, backbone: Path) -> None:
    """Of a hundred clients one has moved this scalar: the mean has a hundredth of it."""
    place = Place.make(tmp_path, backbone)
    aggregate = Aggregate({"x": np.full(3, 1e-5, np.float32)}, 0.0, ("a", "b", "c"), 100, 100, 1)
    for tuning, shrinks in (({"kind": "fedkseed", "rank": None}, False), ({}, True)):
        plan = plans.load(place.plan(tuning=tuning, training=TRAINING))
        assert plan.value_range is not None
        after = following(plan, Bounds({"x": plan.value_range}), aggregate)
        assert (after.ranges["x"] < plan.value_range) is shrinks


@pytest.mark.parametrize("kind", ["mezo", "fedkseed"])
@pytest.mark.parametrize("wrong", [{"optimizer": "adamw"}, {"momentum": 0.5}, {"proximal_mu": 0.1}])
def test_a_plan_must_ask_for_plain_steps(tmp_path: Path, backbone: Path, kind: str, wrong: dict[str, Any]) -> None:
    place = Place.make(tmp_path, backbone)
    plan = place.plan(tuning={"kind": kind, "rank": None}, training=TRAINING | wrong)
    with pytest.raises(PlanError, match=r'makes plain steps of its own: use training\.optimizer = "sgd"'):
        plans.load(plan)


@pytest.mark.slow
def test_the_builtin_backbone_learns_under_secure_aggregation(tmp_path: Path, sizes: list[int]) -> None:
    """Four clients of the standard library's prose; in three times thirty steps it learns little, but it does."""
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "fedkseed"\n[data]\nmax_length = 64\n'
        '[training]\nrounds = 3\nsteps = 30\noptimizer = "sgd"\nlearning_rate = 5e-4\nmax_grad_norm = 5.0\n'
        "[cohort]\nsize = 4\n"
    )
    assert plans.load(plan).protection.kind == "secagg"
    result = simulate(Request(plan, clients=4, runs=tmp_path / "runs"), Silent())
    losses = [record.eval_loss for record in result.rounds]
    assert losses[0] is not None and losses[-1] is not None
    assert losses[-1] < losses[0] - 0.06
    assert max(sizes) < LIMIT

"""Exact averages through whole rounds: halves of an adapter that take turns, and parts that never leave a client."""

from __future__ import annotations

import itertools
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import Place, Silent, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.export import export
from farfield.coordinator.results import Result
from farfield.coordinator.runs import Checkpoint, RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import Faults, Fleet, sources
from farfield.edge_client.local_state import LocalState
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.protocols.errors import MalformedMessage, PlanError, RunError, TuningError
from farfield.protocols.messages import Evaluate, Evaluated, Task, Train, Trained
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

hf: Any = transformers  # whose constructors are untyped

# `peft` 0.21 asks the plain transformers model for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALTERNATE = {"alternate": True}
LOCAL = {"local_b": True}


class Killed(Exception):
    """Stands for a process that ends where it stands."""


class KilledIn(Silent):
    """Ends the simulation when `done` clients have done their part of `activity` in a round."""

    def __init__(self, number: int, activity: str, done: int) -> None:
        self._at = number, activity, done

    def on_client(self, *event: object) -> None:
        if event[:3] == self._at:
            raise Killed


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    return Place.make(tmp_path, backbone)


def planned(place: Place, tuning: dict[str, Any], **sections: dict[str, Any]) -> None:
    place.plan(**{"tuning": tuning, "protection": {"kind": "sealed"}} | sections)


def go(place: Place, observer: Silent | None = None, **request: Any) -> Result:
    asked = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs")
    return simulate(replace(asked, **request), observer or Silent())


def resumed(place: Place, folder: Path) -> Result:
    return simulate(Request(place.path / "plan.toml", runs=place.path / "runs", resume=str(folder)), Silent())


def checkpoints(folder: Path) -> list[Checkpoint]:
    run = RunFolder.open(folder)
    return [run.load(number) for number in run.rounds()]


def at(place: Place) -> tuple[Bench, Fleet]:
    plan = plans.load(place.path / "plan.toml")
    bench = Bench(plan, place.path / "backbone")
    return bench, Fleet(plan, bench, sources(None, place.path / "data"), place.path / "local")


def moved(before: State, after: State) -> set[str]:
    return {name.split(".lora_")[1][0] for name in before if not np.array_equal(before[name], after[name])}


def test_rolora_moves_b_in_odd_rounds_and_a_in_even_ones(place: Place) -> None:
    planned(place, ALTERNATE, training={"rounds": 4})
    result = go(place)
    saved = checkpoints(result.folder)
    adapters = [one.adapter for one in saved]
    assert [moved(*pair) for pair in itertools.pairwise(adapters)] == [{"B"}, {"A"}, {"B"}, {"A"}]
    values = {half: 4 * sum(a.size for n, a in adapters[0].items() if f".lora_{half}." in n) for half in "AB"}
    for record, half in zip(result.rounds[1:], "BABA", strict=True):
        evaluated = 3 * 1000
        assert 3 * values[half] < record.bytes_up < 3 * (values[half] + 4000) + evaluated
        assert record.bytes_down > 6 * sum(values.values())  # both halves, for training and for evaluating
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_rolora_resumes_with_the_moments_of_the_half_that_rests(place: Place) -> None:
    planned(place, ALTERNATE, training={"rounds": 4}, aggregation={"server_optimizer": "adam", "learning_rate": 0.01})
    whole = go(place)
    with pytest.raises(Killed):
        go(place, KilledIn(3, "training", 2))
    (other,) = set(place.runs()) - {whole.folder}
    assert resumed(place, other).adapter_digest == whole.adapter_digest
    moments = checkpoints(whole.folder)[-1].moments
    assert moments.first.keys() == moments.second.keys() == checkpoints(whole.folder)[0].adapter.keys()


@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_trains_the_half_of_the_round_and_sends_nothing_else(number: int, place: Place) -> None:
    planned(place, ALTERNATE)
    bench, fleet = at(place)
    generator = np.random.default_rng(0)
    start = {name: generator.normal(0, 0.1, one.shape).astype(np.float32) for name, one in bench.adapter().items()}
    task = Task("run", number, fleet.names[0], bench.plan.digest, Train(pack_state(start, "float32")), 3)
    outcome = Worker(fleet.names[0], bench, lambda: fleet.data(fleet.names[0])).outcome(task)
    assert isinstance(outcome, Trained)
    half = ".lora_B." if number == 1 else ".lora_A."
    assert outcome.update.keys() == {name for name in start if half in name}
    assert all(change.any() for change in unpack_state(outcome.update).values())
    left = bench.adapter()
    assert all(np.array_equal(left[name], start[name]) for name in start if half not in name)
    assert bench.tuned.trainable().keys() == start.keys(), "the next task may be another half's"


@pytest.fixture
def personal(place: Place) -> Result:
    planned(place, LOCAL, training={"rounds": 3, "steps": 4, "learning_rate": 0.05}, cohort={"size": 2})
    return go(place)


def b_of(folder: Path, client: str) -> State:
    found = LocalState(folder / "local" / client).after(3)
    assert found is not None
    return found


def test_fedsa_shares_a_and_every_client_has_a_b_of_its_own(place: Place, personal: Result) -> None:
    first, *_, last = (one.adapter for one in checkpoints(personal.folder))
    assert moved(first, last) == {"A"}
    assert all(".lora_A." in name for name in last)
    clients = sorted(path.name for path in (personal.folder / "local").iterdir())
    assert len(clients) == 3
    values = 4 * sum(array.size for array in last.values())
    assert all(record.bytes_up < 2 * (values + 4000) + 3000 for record in personal.rounds)
    owns = [b_of(personal.folder, client) for client in clients]
    assert len({digest(own) for own in owns}) == 3
    assert all(".lora_B." in name for own in owns for name in own)
    for path in (personal.folder / "local").rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert personal.eval_loss_before is not None
    assert personal.eval_loss_after is not None
    assert personal.eval_loss_after < personal.eval_loss_before - 0.05


def test_fedsa_measures_each_client_with_its_own_b(place: Place, personal: Result) -> None:
    bench, fleet = at(place)
    adapter = checkpoints(personal.folder)[-1].adapter
    name, other = fleet.names[:2]
    task = Task("run", 3, name, bench.plan.digest, Evaluate(pack_state(adapter, "float32")), 3)

    def measured(whose: Path) -> Evaluated:
        outcome = Worker(name, bench, lambda: fleet.data(name), kept=LocalState(whose)).outcome(task)
        assert isinstance(outcome, Evaluated)
        return outcome

    own, foreign, none = (measured(personal.folder / "local" / client).loss for client in (name, other, "nobody"))
    assert len({own, foreign, none}) == 3
    # B is zero at first, so one that never trained computes as the backbone does, whatever A is.
    bench.load({key: np.zeros_like(one) for key, one in adapter.items()})
    untuned = measured(personal.folder / "local" / "nobody").loss
    assert none == untuned


@pytest.mark.parametrize(("activity", "done"), [("training", 1), ("training", 2), ("evaluating", 1), ("evaluating", 3)])
def test_fedsa_resumes_to_the_same_digest_wherever_it_was_killed(place: Place, activity: str, done: int) -> None:
    """Clients have saved what they keep, and the round's checkpoint was not written."""
    planned(place, LOCAL, training={"rounds": 4}, cohort={"size": 2})
    whole = go(place)
    with pytest.raises(Killed):
        go(place, KilledIn(3, activity, done))
    (other,) = set(place.runs()) - {whole.folder}
    assert len(checkpoints(other)) == 3
    again = resumed(place, other)
    assert again.adapter_digest == whole.adapter_digest
    assert again.eval_loss_after == whole.eval_loss_after
    files = {
        path.relative_to(whole.folder): path.read_bytes() for path in (whole.folder / "local").rglob("*.safetensors")
    }
    assert files
    assert files == {path.relative_to(other): path.read_bytes() for path in (other / "local").rglob("*.safetensors")}


def test_fedsa_with_faults_comes_out_the_same_twice(place: Place) -> None:
    planned(place, LOCAL)
    faults = Faults(dropout=0.3, stragglers=0.3)
    assert go(place, faults=faults).adapter_digest == go(place, faults=faults).adapter_digest


def test_fedsa_has_a_yardstick_too(place: Place) -> None:
    planned(place, LOCAL, training={"rounds": 2, "steps": 4, "learning_rate": 0.05})
    result = go(place, compare=True)
    assert result.centralised is not None
    assert result.eval_loss_before is not None
    assert result.centralised.eval_loss is not None
    assert result.centralised.eval_loss < result.eval_loss_before


def test_the_shared_part_alone_is_not_written_as_an_adapter(personal: Result, tmp_path: Path) -> None:
    assert not (personal.folder / "adapter").exists()
    assert json.loads((personal.folder / "result.json").read_text())["adapter"] is None
    with pytest.raises(TuningError, match=r"what they share changes nothing by itself\. Give --client NAME"):
        export(personal.folder, tmp_path / "out", merged=False)
    shutil.rmtree(personal.folder / "local")
    with pytest.raises(TuningError, match="never left the clients"):
        export(personal.folder, tmp_path / "out", merged=False)
    assert not (tmp_path / "out").exists()


def test_each_clients_own_adapter_can_be_exported(place: Place, personal: Result, backbone: Path) -> None:
    bench, _ = at(place)
    last = checkpoints(personal.folder)[-1].adapter
    ids = torch.tensor([[5, 40, 41, 42, 43, 44, 45, 46]])
    seen = []
    for client in ("client-000.jsonl", "client-001.jsonl"):
        out = place.path / client
        assert export(personal.folder, out, merged=False, client=client) == 3
        saved = load_file(out / "adapter_model.safetensors")
        assert all(tensor.any() for tensor in saved.values())
        plain = hf.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, attn_implementation="eager")
        loaded = peft.PeftModel.from_pretrained(plain, str(out)).eval()
        bench.load(last, b_of(personal.folder, client))
        with torch.no_grad():
            ours = bench.tuned.model(input_ids=ids).logits
            torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=0, atol=1e-5)
        seen.append(ours)
    assert not torch.equal(*seen)
    with pytest.raises(TuningError, match=r"Did you mean 'client-00.\.jsonl'"):
        export(personal.folder, place.path / "nobody", merged=False, client="client-00.jsonl")


def test_where_all_share_one_adapter_nobody_has_an_own_one(place: Place) -> None:
    planned(place, {}, training={"rounds": 1})
    result = go(place)
    assert not (result.folder / "local").exists()
    with pytest.raises(TuningError, match="all clients share one adapter"):
        export(result.folder, place.path / "out", merged=False, client="client-000.jsonl")


def test_a_coordinator_cannot_ask_for_what_stays_at_home(place: Place) -> None:
    """One that names B among what it sends gets no update of B."""
    planned(place, LOCAL)
    bench, fleet = at(place)
    name = fleet.names[0]
    for sent in (bench.adapter() | bench.own(), bench.own()):
        task = Task("run", 1, name, bench.plan.digest, Train(pack_state(sent, "float32")), 3)
        worker = Worker(name, bench, lambda: fleet.data(name), kept=fleet.kept(name))
        with pytest.raises(MalformedMessage, match="not those that this Plan's tuning method trains here"):
            worker.outcome(task)
    assert not (place.path / "local").exists()


def test_a_client_without_a_place_for_its_own_part_says_so(place: Place) -> None:
    planned(place, LOCAL)
    bench, fleet = at(place)
    task = Task("run", 1, "ann", bench.plan.digest, Train(pack_state(bench.adapter(), "float32")), 3)
    with pytest.raises(PlanError, match="no place to keep it"):
        Worker("ann", bench, lambda: fleet.data(fleet.names[0])).outcome(task)


def test_flowers_engine_refuses_parts_that_stay_at_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from farfield.coordinator import engine

    monkeypatch.setattr(engine, "check", lambda: None)
    planned(place, LOCAL)
    with pytest.raises(RunError, match="Leave --engine flower out"):
        go(place, flower=engine.Resources())
    assert not place.runs()


def test_fed_sb_learns_and_sends_squares(place: Place) -> None:
    planned(place, {"kind": "fed-sb", "rank": 8}, training={"rounds": 4, "steps": 5, "learning_rate": 0.05})
    result = go(place)
    adapter = checkpoints(result.folder)[-1].adapter
    assert {array.shape for array in adapter.values()} == {(8, 8)}
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.05
    assert go(place).adapter_digest == result.adapter_digest

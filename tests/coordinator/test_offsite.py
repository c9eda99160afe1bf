"""Runs that ship an emulator: simulated from end to end, and what is refused before anything leaves its owner."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_simulation import Quiet
from tiny import Place, write_backbone
from transformers import AutoModelForCausalLM

from farfield.coordinator.export import export
from farfield.coordinator.home import Home
from farfield.coordinator.results import Result
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.submission import submit
from farfield.emulator import bundle, layout, plugin
from farfield.emulator.build import TEXT
from farfield.emulator.distill import Check
from farfield.protocols.errors import BundleError, EmulatorError, MalformedMessage, PlanError, RunError
from farfield.protocols.tensors import State

DELIVERY = {"kind": "emulator", "first": 1, "last": 1}
DISTILLATION = {"steps": 4, "check_every": 2, "batch_size": 2}


class Watching(Quiet):
    """Keeps what is told of emulators too."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.checks: list[int] = []

    def on_stage(self, what: str) -> None:
        self.stages.append(what)

    def on_check(self, check: Check) -> None:
        self.checks.append(check.step)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), layers=5)


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    made = Place.make(tmp_path, backbone)
    (made.path / "public.txt").write_text(
        "".join(f"the fox sat on the moon and saw {n} of the stars\n" for n in range(99)), encoding="utf-8"
    )
    made.plan(delivery=DELIVERY, distillation=DISTILLATION)
    return made


def go(place: Place, observer: Watching | None = None, **request: Any) -> Result:
    asked = Request(
        place.path / "plan.toml",
        data=place.path / "data",
        runs=place.path / "runs",
        public=place.path / "public.txt",
    )
    return simulate(replace(asked, **request), observer or Watching())


def test_a_run_on_an_emulator_from_end_to_end(place: Place, backbone: Path) -> None:
    watching = Watching()
    result = go(place, watching, compare=True)
    folder = RunFolder.open(result.folder)
    assert layout.is_emulator(folder.emulator_folder)
    assert watching.checks == [0, 2, 4], "it was distilled"
    records = folder.records()
    assert all(record.emulator_loss and record.plug_in_loss for record in records)
    assert result.offsite is not None and result.offsite.emulator == result.eval_loss_after
    assert result.offsite.full < result.offsite.zero_shot
    assert result.offsite.plug_in < result.offsite.zero_shot, "what was learnt on the emulator is of use"

    merged = place.path / "merged"
    export(result.folder, merged, merged=True)
    before, after = (dict(AutoModelForCausalLM.from_pretrained(one).named_parameters()) for one in (backbone, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.4.")) for name in changed)


def test_plugging_in_is_putting_the_trained_weights_into_the_backbone(place: Place, backbone: Path) -> None:
    place.plan(delivery=DELIVERY, distillation=DISTILLATION, tuning={"kind": "full", "rank": None})
    result = go(place)
    folder = RunFolder.open(result.folder)
    adapter = folder.load(3).adapter
    export(result.folder, place.path / "merged", merged=True)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in adapter.items()}, strict=False)
    ids = torch.arange(2, 18).view(1, 16)
    by_hand = model(input_ids=ids).logits
    exported = AutoModelForCausalLM.from_pretrained(place.path / "merged")
    torch.testing.assert_close(exported(input_ids=ids).logits, by_hand)
    assert {name.split(".")[2] for name in adapter} == {"0", "4"}


def test_an_emulator_that_was_built_before(place: Place) -> None:
    first = go(place)
    emulator = RunFolder.open(first.folder).emulator_folder
    watching = Watching()
    second = go(place, watching, emulator=emulator, public=None)
    assert not watching.checks, "nothing is distilled"
    assert second.adapter_digest == first.adapter_digest
    assert (second.folder / "text.safetensors").read_bytes() == (emulator / TEXT).read_bytes()


@pytest.mark.parametrize(
    "method", [{"kind": "lora", "rank": 2}, pytest.param({"kind": "full", "rank": None}, marks=pytest.mark.slow)]
)
def test_distilling_anew_goes_on_where_it_stopped(
    place: Place, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plan(
        delivery=DELIVERY | {"redistill_every": 1},
        distillation=DISTILLATION,
        tuning=method,
        training={"rounds": 3, "learning_rate": 0.05},
    )
    whole = go(place)
    folder = RunFolder.open(whole.folder)
    made = sorted(path.name for path in folder.emulators_folder.iterdir())
    assert made == ["round-0001", "round-0002"]
    records = [layout.read(folder.emulators_folder / name) for name in made]
    assert [record.round for record in records] == [1, 2]
    assert [record.distilled for record in records] == [8, 12]
    outer = load_file(folder.emulator_folder / "model.safetensors")
    again = load_file(folder.emulators_folder / "round-0002" / "model.safetensors")
    differ = {name.split(".")[2] for name in outer if not torch.equal(outer[name], again[name])}
    assert differ and not differ & {"0", str(len(records[0].layout.origins) - 1)}, "only the stand-in is another"

    class Killed(BaseException): ...

    stopped = replace(Request(place.path / "plan.toml"), data=place.path / "data", runs=place.path / "other")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(plugin, "redistilled", _killed_in_round(2, Killed))
        simulate(replace(stopped, public=place.path / "public.txt"), Watching())
    run = place.run("other")
    assert RunFolder.open(run).rounds() == [0, 1, 2]
    resumed = simulate(replace(stopped, resume=str(run)), Watching())
    assert resumed.adapter_digest == whole.adapter_digest


def test_emulators_take_turns(place: Place) -> None:
    """In each round clients get the emulator whose turn it is, and what they tune on one goes on on the next."""
    place.plan(delivery=DELIVERY, distillation=DISTILLATION, emulator={"select": "uniform", "blocks": 1, "turns": 3})
    result = go(place)
    folder = RunFolder.open(result.folder)
    middles = [layout.read(layout.at_turn(folder.emulator_folder, turn)).layout.middle for turn in range(3)]
    assert middles == [(1,), (2,), (3,)]
    losses = [record.emulator_loss for record in folder.records()]
    assert len(set(losses)) == 4, "another emulator is measured after each round"
    resumed = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs")
    (folder.path / "checkpoints" / "round-0003.safetensors").unlink()
    (folder.path / "checkpoints" / "round-0002.safetensors").unlink()
    again = simulate(replace(resumed, resume=str(folder.path)), Watching())
    assert again.adapter_digest == result.adapter_digest

    place.plan(delivery=DELIVERY, distillation=DISTILLATION, emulator={"select": "uniform", "blocks": 2, "turns": 2})
    with pytest.raises(EmulatorError, match="2 stand-ins of 2 blocks each, and the middle has 3"):
        go(place)


def test_an_emulator_of_another_backbone_is_refused(place: Place, tmp_path: Path) -> None:
    emulator = RunFolder.open(go(place).folder).emulator_folder
    (place.path / "backbone").unlink()
    other = write_backbone(tmp_path / "other", layers=5)
    (other / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    (place.path / "backbone").symlink_to(other)
    with pytest.raises(EmulatorError, match="made from another backbone"):
        go(place, emulator=emulator)


def test_a_part_that_stays_at_home_cannot_be_plugged_in(place: Place) -> None:
    place.plan(delivery=DELIVERY, distillation=DISTILLATION, tuning={"local_b": True})
    with pytest.raises(PlanError, match="keeps a part of its adapter at home"):
        go(place)


def _killed_in_round(number: int, error: type[BaseException]) -> Any:
    original = plugin.redistilled

    def redistilled(*arguments: Any) -> None:
        progress = arguments[-1]
        if arguments[4] == number:

            def on_step(done: int, steps: int, loss: float) -> None:
                if done == 3:
                    raise error

            progress.on_step = on_step
        original(*arguments)

    return redistilled


def test_an_adapter_of_another_backbone_is_refused(place: Place, tmp_path: Path) -> None:
    result = go(place)
    folder = RunFolder.open(result.folder)
    last = folder.load(3)
    name, value = next(iter(last.adapter.items()))
    damaged: State = last.adapter | {name: np.zeros((value.shape[0] + 1, *value.shape[1:]), np.float32)}
    folder.save(replace(last, adapter=damaged))
    out = tmp_path / "out"
    with pytest.raises(MalformedMessage, match="tensors are not those"):
        export(result.folder, out, merged=True)
    assert not out.exists()


def test_what_does_not_fit_is_said_before_any_work(place: Place) -> None:
    result = go(place)
    emulator = RunFolder.open(result.folder).emulator_folder
    place.plan(delivery=DELIVERY, distillation=DISTILLATION | {"steps": 6})
    with pytest.raises(EmulatorError, match="made for another Plan"):
        go(place, emulator=emulator)
    with pytest.raises(EmulatorError, match=r"there is no emulator\.json"):
        go(place, emulator=place.path / "backbone")
    place.plan(delivery={"kind": "emulator", "first": 3, "last": 2})
    with pytest.raises(EmulatorError, match="leave nothing between them in 5 blocks"):
        go(place)
    place.plan()
    with pytest.raises(RunError, match="--emulator and --public are for"):
        go(place)


class TestOwnerOnly:
    """A backbone that is its owner's only is never shipped, whoever asks for it and how."""

    def test_a_plan_that_says_so(self, place: Place) -> None:
        place.plan(model={"owner_only": True})
        with pytest.raises(PlanError, match="the backbone never leaves its owner"):
            go(place)

    @pytest.fixture
    def marked(self, place: Place, tmp_path: Path) -> Place:
        own = write_backbone(tmp_path / "own", layers=5)
        (own / bundle.OWNER_ONLY).touch()
        (place.path / "backbone").unlink()
        (place.path / "backbone").symlink_to(own)
        return place

    def test_no_bundle_is_made_of_it(self, marked: Place) -> None:
        with pytest.raises(BundleError, match="never leaves its owner"):
            bundle.describe(marked.path / "backbone")
        with pytest.raises(BundleError, match="holds no emulator"):
            bundle.describe(marked.path / "backbone", "emulator")

    def test_no_simulation_hands_it_out(self, marked: Place) -> None:
        marked.plan()
        with pytest.raises(PlanError, match="marked OWNER_ONLY"):
            go(marked, public=None)
        assert not marked.runs()

    def test_no_run_ships_it(self, marked: Place, tmp_path: Path) -> None:
        home = Home.create(tmp_path / "home", ["localhost"], datetime.now(UTC))
        store = home.store()
        try:
            marked.plan()
            with pytest.raises(BundleError, match="never leaves its owner"):
                submit(marked.path / "plan.toml", home, store, datetime.now(UTC))
            assert not store.runs()
            marked.plan(delivery=DELIVERY, distillation=DISTILLATION)
            with pytest.raises(PlanError, match="--emulator"):
                submit(marked.path / "plan.toml", home, store, datetime.now(UTC))
            emulator = RunFolder.open(go(marked).folder).emulator_folder
            run = submit(marked.path / "plan.toml", home, store, datetime.now(UTC), emulator)
            shipped = store.bundle(run.backbone)
            assert shipped is not None and shipped.kind == "emulator" and shipped.folder == emulator.resolve()
            assert RunFolder.open(run.folder).text.exists()
        finally:
            store.close()


def test_the_emulator_is_not_the_backbone_by_another_name(place: Place, backbone: Path) -> None:
    """Of what is shipped, nothing equals a tensor of the middle, and the bytes shipped are those of the bundle."""
    emulator = RunFolder.open(go(place).folder).emulator_folder
    given = load_file(emulator / "model.safetensors")
    middle = {
        name: tensor
        for name, tensor in load_file(backbone / "model.safetensors").items()
        if name.startswith(("model.layers.1.", "model.layers.2.", "model.layers.3."))
    }
    same = [
        (one, name)
        for one, tensor in given.items()
        for name, secret in middle.items()
        if tensor.shape == secret.shape and torch.equal(tensor.float(), secret.float()) and not (secret == 1).all()
    ]
    assert not same, "every weight of the stand-in has been trained"
    manifest = bundle.describe(emulator, "emulator")
    assert {file.path for file in manifest.files} == {
        "config.json", "emulator.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip

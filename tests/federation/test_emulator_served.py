"""A run that ships an emulator, between real processes: what clients get, and what never reaches them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Federation, federation
from safetensors.torch import load_file
from toy import CLIENTS, equal, place, plan

from farfield.coordinator.runs import RunFolder
from farfield.coordinator.storage import RunState
from farfield.emulator import bundle

pytestmark = pytest.mark.slow

DELIVERY = {"kind": "emulator", "first": 1, "last": 1, "redistill_every": 2}
DISTILLATION = {"steps": 4, "check_every": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = place(tmp_path_factory.mktemp("toy"), layers=5)
    (folder / "backbone" / bundle.OWNER_ONLY).touch()
    sentences = (f"the fox sat on the moon and saw {number} of the stars\n" for number in range(99))
    (folder / "public.txt").write_text("".join(sentences), encoding="utf-8")
    return folder


def offsite(toy: Path) -> Path:
    return plan(toy, 3, 2, len(CLIENTS), delivery=DELIVERY, distillation=DISTILLATION, model={"owner_only": True})


def test_clients_tune_what_they_never_get(toy: Path, tmp_path: Path) -> None:
    file, emulator = offsite(toy), toy / "emulator"
    with federation(tmp_path) as running:
        running.command("coordinator", "emulator", "build", file, emulator, "--data", toy / "public.txt")
        running.serve()
        for name in CLIENTS:
            running.join(name, toy / "data" / name)
        running.command(
            "coordinator", "run", file, "--home", running.home, "--emulator", emulator, "--json", tmp_path / "out.json"
        )
        run = json.loads((tmp_path / "out.json").read_text())
        assert run["eval_loss_after"] < run["eval_loss_before"]
        assert all(record["plug_in_loss"] for record in run["rounds"])
        running.command("coordinator", "export", run["run"], tmp_path / "merged", "--merged", "--home", running.home)
        _nothing_of_the_middle_is_at_a_client(running, toy)
        for name in CLIENTS:
            bundles = list((running.path / name).rglob("emulator.json"))
            assert len(bundles) == 2, "the first, and the one that was distilled anew after two rounds"

    runs = tmp_path / "simulated"
    running.command("coordinator", "simulate", file, "--data", toy / "data", "--runs", runs, "--emulator", emulator)
    (simulated,) = runs.iterdir()
    equal(RunFolder.open(Path(run["folder"])), RunFolder.open(simulated))


def test_a_client_that_takes_emulators_only(toy: Path, tmp_path: Path) -> None:
    """It refuses a Plan that would have it fetch a backbone, and fetches nothing."""
    (toy / "backbone" / bundle.OWNER_ONLY).unlink()
    try:
        with federation(tmp_path) as running:
            running.serve()
            for name in CLIENTS:
                home = running.enrol(name, toy / "data" / name)
                settings = home / "edge-client.toml"
                text = settings.read_text(encoding="utf-8")
                before = 'deliveries = ["adapter", "emulator"]'
                assert before in text
                settings.write_text(text.replace(before, 'deliveries = ["emulator"]'), encoding="utf-8")
                running.rejoin(name)
            run = running.submit(plan(toy, 1, 1, len(CLIENTS), seconds=20.0))
            running.reaches(run, 1)
            with running.store() as store:
                (_, last) = store.rounds(run)
            assert last.clients == 0
            assert all("the backbone itself" in problem for problem in last.problems.values())
            assert last.problems.keys() == set(CLIENTS)
            for name in CLIENTS:
                assert not list((running.path / name).rglob("*.safetensors"))
    finally:
        (toy / "backbone" / bundle.OWNER_ONLY).touch()


def test_the_service_never_offers_a_backbone_that_is_its_owners(toy: Path, tmp_path: Path) -> None:
    with federation(tmp_path) as running:
        said = running.command("coordinator", "run", plan(toy, 1, 1, 1), "--home", running.home, status=2)
        assert "it never leaves its owner" in said
        with running.store() as store:
            assert not store.runs(*RunState)


def _nothing_of_the_middle_is_at_a_client(running: Federation, toy: Path) -> None:
    """No file of any client's home holds the bytes of a tensor of the middle, nor a part of 64 of them."""
    middle = {
        name: tensor
        for name, tensor in load_file(toy / "backbone" / "model.safetensors").items()
        if name.startswith(("model.layers.1.", "model.layers.2.", "model.layers.3.")) and tensor.std() > 0
    }
    needles = {name: tensor.numpy().tobytes()[:64] for name, tensor in middle.items()}
    assert len(needles) == 3 * 7
    for name in CLIENTS:
        files = [file for file in (running.path / name).rglob("*") if file.is_file()]
        assert any(file.name == "model.safetensors" for file in files)
        for file in files:
            content = file.read_bytes()
            assert not [needle for needle, raw in needles.items() if raw in content], file

"""From `init` to `export`, as people type it: real processes on loopback, and the same numbers as a simulation's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Federation, federation
from safetensors.torch import load_file

from farfield.coordinator.runs import RunFolder
from farfield.edge_client import stdlib

PLAN = """
[model]
backbone = "builtin:tiny-llama-py"
dtype = "float32"  # in bfloat16 a difference in the last bit of a sum can become one in the third digit of a weight

[tuning]
kind = "lora"
rank = 8

[data]
max_length = 64

[training]
rounds = 3
steps = 5
batch_size = 4
optimizer = "sgd"
momentum = 0.5
learning_rate = 0.02
seed = 11

[cohort]
minimum = 3

[evaluation]
examples = 24

[protection]
kind = "sealed"  # nothing is rounded; secure sums are in test_secure.py
"""
CLIENTS = 3


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A Plan, and a folder with the data of three clients: prose of the standard library."""
    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    for name, texts in stdlib.clients(CLIENTS):
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return tmp_path


def test_a_federation_of_processes_comes_to_what_its_simulation_comes_to(place: Path) -> None:
    plan = place / "plan.toml"
    names = [file.name for file in sorted((place / "data").iterdir())]
    with federation(place) as running:
        running.serve()
        for name in names:
            running.join(name, place / "data" / name)
        printed = running.command("coordinator", "run", plan, "--home", running.home, "--json", place / "out.json")
        run = json.loads((place / "out.json").read_text())
        assert "Federated" in printed and run["run"] in printed
        _each_backbone_was_loaded_once(running, names)
        _all_wait_again(running, names)
        running.command("coordinator", "export", run["folder"], place / "adapter")
        running.command("coordinator", "export", run["run"], place / "merged", "--merged", "--home", running.home)
        listed = json.loads(running.command("coordinator", "runs", "--home", running.home, "--json"))
        assert [(one["state"], one["rounds"]) for one in listed] == [("finished", 3)]

    simulated = _simulated(running, plan, place)
    assert run["plan_digest"] == simulated["plan_digest"]
    assert run["eval_loss_after"] < run["eval_loss_before"]
    assert run["eval_loss_before"] == pytest.approx(simulated["eval_loss_before"], rel=1e-6)
    for real, copy in zip(run["rounds"], simulated["rounds"], strict=True):
        assert real["clients"] == copy["clients"] == CLIENTS
        assert real["train_loss"] == pytest.approx(copy["train_loss"], rel=1e-4)
        assert real["eval_loss"] == pytest.approx(copy["eval_loss"], rel=1e-4)
    for number in range(1, 4):
        ours, theirs = (RunFolder.open(place / one["folder"]).load(number).adapter for one in (run, simulated))
        assert set(ours) == set(theirs)
        for name, array in ours.items():  # replies are added in the order in which they come, so the last bits differ
            np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-6, err_msg=name)
    assert load_file(place / "adapter" / "adapter_model.safetensors")
    assert (place / "merged" / "model.safetensors").stat().st_size > 1_000_000


def _each_backbone_was_loaded_once(running: Federation, names: list[str]) -> None:
    for name in names:
        log = (running.path / f"{name}.log").read_text()
        assert log.count("loading the backbone") == 1, log
        assert log.count("training") == 3, log


def _all_wait_again(running: Federation, names: list[str]) -> None:
    for name in names:
        state = json.loads(running.command("edge-client", "status", "--home", running.path / name, "--json"))["state"]
        assert (state["activity"], state["run"], state["round"]) == ("waiting for a task", None, None)


def _simulated(running: Federation, plan: Path, place: Path) -> dict[str, Any]:
    running.command("coordinator", "simulate", plan, "--data", place / "data", "--json", place / "simulated.json")
    document: dict[str, Any] = json.loads((place / "simulated.json").read_text())
    return document

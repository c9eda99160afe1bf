"""`edge-client doctor`: real processes against a coordinator on loopback, healthy and not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine, went_well
from test_enrol import Coordinator


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with Coordinator().serving() as serving:
        yield serving


@pytest.fixture
def joined(tmp_path: Path, coordinator: Coordinator) -> Machine:
    machine = Machine.with_notes(tmp_path)
    went_well(machine.join(coordinator, "--name", "ward-3"))
    return machine


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Name of each check: whether it is in order, and what was said."""
    lines = re.findall(r"^ *(\d+)\. (\w+(?: port)?) +(ok|PROBLEM) +(.+)$", done.stdout, re.MULTILINE)
    assert [int(number) for number, *_ in lines] == list(range(1, len(lines) + 1))
    return {name: (state, said) for _, name, state, said in lines}


def test_doctor_finds_a_healthy_node_healthy(joined: Machine, coordinator: Coordinator) -> None:
    done = joined.run("doctor")
    found = findings(done)
    assert [name for name, (state, _) in found.items() if state != "ok"] == []
    assert done.returncode == 0
    assert done.stdout.endswith("Everything is in order.\n")
    assert list(found) == [
        "software", "memory", "home", "keys", "enrolment port", "fleet port", "federation port", "federation", "data",
        "disk", "consent",
    ]  # fmt: skip
    assert "torch 2" in found["software"][1] and "no GPU, so the CPU trains" in found["software"][1]
    assert "ward-3, certificate valid until" in found["keys"][1]
    assert f"localhost:{coordinator.fleet_port} answers" in found["fleet port"][1]
    assert "all 2 records" in found["data"][1] and "Seen by" not in done.stdout
    assert found["consent"][1] == (
        'deliveries = ["adapter", "emulator"], protections = ["sealed", "secagg"], min_cohort = 1, min_sum = 3'
    )


def test_doctor_names_every_problem_and_goes_on(tmp_path: Path) -> None:
    machine = Machine.with_notes(tmp_path)
    with Coordinator().serving() as coordinator, Coordinator().serving() as other:
        went_well(machine.join(coordinator, "--name", "ward-3"))
        coordinator_ports = coordinator.fleet_port, other.fleet_port
        file = machine.home / "edge-client.toml"
        text = file.read_text()
        text = text.replace(f"fleet_port = {coordinator_ports[0]}", f"fleet_port = {coordinator_ports[1]}")
        text = text.replace('name = "ward-3"', 'name = "ward-4"').replace("methods = []", 'methods = ["lra"]')
        file.write_text(text)
        (machine.path / "notes.jsonl").write_text('{"text": "Seen by nobody."}\n{"text": ""}\n')
        done = machine.run("doctor")
    assert done.returncode == 1
    found = findings(done)
    wrong = {name: said for name, (state, said) in found.items() if state == "PROBLEM"}
    assert set(wrong) == {"keys", "fleet port", "data", "consent"}
    assert "it is for another node than 'ward-4'" in wrong["keys"]
    assert "is not from the coordinator's authority" in wrong["fleet port"]
    assert "notes.jsonl, line 2: 'text' is empty" in wrong["data"]
    assert "no tuning method 'lra'. Did you mean 'lora'?" in wrong["consent"]
    assert done.stdout.endswith("Problems: 4.\n")

    done = machine.run("doctor")  # now that nothing listens any more
    wrong = {name: said for name, (state, said) in findings(done).items() if state == "PROBLEM"}
    assert set(wrong) == {"keys", "enrolment port", "fleet port", "federation port", "federation", "data", "consent"}
    assert all("nothing listens there" in wrong[f"{name} port"] for name in ("enrolment", "fleet", "federation"))


def test_doctor_knows_that_columns_are_named_by_the_plan(joined: Machine) -> None:
    (joined.path / "notes.jsonl").write_text('{"sentence": "Seen by nobody.", "label": 1}\n')
    state, said = findings(joined.run("doctor"))["data"]
    assert (state, "can be read, but a Plan must name its columns: no column 'text'" in said) == ("ok", True)


def test_doctor_where_nobody_has_joined(tmp_path: Path) -> None:
    done = Machine.with_notes(tmp_path).run("doctor")
    assert done.returncode == 1
    found = findings(done)
    assert {name: state for name, (state, _) in found.items()} == {"software": "ok", "memory": "ok", "home": "PROBLEM"}
    assert "edge-client join" in found["home"][1]

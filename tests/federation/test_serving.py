"""`coordinator serve` as a supervisor starts and stops it, and `coordinator run` as a script gives it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Federation, federation
from toy import place, plan


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path) as made:
        yield made


@pytest.mark.parametrize("service", ["fleet", "control"])
def test_a_port_of_the_superlink_that_is_taken_is_named_until_it_is_free(running: Federation, service: str) -> None:
    port = running.ports[service]
    with socket.create_server(("0.0.0.0" if service == "fleet" else "127.0.0.1", port)):
        serving = running.start("coordinator", "serve", "--home", running.home, log="serve")
        serving.says(f":{port}: the SuperLink cannot listen there. Is another coordinator running?")
        serving.says("Trying again")
    serving.says("Serving as")
    assert serving.output.count("cannot listen") == 1
    assert serving.end() == 0
    assert "Fatal" not in (running.home / "logs" / "superlink.log").read_text()


def test_sigterm_ends_it_and_all_that_it_started_in_order(running: Federation) -> None:
    serving = running.serve()
    assert len(running.descendants()) > 1
    assert serving.end() == 0
    assert running.descendants() == {}
    assert serving.output.splitlines()[-1].endswith("Stopped; unfinished runs go on at the next start.")
    assert "Service        not running\n" in running.command("coordinator", "status", "--home", running.home)


def test_a_run_that_nobody_watches_is_described(running: Federation, tmp_path: Path) -> None:
    asked, file = plan(place(tmp_path / "toy"), rounds=1, steps=1, minimum=3), tmp_path / "out" / "run.json"
    words = (asked, "--home", running.home, "--detach", "--json", file)
    name = running.command("coordinator", "run", *words).strip()
    (listed,) = json.loads(running.command("coordinator", "runs", "--home", running.home, "--json"))
    assert json.loads(file.read_text()) == listed
    assert (listed["run"], listed["state"]) == (name, "queued")

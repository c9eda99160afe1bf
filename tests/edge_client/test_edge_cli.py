"""The `edge-client` command as a person runs it: real processes against a coordinator on loopback."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from click import termui
from machine import COMMAND, Machine, refused, went_well
from test_enrol import Coordinator

from farfield.edge_client.cli import default_name, leave
from farfield.edge_client.home import Home
from farfield.edge_client.resident_state import State
from farfield.protocols.identity import NAME


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine.with_notes(tmp_path)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with Coordinator().serving() as serving:
        yield serving


@pytest.fixture
def joined(machine: Machine, coordinator: Coordinator) -> Machine:
    done = machine.join(coordinator, "--name", "ward-3")
    assert done.returncode == 0, done.stderr
    return machine


# --- join and start ---------------------------------------------------------------------------------------------------


def test_join_says_where_everything_is(machine: Machine, coordinator: Coordinator) -> None:
    said = went_well(machine.join(coordinator))
    home = Home.open(machine.home)
    assert home.settings.data.path == str(machine.path / "notes.jsonl")
    assert re.fullmatch(r".*-[0-9a-f]{4}", home.settings.node.name)
    assert f"Enrolling at {coordinator.address} as {home.settings.node.name} …" in said
    assert str(machine.home / "edge-client.toml") in said
    assert f"edge-client start --home {machine.home}" in said


def test_the_token_may_come_from_the_environment(machine: Machine, coordinator: Coordinator) -> None:
    token = coordinator.invite()
    words = ("join", coordinator.address, "--data", "notes.jsonl", "--no-start")
    assert token not in went_well(machine.run(*words, FARFIELD_TOKEN=token))
    assert token not in machine.run("join", "--help", FARFIELD_TOKEN=token).stdout


def test_the_home_may_be_named(machine: Machine, coordinator: Coordinator) -> None:
    went_well(machine.join(coordinator, "--home", "elsewhere"))
    assert Home.open(machine.path / "elsewhere").settings.coordinator.host == "localhost"
    assert not machine.home.exists()


def test_join_refuses_in_one_line(joined: Machine, coordinator: Coordinator) -> None:
    refused(joined.join(coordinator), "enrolled here already", "`edge-client start`", "`edge-client leave`")
    elsewhere = ("--home", "other")
    refused(joined.join(coordinator, *elsewhere, "--data", "nothing"), "nothing: no such file or folder")
    refused(
        joined.run("join", coordinator.address, "--token", "farfield1.abc", "--data", "notes.jsonl", *elsewhere),
        "--token: the token is damaged",
    )
    refused(
        joined.run("join", "localhost", "--token", "-", "--data", "notes.jsonl", *elsewhere, text="x"),
        "localhost: not an address",
    )


def test_ctrl_c_while_joining(machine: Machine, coordinator: Coordinator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = ["join", f"127.0.0.1:{silent.getsockname()[1]}", "--data", "notes.jsonl", "--name", "ward-3"]
        environment = machine.environment | {"FARFIELD_TOKEN": coordinator.invite()}
        with subprocess.Popen(
            [*COMMAND, *words],
            cwd=machine.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)  # the handshake has begun, and never ends
                process.send_signal(signal.SIGINT)
                _, said = process.communicate()
    assert process.returncode == 130
    assert said.startswith("Stopped; nothing is kept here.") and "have ward-3 revoked" in said
    assert not machine.home.exists()


@pytest.mark.parametrize("command", [["start"], ["status"], ["leave", "--yes"]])
def test_who_has_not_joined(machine: Machine, command: list[str]) -> None:
    refused(machine.run(*command), f"{machine.home}: no edge client has enrolled here")


def test_a_home_that_is_open_to_others_does_nothing(joined: Machine) -> None:
    (joined.home / "keys" / "signing.key").chmod(0o644)
    for command in ("start", "status"):
        refused(joined.run(command), "signing.key: others may use this secret (its mode is 0644)", "chmod -R go=")


def test_commands_that_need_no_torch_do_not_load_it() -> None:
    program = """
import sys
import farfield.edge_client.cli, farfield.edge_client.enrol
print(sorted({"torch", "transformers", "peft", "flwr", "numpy", "pyarrow"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith("farfield.coordinator")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


# --- status -----------------------------------------------------------------------------------------------------------

NOW = datetime(2031, 5, 6, 12, tzinfo=UTC)
STATE = State(7, "abc", True, NOW, "r1", 3, "training", "the network was gone", NOW)


def document(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(went_well(machine.run("status", "--json")))
    return found


def test_status_of_a_node_at_rest(joined: Machine, coordinator: Coordinator) -> None:
    said = went_well(joined.run("status"))
    assert re.search(r"^node +ward-3$", said, re.MULTILINE)
    assert f"fleet port {coordinator.fleet_port}, federation port {coordinator.federation_port}" in said
    assert f"none runs. Start it with: edge-client start --home {joined.home}" in said
    assert re.search(r"^certificate +valid until \d{4}-\d\d-\d\d \(0 days left\)$", said, re.MULTILINE)
    assert "0 B of 50.0 GB" in said
    found = document(joined)
    signing = Home.open(joined.home).keys().signing_key().public_key().public_bytes_raw().hex()
    assert found["signing_key"] == signing and re.search(rf"^signing key +{signing}$", said, re.MULTILINE)
    assert (found["node"], found["running"], found["pid"], found["state"]) == ("ward-3", False, None, None)
    assert found["coordinator"]["federation_port"] == coordinator.federation_port


def test_status_of_a_node_at_work(joined: Machine) -> None:
    home = Home.open(joined.home)
    (home.cache / "ab").mkdir(parents=True)
    (home.cache / "ab" / "weights").write_bytes(bytes(1_500_000))
    with home.held():
        home.save_state(STATE)
        assert f"running ({os.getpid()}), starting" in went_well(joined.run("status"))
        home.save_state(replace(STATE, pid=os.getpid()))
        said = went_well(joined.run("status"))
        assert f"running ({os.getpid()}), connected since 2031-05-06 12:00 UTC, training (run r1, round 3)" in said
        assert "last problem  the network was gone" in said
        assert "1.5 MB of 50.0 GB" in said
        found = document(joined)
        assert (found["running"], found["pid"], found["cache_bytes"]) == (True, os.getpid(), 1_500_000)
        assert (found["state"]["round"], found["state"]["since"]) == (3, "2031-05-06T12:00:00+00:00")
    assert "none runs; it last wrote at 2031-05-06 12:00 UTC" in went_well(joined.run("status"))


# --- leave ------------------------------------------------------------------------------------------------------------


def test_leave_tells_the_coordinator_and_removes_keys_and_cache(joined: Machine, coordinator: Coordinator) -> None:
    (joined.home / "cache").mkdir()
    said = went_well(joined.run("leave", "--yes"))
    assert coordinator.left == ["ward-3"]
    assert "Left." in said and str(joined.home / "edge-client.toml") in said
    assert not (joined.home / "keys").exists() and not (joined.home / "cache").exists()
    assert (joined.home / "edge-client.toml").exists()
    went_well(joined.join(coordinator))


def test_leave_asks_first(joined: Machine, coordinator: Coordinator) -> None:
    refused(joined.run("leave"), "--yes")
    for answer, status in ((b"n\n", 1), (b"y\n", 0)):
        leader, follower = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, "leave"],
            env=joined.environment,
            stdin=follower,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            assert b"Remove keys and cache" in process.stdout.read(30)
            os.write(leader, answer)
            process.communicate()
        os.close(leader)
        os.close(follower)
        assert process.returncode == status
        assert (joined.home / "keys").exists() == (status != 0)
    assert coordinator.left == ["ward-3"]


def test_ctrl_c_when_asked_is_no(joined: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(termui, "visible_prompt_func", interrupted)
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(typer.Exit) as caught:
        leave(joined.home, yes=False, force=False)
    assert caught.value.exit_code == 130
    assert Home.open(joined.home).keys()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_leave_without_a_coordinator(machine: Machine) -> None:
    with Coordinator().serving() as coordinator:
        went_well(machine.join(coordinator))
    refused(machine.run("leave", "--yes"), "nothing listens there", "Nothing was removed", "--force")
    assert Home.open(machine.home).keys()
    done = machine.run("leave", "--yes", "--force")
    assert done.returncode == 0
    assert done.stderr.startswith("The coordinator was not told: ")
    assert "have it revoked there" in done.stdout
    assert not (machine.home / "keys").exists()


def test_leave_of_a_home_whose_settings_are_gone(joined: Machine) -> None:
    (joined.home / "edge-client.toml").unlink()
    refused(joined.run("leave", "--yes"), "the settings are missing", "--force")
    assert joined.run("leave", "--yes", "--force").returncode == 0
    assert not (joined.home / "keys").exists()


def test_leave_while_the_resident_process_works(joined: Machine, coordinator: Coordinator) -> None:
    with Home.open(joined.home).held():
        for more in ((), ("--force",)):
            refused(joined.run("leave", "--yes", *more), f"another edge-client process ({os.getpid()}) runs here")
    assert not coordinator.left
    assert Home.open(joined.home).keys()


# --- Small things -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["ward", "ward.example.org", "my laptop!", "", "...", "-x-", "ü" * 80, "w" * 80])
def test_a_machine_s_name_becomes_a_node_s(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    first, second = default_name(), default_name()
    assert NAME.fullmatch(first) and first[:-4] == second[:-4]
    assert re.fullmatch("[0-9a-f]{4}", first[-4:])

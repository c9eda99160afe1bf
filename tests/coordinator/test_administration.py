"""The commands that look after a coordinator, through the entry point of the real program."""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from in_process import Command, refused, running
from tiny import Ended

from farfield.coordinator.home import Home
from farfield.coordinator.runs import RoundRecord
from farfield.coordinator.storage import Node, Run, RunState, Store
from farfield.protocols.identity import Token

SOON = datetime.now(UTC)
"""A moment during these tests: what a command calls now."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return running(monkeypatch, capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The home that every command finds without being told."""
    made = Home.create(tmp_path / "home", ["coordinator.example", "10.1.2.3"], SOON, enrolment="0.0.0.0:7000")
    monkeypatch.setenv("FARFIELD_COORDINATOR_HOME", str(made.path))
    return made


@pytest.fixture
def store(home: Home) -> Any:
    opened = home.store()
    yield opened
    opened.close()


def enrol(store: Store, name: str) -> None:
    raw = hashlib.sha256(name.encode()).digest()
    store.invite([hashlib.sha256(raw).digest()], SOON, timedelta(hours=1))
    store.redeem(raw, Node(name, raw, raw, raw, raw[:20].hex(), SOON), SOON)


def add_run(store: Store, name: str, folder: Path, age: int = 0) -> None:
    created = SOON - timedelta(minutes=age)
    store.add_run(Run(name, b"{}", "d" * 64, "b" * 64, folder, RunState.QUEUED, "waits for nodes", created))


def went_well(ended: Ended) -> str:
    assert (ended.status, ended.err) == (0, "")
    return ended.out


def document(ended: Ended) -> Any:
    return json.loads(went_well(ended))


def at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


# --- init -----------------------------------------------------------------------------------------------------------


def test_init_makes_a_home_and_says_what_is_next(command: Command, tmp_path: Path) -> None:
    place = tmp_path / "here [red]"
    ended = command(
        *("init", place, "--hostname", "a.example", "--hostname", "10.0.0.1"),
        *("--enrolment-port", 5004, "--federation-port", 5003, "--fleet-port", 5002, "--control-port", 5001),
    )
    said = went_well(ended)
    assert f"Coordinator made in {place}, for a.example, 10.0.0.1.\n" in said
    assert f"Start it with: coordinator serve --home {place}\n" in said
    service = Home.open(place).settings.service
    assert service.hostnames == ("a.example", "10.0.0.1")
    ports = [str(one) for one in (service.enrolment, service.federation, service.fleet, service.control)]
    assert ports == ["0.0.0.0:5004", "0.0.0.0:5003", "0.0.0.0:5002", "127.0.0.1:5001"]
    refused(command("init", place), str(place), "exists already and is not an empty folder")


def test_init_by_itself(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARFIELD_COORDINATOR_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.gethostname", lambda: "this-machine")
    went_well(command("init", "--database", "sqlite:///other.db"))
    made = Home.open(tmp_path / ".farfield" / "coordinator")
    assert made.settings.service.hostnames == ("this-machine",)
    assert (made.path / "other.db").is_file()
    assert document(command("status", "--json"))["database"] == f"sqlite:///{made.path}/other.db"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hostname", "a b"), "'a b' is neither the name nor the IP address of a machine"),
        (("--fleet-port", "9091"), "'fleet' and 'control' have the same port, 9091"),
        (("--database", "oracle://x"), "'oracle' databases are not supported"),
    ],
)
def test_init_refuses_before_anything_is_made(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused(command("init", tmp_path / "home", *arguments), said)
    assert list(tmp_path.iterdir()) == []


# --- invite ---------------------------------------------------------------------------------------------------------


def test_invite_prints_tokens_that_admit_and_nothing_else(command: Command, home: Home, store: Store) -> None:
    ended = command("invite", "--count", 3, "--expires", "7d")
    assert ended.status == 0
    tokens = [Token.parse(line) for line in ended.out.splitlines()]
    assert len({token.secret for token in tokens}) == 3
    assert {token.authority for token in tokens} == {home.authority().fingerprint}
    assert ended.err == (
        "On each machine that is to join, with a token of its own, within 7d:\n"
        "    edge-client join coordinator.example:7000 --token TOKEN --data PATH\n"
    )
    raw = b"k" * 32
    late = datetime.now(UTC) + timedelta(days=7)
    assert store.open_invitations(late - timedelta(minutes=1)) == 3
    assert store.open_invitations(late) == 0
    store.redeem(tokens[0].secret, Node("ann", raw, raw, raw, "ab", SOON), SOON)


@pytest.mark.parametrize(("text", "minutes"), [("1m", 1), ("30m", 30), ("24h", 24 * 60), ("365d", 365 * 24 * 60)])
def test_invitations_last_as_long_as_was_said(command: Command, store: Store, text: str, minutes: int) -> None:
    before = datetime.now(UTC)
    assert command("invite", "--expires", text).status == 0
    after = datetime.now(UTC)
    assert store.open_invitations(before + timedelta(minutes=minutes) - timedelta(milliseconds=1)) == 1
    assert store.open_invitations(after + timedelta(minutes=minutes)) == 0


@pytest.mark.parametrize(
    "text", ["soon", "", "0h", "-1h", "24", "24 h", "1.5h", "1w", "366d", "999999999d", "٣h", "1h30m"]
)
def test_invite_refuses_nonsense(command: Command, store: Store, text: str) -> None:
    refused(command("invite", f"--expires={text}"), "--expires", "as 30m, 24h or 7d")
    assert store.open_invitations(SOON) == 0


def test_an_ipv6_coordinator_is_named_so_that_it_can_be_reached(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Home.create(tmp_path / "six", ["fd00::7"], SOON)
    ended = command("invite", "--home", tmp_path / "six")
    assert "edge-client join [fd00::7]:9094 --token" in ended.err


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_of_a_coordinator_that_was_just_made(command: Command, home: Home) -> None:
    assert went_well(command("status")).splitlines() == [
        "Service        not running",
        f"Home           {home.path}",
        f"Database       sqlite:///{home.path}/farfield.db",
        "Nodes          0 attending of 0 enrolled",
        "Invitations    0 open",
        "Runs           none yet",
        "Certificates   server 364 days, signer 364 days, authority 3649 days",
    ]


@pytest.fixture
def busy(store: Store, home: Home) -> Store:
    """A service that runs, three nodes, of which one attends and one is revoked, and runs in all states but one."""
    began = datetime.now(UTC) - timedelta(seconds=5)
    store.beat(4321, began)
    store.beat(4321, datetime.now(UTC))
    for name in ("ann", "bob", "carol", "dora"):
        enrol(store, name)
    store.attend("ann", "i1", "10.0.0.7", SOON)
    store.attend("bob", "i2", "10.0.0.8", SOON)
    store.absent("bob", "i2", SOON)
    store.attend("dora", "i3", "10.0.0.9", SOON)
    store.revoke("dora", "laptop\nstolen \x1b[31m", SOON)
    for age, name in enumerate(("five", "four", "three", "two", "one")):
        add_run(store, name, home.runs / name, age)
    store.begin("two", 1, SOON)
    store.add_round("two", RoundRecord(0, 0, None, 2.0, None, 0, 0, 0.0))
    store.add_round("two", RoundRecord(1, 3, 1.0, 2.0, None, 0, 0, 0.0))
    store.end("three", RunState.FAILED, "no node has [b]enough[/b] memory: " + "x" * 200, SOON)
    store.end("four", RunState.CANCELLED, "", SOON)
    return store


def test_status_of_a_coordinator_at_work(command: Command, busy: Store) -> None:
    since = busy.serving_since(datetime.now(UTC))
    assert since is not None
    said = went_well(command("status"))
    assert f"Service        running since {at(since)}, process 4321\n" in said
    assert "Nodes          1 attending of 3 enrolled, 1 revoked\n" in said
    assert "Runs           2 queued, 1 running, 1 failed, 1 cancelled\n" in said
    found = document(command("status", "--json"))
    assert found["service"]["running"] is True
    assert (found["service"]["since"], found["service"]["process"]) == (since.isoformat(), 4321)
    assert found["nodes"] == {"attending": 1, "away": 2, "revoked": 1}
    assert found["runs"] == {"queued": 2, "running": 1, "finished": 0, "failed": 1, "cancelled": 1}
    assert found["certificates"] == {"server": 364, "signer": 364, "authority": 3649}


def test_a_service_that_was_killed_does_not_run_and_nobody_attends_it(command: Command, busy: Store) -> None:
    """Whatever it last wrote."""
    last = datetime.now(UTC) - timedelta(seconds=10)
    busy.beat(4321, last)
    said = went_well(command("status"))
    assert f"Service        not running; last seen {at(last)}\n" in said
    assert "Nodes          0 attending of 3 enrolled, 1 revoked\n" in said
    assert document(command("status", "--json"))["service"]["running"] is False
    assert [one["state"] for one in document(command("nodes", "--json"))] == ["away", "away", "away", "revoked"]


@pytest.mark.parametrize(
    ("age", "said"),
    [
        (340, "server 24 days, signer 24 days, authority 3309 days"),
        (366, "server has expired, signer has expired, authority 3283 days"),
    ],
)
def test_status_counts_the_days_of_certificates(command: Command, tmp_path: Path, age: int, said: str) -> None:
    Home.create(tmp_path / "old", ["a"], datetime.now(UTC) - timedelta(days=age))
    assert f"Certificates   {said}\n" in went_well(command("status", "--home", tmp_path / "old"))


# --- nodes and runs -------------------------------------------------------------------------------------------------


def test_nodes_are_listed(command: Command, busy: Store) -> None:
    now = at(SOON)
    width = len("revoked because laptop stolen ?[31m")
    away = f"away since {now}"
    assert went_well(command("nodes")).splitlines() == [
        f"NODE    {'STATE':{width}}   {'ENROLLED':20}   ADDRESS",
        f"ann     {'attending':{width}}   {now}   10.0.0.7",
        f"bob     {away:{width}}   {now}   10.0.0.8",
        f"carol   {'never attended':{width}}   {now}",
        f"dora    revoked because laptop stolen ?[31m   {now}   10.0.0.9",
    ]
    found = {one["node"]: one for one in document(command("nodes", "--json"))}
    assert found["bob"] == {
        "node": "bob",
        "state": "away",
        "enrolled_at": SOON.isoformat(),
        "seen_at": SOON.isoformat(),
        "address": "10.0.0.8",
        "revoked_at": None,
        "revoked_because": None,
        "certificate": hashlib.sha256(b"bob").hexdigest()[:40],
    }
    assert (found["ann"]["state"], found["dora"]["state"]) == ("attending", "revoked")


def test_runs_are_listed_each_on_one_line(command: Command, busy: Store, home: Home) -> None:
    rows = [re.split(r" {2,}", line) for line in went_well(command("runs")).splitlines()]
    assert rows == [
        ["RUN", "STATE", "ROUNDS", "CREATED", "DETAIL"],
        ["one", "queued", "0", at(SOON - timedelta(minutes=4)), "waits for nodes"],
        ["two", "running", "1", at(SOON - timedelta(minutes=3))],
        ["three", "failed", "0", at(SOON - timedelta(minutes=2)), "no node has [b]enough[/b] memory: " + "x" * 200],
        ["four", "cancelled", "0", at(SOON - timedelta(minutes=1))],
        ["five", "queued", "0", at(SOON), "waits for nodes"],
    ]
    found = document(command("runs", "--json"))
    assert [one["run"] for one in found] == ["one", "two", "three", "four", "five"]
    assert found[1] == {
        "run": "two",
        "state": "running",
        "detail": "",
        "rounds": 1,
        "plan_digest": "d" * 64,
        "backbone": "b" * 64,
        "folder": str(home.runs / "two"),
        "created_at": (SOON - timedelta(minutes=3)).isoformat(),
        "started_at": SOON.isoformat(),
        "finished_at": None,
    }


def test_where_there_is_nothing_the_next_step_is_named(command: Command, home: Home) -> None:
    assert went_well(command("nodes")) == "No node has joined yet; `coordinator invite` prints a token for one.\n"
    assert went_well(command("runs")) == "There is no run yet; `coordinator run PLAN.toml` makes one.\n"
    assert document(command("nodes", "--json")) == document(command("runs", "--json")) == []


# --- revoke and cancel ----------------------------------------------------------------------------------------------


def test_revoke(command: Command, store: Store) -> None:
    enrol(store, "ann")
    said = went_well(command("revoke", "ann", "--because", "laptop stolen"))
    node = store.node("ann")
    assert node is not None and node.revoked_at is not None and node.revoked_because == "laptop stolen"
    assert said == f"Node ann is revoked, since {at(node.revoked_at)}. Its name is not given again.\n"
    again = document(command("revoke", "ann", "--because", "other", "--json"))
    assert again["revoked_because"] == "laptop stolen"
    assert again["revoked_at"] == node.revoked_at.isoformat()
    refused(command("revoke", "anne"), "there is no node 'anne'. Did you mean 'ann'?")


def test_revoke_without_a_reason(command: Command, store: Store) -> None:
    enrol(store, "ann")
    went_well(command("revoke", "ann"))
    assert went_well(command("nodes")).splitlines()[1].split()[:3] == ["ann", "revoked", f"{SOON:%Y-%m-%d}"]


def test_cancel(command: Command, busy: Store, home: Home) -> None:
    said = went_well(command("cancel", "two"))
    assert said == f"Run two is cancelled; what it has finished is kept in {home.runs / 'two'}.\n"
    run = busy.run("two")
    assert run is not None and run.state is RunState.CANCELLED and run.finished_at is not None
    assert document(command("cancel", "two", "--json"))["finished_at"] == run.finished_at.isoformat()
    refused(command("cancel", "three"), "three: the run has failed already")
    refused(command("cancel", "tow"), "there is no run 'tow'. Did you mean 'two'?")


# --- Whatever is asked ----------------------------------------------------------------------------------------------

ALL = [("invite",), ("status",), ("nodes",), ("runs",), ("cancel", "x"), ("revoke", "x")]


@pytest.mark.parametrize("arguments", ALL, ids=lambda arguments: arguments[0])
def test_a_home_that_cannot_be_used_gets_one_line(command: Command, home: Home, arguments: tuple[str, ...]) -> None:
    refused(command(*arguments, "--home", home.path / "nowhere"), "nowhere: not a coordinator's home")
    (home.path / "keys").chmod(0o755)
    refused(command(*arguments), "open to others", f"chmod 700 {home.path}/keys")
    (home.path / "keys").chmod(0o700)
    (home.path / "farfield.db").unlink()
    refused(command(*arguments), "farfield.db: no such database")


def test_the_program_itself(tmp_path: Path) -> None:
    """Started from nothing, in a pipe, with as narrow a window as can be; and it needs no torch to be quick."""
    program = Path(sys.executable).with_name("coordinator")
    environment = {**os.environ, "COLUMNS": "20", "FARFIELD_COORDINATOR_HOME": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=True)

    run("init", str(tmp_path / "home"), "--hostname", "localhost")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    Token.parse(run("invite").stdout)
    status = run("status").stdout
    assert "Invitations    1 open\n" in status
    assert "Certificates   server 364 days, signer 364 days, authority 3649 days\n" in status
    code = "import sys, farfield.coordinator.cli as c, atexit; sys.argv[1:] = ['status']; " + (
        "atexit.register(lambda: print({'torch', 'flwr', 'alembic', 'pandas'} & set(sys.modules))); c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")

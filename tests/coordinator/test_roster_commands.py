"""A consortium's roster from its key to a coordinator's home, through the entry point of the real program."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from in_process import Command, refused, running

from farfield.coordinator.home import Home
from farfield.coordinator.storage import Node, Store
from farfield.protocols.errors import HomeError
from farfield.protocols.roster import draw_up, open_roster, sign

SOON = datetime.now(UTC)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `coordinator roster ARGUMENTS` in this process, in an empty folder, up to where it would exit."""
    monkeypatch.chdir(tmp_path)

    return running(monkeypatch, capsys, "roster")


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.create(tmp_path_factory.mktemp("coordinator") / "home", ["coordinator.example"], SOON)


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """Of a coordinator with three nodes, the last of which is revoked."""
    opened = home.store()
    for name in ("bob", "ann", "eve"):
        raw = signing_key(name)
        opened.invite([hashlib.sha256(raw).digest()], SOON, timedelta(hours=1))
        opened.redeem(raw, Node(name, b"fleet" + raw, raw, raw, raw.hex()[:40], SOON), SOON)
    opened.revoke("eve", "", SOON)
    yield opened
    opened.close()


def signing_key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


MEMBERS = {name: signing_key(name) for name in ("ann", "bob")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def made_key(command: Command) -> str:
    ended = command("key", "key.pem")
    assert ended.status == 0
    return ended.out.strip()


def write(name: str, document: Any) -> Path:
    path = Path(name)
    path.write_text(json.dumps(document))
    return path


def hexed(members: dict[str, bytes]) -> dict[str, str]:
    return {name: raw.hex() for name, raw in members.items()}


# --- From one end to the other ----------------------------------------------------------------------------------------


def test_from_a_key_to_the_charters_of_runs(command: Command, home: Home, store: Store) -> None:
    public = made_key(command)
    assert home.roster() == b""

    listed = command("list", "--home", home.path, "--json", "members.json")
    assert listed.out.splitlines() == [
        "NODE   KEY",
        f"ann    {signing_key('ann').hex()}",
        f"bob    {signing_key('bob').hex()}",
    ]
    assert "compare each key with what `edge-client status`" in listed.err

    signed = command("sign", "members.json", "--key", "key.pem", "--out", "roster.json", "--name", "Clinics")
    assert (signed.status, signed.err) == (0, "")
    assert signed.out.startswith(listed.out)
    assert "Roster of 'Clinics': 2 nodes, issued" in signed.out and f"Signed with the key {public}." in signed.out
    assert [path.name for path in sorted(Path().iterdir())] == ["key.pem", "members.json", "roster.json"]

    installed = command("install", "roster.json", "--home", home.path)
    assert (installed.status, installed.err) == (0, "")
    assert f"Signed with the key {public}.\nInstalled in {home.path};" in installed.out
    roster = open_roster(home.roster(), bytes.fromhex(public), datetime.now(UTC))
    assert (roster.consortium, roster.members) == ("Clinics", MEMBERS)
    assert roster.expires == roster.issued + timedelta(days=365)


# --- key --------------------------------------------------------------------------------------------------------------


def test_a_key_is_its_owners_and_is_never_replaced(command: Command) -> None:
    ended = command("key", "key.pem")
    assert re.fullmatch(r"[0-9a-f]{64}\n", ended.out)
    assert "belongs on a machine of the consortium's, never on the coordinator's" in ended.err
    file = Path("key.pem")
    before = file.read_bytes()
    assert mode(file) == 0o600
    refused(command("key", "key.pem"), "key.pem: exists already. Give another place; a key is never replaced.")
    assert file.read_bytes() == before
    refused(command("key", "no/such/place.pem"), "no/such/place.pem: cannot be used: no such file or directory")


# --- list -------------------------------------------------------------------------------------------------------------


def test_a_list_for_programs_is_json_and_nothing_else(command: Command, home: Home, store: Store) -> None:
    ended = command("list", "--home", home.path, "--json", "-")
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == hexed(MEMBERS)


def test_where_nobody_has_joined_the_next_step_is_named(command: Command, home: Home) -> None:
    assert command("list", "--home", home.path).out.startswith("No node has joined yet; `coordinator invite`")


# --- sign -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [0, 1])
def test_a_roster_lasts_as_long_as_was_said(command: Command, days: int) -> None:
    public = bytes.fromhex(made_key(command))
    write("members.json", hexed(MEMBERS))
    for _ in range(2):  # the second one takes the place of the first
        ended = command("sign", "members.json", "--key", "key.pem", "--out", "r", "--expires", days)
        assert ended.status == 0
    roster = open_roster(Path("r").read_bytes(), public, datetime.now(UTC))
    assert roster.expires == (roster.issued + timedelta(days=1) if days else None)
    assert ("good for ever." in ended.out) == (not days)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"ann": "00"}, "malformed: members.ann = "),
        ({"ann": "00" * 32, "bob": "00" * 32}, "'ann' and 'bob' have the same key"),
        ({}, "malformed: members = {}"),
        (["ann"], "malformed: members = ['ann']"),
    ],
)
def test_what_names_no_members_is_not_signed(command: Command, document: object, said: str) -> None:
    made_key(command)
    write("members.json", document)
    refused(command("sign", "members.json", "--key", "key.pem", "--out", "r"), said)
    assert not Path("r").exists()


def test_files_that_are_not_what_they_should_be(command: Command) -> None:
    made_key(command)
    members = write("members.json", hexed(MEMBERS))
    Path("text").write_text("no JSON")
    Path("text").chmod(0o600)
    refused(command("sign", "text", "--key", "key.pem", "--out", "r"), "text: not valid JSON: ")
    refused(command("sign", "none", "--key", "key.pem", "--out", "r"), "none: cannot be used: no such file")
    refused(command("sign", members, "--key", "text", "--out", "r"), "text: not a consortium's private key")
    refused(command("sign", members, "--key", "key.pem", "--out", "no/r"), "no/r: cannot be used: no such file")
    Path("key.pem").chmod(0o640)
    refused(command("sign", members, "--key", "key.pem", "--out", "r"), "others may use this secret (its mode is 0640)")
    assert not Path("r").exists()


# --- install ----------------------------------------------------------------------------------------------------------


def test_nodes_that_are_not_on_the_roster_are_named(command: Command, home: Home, store: Store) -> None:
    members = {"ann": signing_key("another"), "carol": signing_key("carol")}
    Path("r").write_bytes(sign(draw_up("c", members, SOON, None), Ed25519PrivateKey.generate()))
    ended = command("install", "r", "--home", home.path)
    assert ended.status == 0
    assert [line.partition(". Clients")[0] for line in ended.err.splitlines()] == [
        "warning: ann is enrolled, and on the roster with another key",
        "warning: bob is enrolled, and on the roster not at all",
    ]
    assert home.roster() == Path("r").read_bytes()


def test_what_no_client_would_believe_is_not_installed(command: Command, home: Home, store: Store) -> None:
    key = Ed25519PrivateKey.generate()
    good = sign(draw_up("c", MEMBERS, SOON, None), key)
    Path("good").write_bytes(good)
    assert command("install", "good", "--home", home.path).status == 0
    for raw, said in (
        (good.replace(b'"bob"', b'"eve"'), "altered after it was signed"),
        (good[:-1], "malformed: not JSON"),
        (bytes(300_000), "too large"),
        (sign(draw_up("c", MEMBERS, SOON, SOON - timedelta(days=1)), key), "expired at"),
    ):
        Path("bad").write_bytes(raw)
        refused(command("install", "bad", "--home", home.path), "the consortium's roster: ", said)
    refused(command("install", "none", "--home", home.path), "none: cannot be used")
    assert home.roster() == good
    assert not list(home.path.glob("*.partial"))


def test_a_roster_that_cannot_be_read_ends_a_run_with_a_reason(home: Home) -> None:
    home.roster_file.mkdir()
    with pytest.raises(HomeError, match=r"roster\.json: cannot be read: Is a directory"):
        home.roster()

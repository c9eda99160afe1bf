"""The home of an edge client: made whole or not at all, closed to others, held by one, and forgiving to nobody."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from test_edge_settings import CHANGED, SETTINGS
from test_keys import KEYS, pem, refused

from farfield.edge_client.home import Home, enrolled, forget, vacant
from farfield.edge_client.resident_state import State
from farfield.protocols import sealing
from farfield.protocols.envelope import Identity
from farfield.protocols.errors import HomeError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", SETTINGS, KEYS)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_created_is_what_is_opened(home: Home) -> None:
    opened = Home.open(home.path)
    assert opened.settings == SETTINGS
    assert opened.keys() == KEYS
    assert opened.cache == home.path / "cache"


def test_secrets_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = Home.create(tmp_path / "home", SETTINGS, KEYS)
        with made.held():
            pass
        made.save_state(STATE)
    finally:
        os.umask(before)
    for path in (made.path, *made.path.rglob("*")):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_nobody_has_enrolled(tmp_path: Path) -> None:
    assert "no edge client has enrolled here. `edge-client join" in refused(lambda: Home.open(tmp_path))


def test_a_second_home_in_the_same_place_is_refused_and_the_first_unharmed(home: Home) -> None:
    said = refused(lambda: Home.create(home.path, SETTINGS, KEYS))
    assert "`edge-client start`" in said and "`edge-client leave`" in said
    with pytest.raises(HomeError, match="enrolled here already"), vacant(home.path):
        raise AssertionError("never entered")
    assert Home.open(home.path).keys() == KEYS


@pytest.mark.parametrize("name", ["keys", "keys/tls.key", "keys/fleet.key", "keys/signing.key", "keys/sealing.key"])
@pytest.mark.parametrize("bits", [0o040, 0o004, 0o020, 0o001])
def test_a_secret_that_others_may_use_is_refused_in_one_sentence(home: Home, name: str, bits: int) -> None:
    path = home.path / name
    path.chmod(mode(path) | bits)
    for action in (lambda: Home.open(home.path), home.keys):
        said = refused(action)
        assert f"{path}: others may use this secret (its mode is {mode(path):04o})" in said
        assert "chmod -R go=" in said


@pytest.mark.parametrize("name", ["", "edge-client.toml"])
def test_settings_that_everyone_may_change_are_refused(home: Home, name: str) -> None:
    path = home.path / name
    path.chmod(mode(path) | 0o002)
    assert f"{path}: everyone on this machine may change it" in refused(lambda: Home.open(home.path))


@pytest.mark.parametrize("name", ["ca.pem", "tls.pem", "tls.key", "fleet.key", "signing.key", "sealing.key"])
def test_a_key_that_is_missing_is_named(home: Home, name: str) -> None:
    (home.path / "keys" / name).unlink()
    said = refused(lambda: Home.open(home.path).keys())
    assert name in said and "join again" in said


def test_a_renewed_certificate_takes_the_place_of_the_old_one(home: Home) -> None:
    before = sorted(home.path.rglob("*"))
    home.save_certificate(b"renewed")
    opened = Home.open(home.path)
    assert opened.keys() == replace(KEYS, certificate=b"renewed")
    assert opened.settings == SETTINGS
    assert sorted(home.path.rglob("*")) == before
    assert mode(home.path / "keys" / "tls.pem") == 0o600


def test_the_identity_that_was_kept_is_the_one_that_is_used(tmp_path: Path) -> None:
    """What is sealed to the keys that were made is opened with those that are read again, and so with signatures."""
    made = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    Home.create(tmp_path / "home", SETTINGS, replace(KEYS, signing=pem(made.signing), sealing=pem(made.sealing)))
    keys = Home.open(tmp_path / "home").keys()
    kept = keys.identity()
    assert kept.member == made.member
    ephemeral, closed = sealing.seal([b"body key"], made.member.sealing, b"context")
    assert list(sealing.unseal(closed, ephemeral, kept.sealing, b"context")) == [b"body key"]
    made.member.signing.verify(kept.signing.sign(b"reply"), b"reply")
    assert kept.sealing.private_bytes_raw() == keys.sealing_key().private_bytes_raw()


def test_a_wrong_setting_is_said_to_stand_in_the_file_of_this_home(home: Home) -> None:
    file = home.path / "edge-client.toml"
    file.write_text(file.read_text().replace("[cache]", "[cach]"))
    assert refused(lambda: Home.open(home.path)).startswith(f"{file}: unknown key 'cach'")


def test_settings_are_read_anew_at_every_opening(home: Home) -> None:
    file = home.path / "edge-client.toml"
    file.write_text(file.read_text().replace("# max_rounds = 100", "max_rounds = 5"))
    assert Home.open(home.path).settings.consent.max_rounds == 5


def test_settings_that_are_gone_or_no_text(home: Home) -> None:
    file = home.path / "edge-client.toml"
    file.write_bytes(b"\xff")
    assert "not UTF-8 text" in refused(lambda: Home.open(home.path))
    file.unlink()
    assert "the settings are missing" in refused(lambda: Home.open(home.path))


# --- Whole or not at all ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from farfield.edge_client.home import Home
from test_edge_settings import SETTINGS
from test_keys import KEYS
calls, left = 0, int(sys.argv[3])
def traced(call):
    def counting(*args, **kwargs):
        global calls
        calls += 1
        if calls > left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counting
os.fsync, os.open, Path.replace, Path.rename, Path.mkdir = map(
    traced, (os.fsync, os.open, Path.replace, Path.rename, Path.mkdir)
)
Home.create(Path(sys.argv[2]), SETTINGS, KEYS)
print(calls)
"""


def create(path: Path, calls: int) -> subprocess.CompletedProcess[str]:
    """Run `Home.create` in a process of its own that is killed before system call `calls` + 1 of those that write."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path), str(calls)]
    return subprocess.run(command, capture_output=True, text=True)


def test_killed_at_any_write_it_leaves_a_home_or_none_and_the_next_one_can_be_made(tmp_path: Path) -> None:
    whole = create(tmp_path / "whole", 10**6)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    assert calls > 15
    seen = set()
    for number in range(1, calls, 3):
        path = tmp_path / str(number)
        assert create(path, number).returncode == -signal.SIGKILL
        seen.add(enrolled(path))
        if not enrolled(path):
            Home.create(path, SETTINGS, KEYS)
        assert Home.open(path).keys() == KEYS
        assert Home.open(path).settings == SETTINGS
    assert False in seen


def test_a_place_that_is_not_used_is_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), vacant(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with vacant(tmp_path) as previous:
        assert previous is None
    assert (tmp_path / "mine").read_text() == "kept"


def test_only_one_can_enrol_in_a_place(tmp_path: Path) -> None:
    with vacant(tmp_path):
        said = refused(lambda: vacant(tmp_path).__enter__())
    assert f"another edge-client process ({os.getpid()}) runs here" in said


def test_a_place_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(lambda: vacant(tmp_path / "file" / "home").__enter__())
    assert str(tmp_path / "file") in said and "not a directory" in said
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "everyone on this machine may change it" in refused(lambda: vacant(tmp_path / "open").__enter__())


# --- Held by one ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from farfield.edge_client.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_works_in_a_home_and_the_system_frees_it_when_it_is_killed(home: Home) -> None:
    assert home.holder() is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert home.holder() == other.pid
        said = refused(lambda: home.held().__enter__())
        assert f"another edge-client process ({other.pid}) runs here" in said
        other.kill()
        other.wait()
    assert home.holder() is None
    with home.held():
        assert home.holder() == os.getpid()


# --- State, and the end -----------------------------------------------------------------------------------------------

NOW = datetime(2031, 5, 6, 12, tzinfo=UTC)
STATE = State(7, "abc", True, NOW, "r1", 3, "training", None, NOW, 2**64 - 1)


def test_state_reads_back_and_damage_is_no_state(home: Home) -> None:
    assert home.state() is None
    home.save_state(STATE)
    assert home.state() == STATE
    file = home.path / "state.json"
    for damaged in ("", "[]", "{}", file.read_text().replace("since", "sinc"), file.read_text().replace("2031", "x")):
        file.write_text(damaged)
        assert home.state() is None
    assert len(fields(State)) == 10


def test_a_node_that_left_leaves_its_settings_and_a_new_one_finds_them(home: Home) -> None:
    (home.cache / "ab").mkdir(parents=True)
    (home.local / "cd").mkdir(parents=True)
    home.foretold.touch()
    home.save_state(STATE)
    (home.path / "edge-client.toml").write_text(CHANGED.render())
    with home.held():
        forget(home.path)
    assert sorted(path.name for path in home.path.iterdir()) == ["edge-client.toml", "resident.lock"]
    assert not enrolled(home.path)
    with vacant(home.path) as previous:
        assert previous == CHANGED
        Home.create(home.path, SETTINGS, KEYS)
    assert Home.open(home.path).settings == SETTINGS
    assert (home.path / "edge-client.toml.old").read_text() == CHANGED.render()

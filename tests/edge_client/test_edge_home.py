"""The home of an edge client: made whole or not at all, closed to others, held by one, and forgiving to nobody."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from farfield.edge_client import home as homes
from farfield.edge_client.consent import Consent
from farfield.edge_client.home import (
    CacheSettings,
    CoordinatorSettings,
    DataSettings,
    Home,
    Keys,
    NodeSettings,
    Part,
    Settings,
    State,
    data_source,
    forget,
    records,
    vacant,
)
from farfield.edge_client.records import Text
from farfield.protocols import sealing
from farfield.protocols.envelope import Identity
from farfield.protocols.errors import DataError, HomeError, PlanError
from farfield.protocols.plan import Data

SETTINGS = Settings(
    coordinator=CoordinatorSettings(host="c.example", enrolment_port=9094, fleet_port=9092, federation_port=9093),
    node=NodeSettings(name="ward-3"),
    data=DataSettings(path="/data/notes"),
)
KEYS = Keys(b"authority", b"certificate", b"tls secret", b"fleet secret", b"signing secret", b"sealing secret")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", SETTINGS, KEYS)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(HomeError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_keys_do_not_show_secrets() -> None:
    assert "secret" not in repr(KEYS)


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


@pytest.mark.parametrize(
    "read",
    [
        Keys.authority_certificate,
        Keys.node_certificate,
        Keys.tls_key,
        Keys.fleet_key,
        Keys.signing_key,
        Keys.sealing_key,
        Keys.identity,
    ],
)
def test_a_key_that_is_damaged_is_named(read: Callable[[Keys], object]) -> None:
    said = refused(lambda: read(KEYS))
    assert said.startswith("keys/") and "not a" in said


def test_a_renewed_certificate_takes_the_place_of_the_old_one(home: Home) -> None:
    before = sorted(home.path.rglob("*"))
    home.save_certificate(b"renewed")
    opened = Home.open(home.path)
    assert opened.keys() == replace(KEYS, certificate=b"renewed")
    assert opened.settings == SETTINGS
    assert sorted(home.path.rglob("*")) == before
    assert mode(home.path / "keys" / "tls.pem") == 0o600


def pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


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


def test_a_key_of_another_kind_is_refused_by_name() -> None:
    signs, opens = pem(Ed25519PrivateKey.generate()), pem(X25519PrivateKey.generate())
    for keys, said in (
        (replace(KEYS, signing=signs, sealing=signs), "keys/sealing.key: not an X25519 key"),
        (replace(KEYS, signing=opens, sealing=opens), "keys/signing.key: not an Ed25519 key"),
    ):
        assert refused(keys.identity).startswith(said)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_the_file_says_what_every_key_is_for_and_offers_those_that_are_not_set() -> None:
    lines = SETTINGS.render().splitlines()
    for section, model in Settings.model_fields.items():
        assert f"[{section}]" in lines
        kind: Any = model.annotation
        for key in kind.model_fields:
            (at,) = (number for number, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{key} = "))
            assert lines[at - 1].startswith("# ")
    text = SETTINGS.render()
    assert "# max_rounds = 100\n" in text
    offered = text.replace("# max_", "max_")
    assert Settings.parse(offered).consent.max_epsilon == 8.0
    assert Settings.parse(offered).consent.max_rounds == 100
    assert Settings.parse(offered).consent.max_memory_bytes == 16_000_000_000


CHANGED = SETTINGS.model_copy(
    update={
        "data": DataSettings(path="builtin:stdlib/2/3"),
        "cache": CacheSettings(max_bytes=0),
        "consent": Consent(
            methods=("lora", "ia3"),
            max_rounds=7,
            max_backbone_bytes=12_345_678,
            hours="22:00-06:00",
            max_epsilon=2.5,
            delta=1e-7,
        ),
    }
)


def test_what_is_written_reads_back() -> None:
    assert Settings.parse(SETTINGS.render()) == SETTINGS
    assert Settings.parse(CHANGED.render()) == CHANGED


@given(st.text().filter(lambda text: "\0" not in text))
def test_any_path_reads_back(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    settings = SETTINGS.model_copy(update={"data": DataSettings(path=f"/{name}")})
    assert Settings.parse(settings.render()) == settings


WRONG = {
    "max_rouds": ("min_cohort = 1", "max_rouds = 3", "unknown key 'consent.max_rouds'. Did you mean 'max_rounds'?"),
    "section": ("[cache]", "[cach]", "unknown key 'cach'. Did you mean 'cache'?"),
    "port": ("fleet_port = 9092", "fleet_port = 0", "coordinator.fleet_port = 0: "),
    "type": ("fleet_port = 9092", 'fleet_port = "9092"', "coordinator.fleet_port = '9092': "),
    "missing": ('name = "ward-3"', "", "'node.name' is missing"),
    "name": ('name = "ward-3"', 'name = "ward 3"', "node.name: 'ward 3' is no name for a node"),
    "path": ('path = "/data/notes"', 'path = "notes"', "data.path: notes: not an absolute path"),
    "builtin": ('path = "/data/notes"', 'path = "builtin:stdlib/4/3"', "no such builtin data"),
    "hours": ('hours = ""', 'hours = "night"', "consent.hours: 'night' is not a span of hours"),
    "protection": ('"sealed", "secagg"', '"seald"', "consent.protections.0 = 'seald' is not one of 'sealed' or "),
    "no TOML": ("[cache]", "[cache", "not valid TOML: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_one_sentence_about_one_key(home: Home, case: str) -> None:
    old, new, sentence = WRONG[case]
    file = home.path / "edge-client.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    said = refused(lambda: Home.open(home.path))
    assert said.startswith(f"{file}: ") and sentence in said


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


# --- The data's place -------------------------------------------------------------------------------------------------


def test_sources() -> None:
    assert data_source("/data/notes") == Path("/data/notes")
    assert data_source("builtin:stdlib/2/3") == Part(2, 3)
    assert str(Part(2, 3)) == "builtin:stdlib/2/3"
    for wrong in (
        "notes", "", "builtin:stdlib", "builtin:stdlib/0/3", "builtin:stdlib/4/3", "builtin:stdlib/1/3/",
        "builtin:x/1/1",
    ):  # fmt: skip
        with pytest.raises(DataError):
            data_source(wrong)


def test_a_part_is_texts_without_classes() -> None:
    found = list(records(Part(2, 2), Data(), "causal-lm", None))
    assert found and all(isinstance(record, Text) for record in found)
    with pytest.raises(PlanError, match="text without classes"):
        records(Part(1, 2), Data(), "sequence-classification", 2)


def test_a_file_is_read_with_the_columns_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"note": "Kept."}\n')
    assert list(records(tmp_path, Data(text="note"), "causal-lm", None)) == [Text("Kept.")]


# --- Whole or not at all ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from farfield.edge_client.home import Home
from test_edge_home import KEYS, SETTINGS
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
        seen.add(homes.enrolled(path))
        if not homes.enrolled(path):
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
from farfield.edge_client.home import held
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
    home.save_state(STATE)
    (home.path / "edge-client.toml").write_text(CHANGED.render())
    with home.held():
        forget(home.path)
    assert sorted(path.name for path in home.path.iterdir()) == ["edge-client.toml", "resident.lock"]
    assert not homes.enrolled(home.path)
    with vacant(home.path) as previous:
        assert previous == CHANGED
        Home.create(home.path, SETTINGS, KEYS)
    assert Home.open(home.path).settings == SETTINGS
    assert (home.path / "edge-client.toml.old").read_text() == CHANGED.render()

"""`coordinator audit` as a person runs it: real processes, killed, interrupted, misused; and reports that are wrong."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import Ended, Launcher, Place, launcher, write_backbone

AUDIT = ("audit", "plan.toml", "--data", "data", "--key", "auditor.pem", "--attacks", "protocol")
REPORT = Path("audits/plan/report.json")


@pytest.fixture(scope="module")
def command() -> Iterator[Launcher]:
    with launcher() as started:
        yield started


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, backbone: Path, command: Launcher) -> tuple[Place, Ended]:
    """A place with an audit that is done; not to be changed."""
    place = Place.make(tmp_path_factory.mktemp("audited"), backbone, 4)
    return place, command.run(place, *AUDIT, "--json", "copy.json")


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    return Place.make(tmp_path, backbone)


def refused(ended: Ended, *parts: str) -> None:
    """One line that says what is wrong, status 2, and nothing else on stderr."""
    assert ended.status == 2, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert part in ended.err


def findings(place: Place) -> list[dict[str, Any]]:
    """What a report says was found, without how long that took."""
    report = json.loads((place.path / REPORT).read_text())["report"]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in report["findings"]]


def test_an_audit_from_one_command(audited: tuple[Place, Ended]) -> None:
    place, ended = audited
    assert (ended.status, ended.err) == (0, "")
    assert "Protocol self-test: passed" in ended.out and "not tried, for it was not asked for" in ended.out
    assert str(REPORT) in ended.out and str(REPORT.with_suffix(".html")) in ended.out
    assert (place.path / REPORT).read_bytes() == (place.path / "copy.json").read_bytes()
    assert [one["attack"] for one in findings(place)] == ["protocol"]
    page = (place.path / REPORT.with_suffix(".html")).read_text()
    assert "Protocol self-test" in page and "<svg" not in page.split("<body")[0]
    assert str(place.path) not in page and str(place.path) not in (place.path / REPORT).read_text()


def test_a_report_that_holds(audited: tuple[Place, Ended], command: Launcher) -> None:
    place, _ = audited
    key = command.run(place, "audit", "key", "--key", "auditor.pem").out.strip()
    ended = command.run(place, "audit", "verify", REPORT, "--plan", "plan.toml", "--signer", key)
    assert (ended.status, ended.err) == (0, ""), ended.out
    assert "DOES NOT HOLD" not in ended.out and ended.out.count(": holds") >= 5


def test_a_report_that_does_not_hold(audited: tuple[Place, Ended], place: Place, command: Launcher) -> None:
    raw = (audited[0].path / REPORT).read_bytes()
    file = place.path / "report.json"
    file.write_bytes(raw.replace(b'"verdict":"passed"', b'"verdict":"failed"', 1))
    refused(command.run(place, "audit", "verify", file), str(file), "altered after it was signed")
    file.write_bytes(raw[:-20])
    refused(command.run(place, "audit", "verify", file), str(file))
    refused(command.run(place, "audit", "verify", "nowhere.json"), "nowhere.json", "no such file")
    file.write_bytes(raw)
    refused(command.run(place, "audit", "verify", file, "--signer", "abc"), "--signer", "64 hexadecimal digits")
    other = command.run(place, "audit", "verify", file, "--signer", 32 * "ab")
    assert other.status == 1 and "signer: DOES NOT HOLD" in other.out
    place.plan(training={"rounds": 2})
    other = command.run(place, "audit", "verify", file, "--plan", "plan.toml")
    assert other.status == 1 and "Plan given: DOES NOT HOLD" in other.out


def test_a_key_is_kept_from_others_and_one_that_is_none_is_refused(place: Place, command: Launcher) -> None:
    first, again = (command.run(place, "audit", "key", "--key", "deep/key.pem").out for _ in range(2))
    assert first == again and re.fullmatch(r"[0-9a-f]{64}\n", first)
    assert (place.path / "deep" / "key.pem").stat().st_mode & 0o777 == 0o600
    (place.path / "bad.pem").write_text("no key")
    refused(command.run(place, *AUDIT[:-4], "--key", "bad.pem"), "bad.pem", "Ed25519")
    assert not (place.path / "audits").exists()


def test_what_cannot_be_done_is_said_before_anything_is(place: Place, command: Launcher) -> None:
    refused(command.run(place, *AUDIT[:-1], "protocl"), "--attacks", "no attack 'protocl'", "protocol")
    refused(command.run(place, *AUDIT, "--resume"), "audits/plan", "no audit to go on with")
    refused(command.run(place, "audit", "none.toml"), "none.toml", "no such file")
    refused(command.run(place, *AUDIT, "--clients", 9), "data", "9 clients")
    refused(command.run(place, *AUDIT, "--emulator", "somewhere"), "--emulator")
    refused(command.run(place, *AUDIT, "--json", "data/client-000.jsonl/x.json"), "data/client-000.jsonl")
    assert not (place.path / "audits").exists()


def test_an_audit_is_resumed_as_it_began_or_not_at_all(audited: tuple[Place, Ended], command: Launcher) -> None:
    place, _ = audited
    before = findings(place)
    refused(command.run(place, *AUDIT), "audits/plan", "exists already", "--resume")
    refused(command.run(place, *AUDIT, "--resume", "--seed", 5), "audits/plan", "another seed")
    refused(command.run(place, *AUDIT[:-1], "membership", "--resume"), "audits/plan", "another choice of attacks")
    refused(command.run(place, *AUDIT, "--resume", "--clients", 3), "audits/plan", "another number of clients")
    ended = command.run(place, *AUDIT, "--resume")
    assert (ended.status, ended.err) == (0, "") and findings(place) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_audit_that_is_stopped_goes_on_to_the_same_findings(
    place: Place, command: Launcher, how: signal.Signals
) -> None:
    """Stopped in the audited run, after its first round."""
    asked = (*AUDIT[:-1], "membership", "--seed", 3)
    place.plan(protection={"kind": "sealed"})
    ended = command.run(place, *asked, "--out", "whole")
    assert (ended.status, ended.err) == (0, "")
    whole = json.loads((place.path / "whole" / "report.json").read_text())["report"]["findings"][0]
    first = place.path / "audits/plan/federations/audited/checkpoints/round-0001.safetensors"
    running = command.start(place, *asked)
    running.kill_when(first.exists, how)
    ended = running.end()
    if how is signal.SIGINT:
        assert ended.status == 130 and "Traceback" not in ended.err
        assert "What was found is kept; go on with: coordinator audit plan.toml" in ended.err
        assert ended.err.rstrip().endswith("--resume")
    ended = command.run(place, *asked, "--resume")
    assert (ended.status, ended.err) == (0, "")
    (found,) = findings(place)
    assert found == {key: value for key, value in whole.items() if key != "seconds"}


def test_the_list_of_attacks(place: Place, command: Launcher) -> None:
    ended = command.run(place, "audit", "attacks")
    assert (ended.status, ended.err) == (0, "")
    for name in ("protocol", "mechanism", "canaries", "exposure", "membership", "inversion", "backdoor", "emulator"):
        assert re.search(rf"^{name}( \(not by default\))?: ", ended.out, re.MULTILINE)

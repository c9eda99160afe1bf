"""`edge-client audit`: one's own update, attacked before it is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import plan_text, write_backbone, write_clients
from typer.testing import CliRunner

from farfield.edge_client.audit.console import AuditConsole
from farfield.edge_client.auditing import Request, audit
from farfield.edge_client.cli import app
from farfield.protocols.audit.report import opened
from farfield.protocols.errors import AuditError, DataError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "backbone")
    write_clients(tmp_path / "data", 1)
    (tmp_path / "plan.toml").write_text(plan_text(), encoding="utf-8")
    return tmp_path


def request(place: Path, data: str = "data/client-000.jsonl", *, resume: bool = False) -> Request:
    attacks = ["protocol", "backdoor"]
    return Request(place / "plan.toml", str(place / data), place / "out", place / "key.pem", attacks, resume)


def test_a_report_of_ones_own_update(place: Path) -> None:
    made = audit(request(place), AuditConsole(Console(quiet=True)))
    report = opened(made.file.read_bytes(), made.file).report
    assert (report.scope, report.clients, report.data) == ("client", 1, "one client's own data")
    assert [one.attack for one in report.findings] == ["protocol"]
    (backdoor,) = (one for one in report.untried if one.attack == "backdoor")
    assert "takes the other clients" in backdoor.reason
    assert made.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    whole = made.file.read_text(encoding="utf-8")
    assert str(place) not in whole and "the moon and saw" not in whole, "neither paths nor records"


def test_it_is_resumed_or_refused(place: Path) -> None:
    console = AuditConsole(Console(quiet=True))
    first = audit(request(place), console).report.findings
    with pytest.raises(AuditError, match="exists already"):
        audit(request(place), console)
    assert audit(request(place, resume=True), console).report.findings == first
    other = place / "data" / "client-001.jsonl"
    other.write_text(json.dumps({"text": "another record of another owner"}) + "\n", encoding="utf-8")
    with pytest.raises(AuditError, match="another data"):
        audit(request(place, "data/client-001.jsonl", resume=True), console)


def test_what_is_wrong_with_the_data_is_said_first(place: Path) -> None:
    with pytest.raises(DataError):
        audit(request(place, "data/nothing.jsonl"), AuditConsole(Console(quiet=True)))


def test_the_command_prints_where_the_report_is(place: Path) -> None:
    arguments = ["audit", "--plan", "plan.toml", "--data", "data/client-000.jsonl", "--attacks", "protocol"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        done = CliRunner().invoke(app, [*arguments, "--key", "key.pem"])
    assert done.exit_code == 0, done.output
    assert "Protocol self-test: passed" in done.output and "audits/plan-own/report.html" in done.output

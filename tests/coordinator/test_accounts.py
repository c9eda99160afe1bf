"""What runs spend, written down where whoever answers for it can read it, before anything is let out."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from in_process import Command, running
from tiny import plan_text, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.accounts import LEDGER, RunAccounts, accounts
from farfield.coordinator.home import Home
from farfield.coordinator.submission import submit
from farfield.protocols.errors import PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Budget, Ledger
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism, promised

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
CLIENT: dict[str, Any] = {"kind": "client", "noise_multiplier": 4.0, "population": "hospitals"}
UNIFORM = {"weighting": "uniform"}


def text(**privacy: Any) -> str:
    return plan_text(aggregation=UNIFORM, privacy=CLIENT | privacy)


def plan_of(**privacy: Any) -> Plan:
    return plans.parse(text(**privacy))


def epsilon(plan: Plan) -> float:
    spent = promised(plan)
    assert spent is not None
    return spent.epsilon


def account(folder: Path, budget: Budget | None = None, **privacy: Any) -> RunAccounts:
    made = accounts(plan_of(**privacy), "run-1", folder, budget)
    assert made is not None
    return made


def test_a_round_is_on_the_disk_when_it_was_spent(tmp_path: Path) -> None:
    plan = plan_of()
    ledger = Ledger(tmp_path / LEDGER)
    RunAccounts(plan, "run-1", ledger, None, lambda: NOW).spend(7)
    (entry,) = Ledger(tmp_path / LEDGER).entries
    assert (entry.time, entry.population, entry.run, entry.round) == (
        "2026-03-01T12:30:00+00:00",
        "hospitals",
        "run-1",
        7,
    )
    assert (entry.plan, entry.mechanism) == (plan.digest, mechanism(plan))
    assert entry.note == "noise added by the coordinator"


@pytest.mark.parametrize(
    ("sections", "by_whom"),
    [
        ({}, "the coordinator"),
        ({"noise": "distributed"}, "the clients"),
        ({"kind": "example", "sampling_rate": 0.5}, "the clients"),
    ],
)
def test_who_adds_the_noise_is_noted(tmp_path: Path, sections: dict[str, Any], by_whom: str) -> None:
    data = {"max_length": 16, "packing": False, "truncate": True}
    plan = plans.parse(plan_text(aggregation=UNIFORM, privacy=CLIENT | sections, data=data))
    made = accounts(plan, "run-1", tmp_path)
    assert made is not None
    made.spend(1)
    assert Ledger(tmp_path / LEDGER).entries[0].note == f"noise added by {by_whom}"


def test_what_promises_nothing_has_no_account(tmp_path: Path) -> None:
    plan = plans.parse(plan_text())
    assert accounts(plan, "run-1", tmp_path) is None
    assert not (tmp_path / LEDGER).exists()
    with pytest.raises(PrivacyError, match="nothing to account for"):
        RunAccounts(plan, "run-1", Ledger(tmp_path / "other"), None, lambda: NOW)


def test_all_rounds_together_are_what_the_plan_promises(tmp_path: Path) -> None:
    made = account(tmp_path)
    for number in (1, 2, 3):
        made.spend(number)
    assert Ledger(tmp_path / LEDGER).total("hospitals", 1e-5, "client").epsilon == pytest.approx(epsilon(plan_of()))


def test_a_run_that_would_pass_the_budget_does_not_begin(tmp_path: Path) -> None:
    """Its last round too has to fit; and what other runs over the same population spent counts."""
    enough = epsilon(plan_of())
    made = account(tmp_path, Budget(enough * 1.0001, 1e-5))
    spent = made.begin(0)
    assert spent is not None
    assert spent.epsilon == pytest.approx(enough)
    with pytest.raises(PrivacyError, match="3 more rounds would bring"):
        account(tmp_path, Budget(enough * 0.99, 1e-5)).begin(0)
    assert Ledger(tmp_path / LEDGER).entries == ()
    account(tmp_path).spend(1)
    with pytest.raises(PrivacyError, match=r"population 'hospitals'.*3 more rounds"):
        made.begin(0)
    made.begin(1)  # the same run, after its first round
    account(tmp_path, Budget(enough * 1.0001, 1e-5), population="schools").begin(0)


def test_without_a_budget_anything_may_begin(tmp_path: Path) -> None:
    assert account(tmp_path).begin(0) is None


def test_a_round_beyond_the_budget_is_not_spent(tmp_path: Path) -> None:
    """As when two runs over one population began at once, each of which had room."""
    budget = Budget(epsilon(plan_of()) * 1.0001, 1e-5)
    one, other = account(tmp_path, budget), account(tmp_path, budget)
    for number, made in ((1, one), (1, other), (2, one)):
        made.spend(number)
    with pytest.raises(PrivacyError, match="over the budget"):
        other.spend(2)
    assert len(Ledger(tmp_path / LEDGER).entries) == 3


def test_a_damaged_ledger_stops_a_run_before_it_begins(tmp_path: Path) -> None:
    account(tmp_path).spend(1)
    raw = (tmp_path / LEDGER).read_bytes()
    (tmp_path / LEDGER).write_bytes(raw.replace(b'"round":1', b'"round":2'))
    with pytest.raises(PrivacyError):
        account(tmp_path)


# At the coordinator's own commands.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The home that every command finds; whose runs may spend as much as one run of three rounds does."""
    made = Home.create(tmp_path / "home", ["coordinator.example"], datetime.now(UTC))
    settings = made.path / "coordinator.toml"
    limit = f"max_epsilon = {epsilon(plan_of()) * 1.0001!r}"
    settings.write_text(settings.read_text().replace("# max_epsilon = 8.0", limit))
    monkeypatch.setenv("FARFIELD_COORDINATOR_HOME", str(made.path))
    return Home.open(made.path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return running(monkeypatch, capsys)


def test_a_plan_over_the_budget_is_not_taken(home: Home, tmp_path: Path) -> None:
    assert home.budget is not None
    write_backbone(tmp_path / "backbone")
    (tmp_path / "plan.toml").write_text(text(), encoding="utf-8")
    (tmp_path / "greedy.toml").write_text(text(noise_multiplier=3.9), encoding="utf-8")
    store = home.store()
    try:
        with pytest.raises(PrivacyError, match="over the budget"):
            submit(tmp_path / "greedy.toml", home, store, NOW)
        assert store.runs() == []
        assert not home.runs.exists() or not any(home.runs.iterdir())
        run = submit(tmp_path / "plan.toml", home, store, NOW)
        assert [one.name for one in store.runs()] == [run.name]
    finally:
        store.close()


def test_a_ledger_in_which_nothing_stands(home: Home, command: Command) -> None:
    ended = command("ledger")
    assert (ended.status, ended.err) == (0, "")
    assert "Nothing was spent yet" in ended.out
    told = json.loads(command("ledger", "--json").out)
    assert (told.pop("head"), told.pop("populations"), told.pop("entries")) == (None, [], [])
    assert told["ledger"] == str(home.path / LEDGER)
    assert not (home.path / LEDGER).exists(), "looking makes none"


def spend(home: Home) -> None:
    for population, rounds in (("hospitals", 2), ("schools", 1)):
        made = accounts(plan_of(population=population), f"run-of-{population}", home.path)
        assert made is not None
        for number in range(1, rounds + 1):
            made.spend(number)


def test_the_ledger_for_a_person(home: Home, command: Command) -> None:
    spend(home)
    ended = command("ledger")
    assert (ended.status, ended.err) == (0, "")
    budget = home.budget
    assert budget is not None
    rows = [line.split() for line in ended.out.splitlines() if line.startswith(("hospitals", "schools"))]
    totals = Ledger(home.path / LEDGER)
    for row, rounds in zip(rows, ("2", "1"), strict=True):
        assert row[1] == "client"
        assert float(row[2]) == pytest.approx(totals.total(row[0], 1e-5, "client").epsilon, rel=1e-3)
        assert row[3:] == ["of", f"{budget.epsilon:g}", "1e-05", rounds, "1"]
    assert f"3 entries, each bound to the one before; the last is {totals.head[:16]}…" in ended.out


def test_the_ledger_for_a_machine(home: Home, command: Command) -> None:
    spend(home)
    told = json.loads(command("ledger", "--json").out)
    totals = Ledger(home.path / LEDGER)
    assert told["head"] == totals.head
    assert [(one["population"], one["unit"]) for one in told["populations"]] == [
        ("hospitals", "client"),
        ("schools", "client"),
    ]
    assert told["populations"][0]["epsilon"] == totals.total("hospitals", 1e-5, "client").epsilon
    assert [(one["run"], one["round"]) for one in told["entries"]] == [
        ("run-of-hospitals", 1),
        ("run-of-hospitals", 2),
        ("run-of-schools", 1),
    ]
    made = mechanism(plan_of())
    assert isinstance(made, ClientMechanism)
    assert told["entries"][0]["mechanism"]["noise_multiplier"] == made.noise_multiplier
    assert home.budget is not None
    assert told["budget"] == {"epsilon": home.budget.epsilon, "delta": 1e-5}


def test_a_damaged_ledger_is_said_and_nothing_else(home: Home, command: Command) -> None:
    spend(home)
    path = home.path / LEDGER
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":9'))
    ended = command("ledger")
    assert (ended.status, ended.out) == (2, "")
    assert str(path) in ended.err


def test_no_run_folder_no_ledger(command: Command, tmp_path: Path) -> None:
    ended = command("ledger", "--run", tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert "not a run folder" in ended.err


def test_mechanisms_of_two_plans_add_up(tmp_path: Path) -> None:
    made = account(tmp_path)
    made.spend(1)
    other = accounts(plan_of(noise_multiplier=8.0), "run-2", tmp_path)
    assert other is not None
    before = Ledger(tmp_path / LEDGER).total("hospitals", 1e-5, "client").epsilon
    other.spend(1)
    after = Ledger(tmp_path / LEDGER).total("hospitals", 1e-5, "client").epsilon
    assert before < after < 2 * before
    assert replace(Ledger(tmp_path / LEDGER).entries[1], time="").run == "run-2"

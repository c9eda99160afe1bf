"""The owner's own ledger: what is written, what is refused, and that the two agree to the round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farfield.edge_client.consent import Consent
from farfield.edge_client.spending import OWN, Spending
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.errors import ConsentError, PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Ledger
from farfield.protocols.privacy.mechanism import mechanism, promised

LEDGER = "ledger.jsonl"
PRIVATE = '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 2.0\n'


def plan_of(extra: str = PRIVATE, rounds: int = 3) -> Plan:
    text = f'[model]\nbackbone = "none"\n[tuning]\nkind = "lora"\n[training]\nrounds = {rounds}\nsteps = 1\n'
    return plans.parse(text + extra, registered(), None)


def enough(plan: Plan) -> Consent:
    """An owner who allows all that the Plan promises to spend, and nothing more."""
    spent = promised(plan)
    assert spent is not None
    return Consent(max_epsilon=spent.epsilon * 1.0001, delta=plan.privacy.delta)


def test_a_round_is_on_the_disk_when_it_was_spent(tmp_path: Path) -> None:
    plan = plan_of(PRIVATE + 'population = "hospitals"\n')
    spending = Spending(tmp_path / LEDGER, Consent())
    spending.spend(plan, "run-1", 2)
    (entry,) = Ledger(tmp_path / LEDGER).entries
    assert (entry.population, entry.run, entry.round, entry.plan) == (OWN, "run-1", 2, plan.digest)
    assert entry.mechanism == mechanism(plan)
    assert entry.note == "population hospitals"
    assert (tmp_path / LEDGER).stat().st_mode & 0o777 == 0o600


def test_without_a_promise_there_is_nothing_to_write(tmp_path: Path) -> None:
    spending = Spending(tmp_path / LEDGER, Consent(max_epsilon=1.0))
    spending.check(plan_of(""), "run", [1, 2, 3])
    spending.spend(plan_of(""), "run", 1)
    assert not (tmp_path / LEDGER).exists()


def test_all_rounds_of_a_plan_fit_into_what_it_promises(tmp_path: Path) -> None:
    """At every step of every round the rest still fits; after the last, not one more round does."""
    plan = plan_of()
    spending = Spending(tmp_path / LEDGER, enough(plan))
    for number in (1, 2, 3):
        for _ in range(2):  # before it is spent, and after: a secure aggregation has several steps
            spending.check(plan, "run", range(number, 4))
        spending.spend(plan, "run", number)
        spending.check(plan, "run", range(number, 4))
    with pytest.raises(ConsentError, match="on this machine's data 1 more round would bring ε"):
        spending.check(plan, "other", [3])


@pytest.mark.parametrize(("run", "extra"), [("other", PRIVATE), ("run", PRIVATE + 'population = "x"\n')])
def test_the_rounds_of_another_run_or_plan_are_not_paid_for(tmp_path: Path, run: str, extra: str) -> None:
    """A coordinator that gives two runs one name gets no round for nothing."""
    plan = plan_of()
    spending = Spending(tmp_path / LEDGER, enough(plan))
    for number in (1, 2, 3):
        spending.spend(plan, "run", number)
    with pytest.raises(ConsentError, match="1 more round"):
        spending.check(plan_of(extra), run, [3])


def test_a_round_that_is_repeated_is_paid_for_again(tmp_path: Path) -> None:
    plan = plan_of()
    spending = Spending(tmp_path / LEDGER, enough(plan))
    for number in (1, 2, 2):
        spending.spend(plan, "run", number)
    with pytest.raises(ConsentError, match=r"consent\.max_epsilon = "):
        spending.spend(plan, "run", 3)
    assert [entry.round for entry in Ledger(tmp_path / LEDGER).entries] == [1, 2, 2]


def test_too_many_rounds_are_refused_before_the_first(tmp_path: Path) -> None:
    limit = enough(plan_of())
    spending = Spending(tmp_path / LEDGER, limit)
    with pytest.raises(ConsentError, match="4 more rounds would bring ε from 0 to") as caught:
        spending.check(plan_of(rounds=4), "run", range(1, 5))
    assert str(caught.value).startswith(f"consent.max_epsilon = {limit.max_epsilon:g}: ")
    assert Ledger(tmp_path / LEDGER).entries == ()


def test_all_populations_and_runs_count_together(tmp_path: Path) -> None:
    """The data are the same, whatever a Plan calls those whose they are."""
    plan = plan_of()
    spending = Spending(tmp_path / LEDGER, enough(plan))
    for number, population in enumerate(("a", "b", "c")):
        spending.spend(plan_of(PRIVATE + f'population = "{population}"\n'), f"run-{number}", 1)
    with pytest.raises(ConsentError):
        spending.spend(plan, "run", 1)


def test_what_another_process_spent_counts(tmp_path: Path) -> None:
    plan = plan_of()
    one, other = (Spending(tmp_path / LEDGER, enough(plan)) for _ in range(2))
    one.spend(plan, "run", 1)
    other.spend(plan, "run", 2)
    one.spend(plan, "run", 3)
    for spending in (one, other):
        with pytest.raises(ConsentError):
            spending.spend(plan, "run", 4)


def test_without_a_limit_everything_is_written_and_nothing_refused(tmp_path: Path) -> None:
    spending = Spending(tmp_path / LEDGER, Consent())
    for number in range(1, 6):
        spending.check(plan_of(), "run", range(1, 10_000))
        spending.spend(plan_of(), "run", number)
    assert len(Ledger(tmp_path / LEDGER).entries) == 5


def test_a_ledger_that_was_tampered_with_spends_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    Spending(path, Consent()).spend(plan_of(), "run", 1)
    line = json.loads(path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0'))
    assert json.loads(path.read_bytes()) != line
    with pytest.raises(PrivacyError):
        Spending(path, Consent()).spend(plan_of(), "run", 2)
    assert len(path.read_bytes().splitlines()) == 1


def test_a_disk_that_refuses_lets_nothing_out(tmp_path: Path) -> None:
    spending = Spending(tmp_path / "no such folder" / LEDGER, Consent())
    with pytest.raises(PrivacyError, match="cannot be opened"):
        spending.spend(plan_of(), "run", 1)

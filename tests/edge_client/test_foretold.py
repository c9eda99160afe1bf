"""What was foretold, kept: when it is believed again, and when not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tiny import plan_text

from farfield.edge_client import foretold
from farfield.edge_client.choice import Fit, Way
from farfield.edge_client.foretold import REMEMBERED, Foretold, question
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.plan import Plan

WHOLE = Fit(Way(None, 4, 1, False, 8, False), 900_000_000, 0.5, False)
HALF = Fit(Way(None, 2, 2, False, 8, True), 800_000_000, 0.7, True)
NEITHER = Fit(Way(None, 2, 2, False, 8, True), 800_000_000, 0.7, False)
BACKBONE = "ab" * 32


def parsed(rank: int = 2) -> Plan:
    return plans.parse(plan_text(tuning={"kind": "lora", "rank": rank}), registered(), None)


@pytest.fixture
def kept(tmp_path: Path) -> Foretold:
    return Foretold(tmp_path / "foretold.json")


def test_what_was_looked_at_is_judged_by_the_limit_of_the_moment(kept: Foretold) -> None:
    assert kept.recall("q", 10**9) is None
    kept.keep("q", (WHOLE, HALF))
    assert kept.recall("q", 870_000_000) == (WHOLE, HALF)
    roomy = kept.recall("q", 10**9)
    assert roomy is not None and [one.fits for one in roomy] == [True, True]
    assert kept.recall("q", 850_000_000) is None  # less than 7 % would be left: what comes after was not looked at
    assert kept.recall("other", 10**9) is None


def test_where_nothing_fitted_all_was_looked_at(kept: Foretold) -> None:
    kept.keep("q", (WHOLE, NEITHER))
    assert kept.recall("q", 1) == (WHOLE, NEITHER)
    assert kept.recall("q", 870_000_000) == (WHOLE, HALF)


def test_another_plan_backbone_consent_code_or_library_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> str:
        return question(parsed(), BACKBONE, ("lora", "ia3"))

    before = asked()
    assert question(parsed(), BACKBONE, ("ia3", "lora")) == before
    others = {question(parsed(4), BACKBONE, ("lora", "ia3")), question(parsed(), "cd" * 32, ("lora", "ia3"))}
    others |= {question(parsed(), BACKBONE, ())}
    with monkeypatch.context() as patched:
        patched.setattr(foretold, "code_digest", lambda: "other")
        others |= {asked()}
    with monkeypatch.context() as patched:
        patched.setattr(foretold, "versions", lambda: {"torch": "0"})
        others |= {asked()}
    assert len(others | {before}) == 6
    assert asked() == before


def test_only_the_latest_are_kept_and_only_for_the_owner(kept: Foretold, tmp_path: Path) -> None:
    for number in range(REMEMBERED + 1):
        kept.keep(f"q{number}", (WHOLE, HALF))
    kept.keep("q1", (WHOLE, NEITHER))
    kept.keep("new", (WHOLE, HALF))
    assert [kept.recall(name, 10**9) is not None for name in ("q0", "q1", "q2", "q3", "new")] == [
        False, True, False, True, True
    ]  # fmt: skip
    assert kept.recall("q1", 1) == (WHOLE, NEITHER)
    assert stat.S_IMODE((tmp_path / "foretold.json").stat().st_mode) == 0o600
    kept.forget()
    assert kept.recall("new", 10**9) is None


@pytest.mark.parametrize(
    "damaged", ["", "[]", "{", '{"q": 7}', '{"q": [{"way": {}}]}', '{"q": [{"memory": 1}]}', "\x80"]
)
def test_damage_is_as_good_as_nothing(kept: Foretold, tmp_path: Path, damaged: str) -> None:
    (tmp_path / "foretold.json").write_bytes(damaged.encode("latin-1"))
    assert kept.recall("q", 10**9) is None
    kept.keep("q", (WHOLE, HALF))
    assert kept.recall("q", 870_000_000) == (WHOLE, HALF)


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path) -> None:
    nowhere = Foretold(tmp_path / "missing" / "foretold.json")
    nowhere.keep("q", (WHOLE,))
    assert nowhere.recall("q", 10**9) is None
    nowhere.forget()

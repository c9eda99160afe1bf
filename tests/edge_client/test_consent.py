"""Consent: every limit refuses what is over it and nothing else, and says so in one sentence; and the terms of sums."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farfield.edge_client.consent import Consent, Request, check
from farfield.edge_client.terms import terms
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.errors import ConsentError, TrustError
from farfield.protocols.plan import Plan
from farfield.protocols.roster import draw_up, sign
from farfield.protocols.secagg import Terms
from farfield.protocols.sections import Privacy, Protection

NOON = datetime(2031, 5, 6, 12, 0)
BACKBONE = "ab" * 32


def plan(budget: str = "steps = 20", protection: str = "sealed", dtype: str = "bfloat16") -> Plan:
    text = f"""
        [model]
        backbone = "anywhere"
        dtype = "{dtype}"
        [tuning]
        kind = "lora"
        [training]
        rounds = 18
        {budget}
    """
    found = plans.parse(text, registered(), None)
    settings: Any = {"kind": protection}  # set on the finished Plan: not every release can run every kind
    return found.model_copy(update={"protection": Protection(**settings)})


REQUEST = Request("r1", plan(), BACKBONE, 8_000_000, 3, 1_000_000)


SUMS = replace(REQUEST, plan=plan(protection="secagg"))
PRIVATE = replace(
    REQUEST,
    plan=plan().model_copy(
        update={"privacy": Privacy(kind="example", noise_multiplier=1.0, sampling_rate=0.1, exact_evaluation=True)}
    ),
)
CONSORTIUM = Ed25519PrivateKey.generate()
CONSORTIUMS_KEY = CONSORTIUM.public_key().public_bytes_raw().hex()


def refusal(consent: Consent, request: Request, now: datetime = NOON) -> str:
    with pytest.raises(ConsentError) as caught:
        check(consent, request, now)
    return str(caught.value)


@pytest.mark.parametrize("hour", range(24))
def test_the_defaults_accept_a_normal_run_at_any_hour(hour: int) -> None:
    check(Consent(), REQUEST, NOON.replace(hour=hour))
    check(Consent(), replace(REQUEST, plan=plan(protection="secagg")), NOON)
    check(Consent(), replace(REQUEST, plan=plan("epochs = 3"), cohort=1), NOON)


AT_THE_LIMIT = Consent(
    methods=("ia3", "lora"),
    backbones=("cd" * 32, BACKBONE),
    protections=("sealed",),
    min_cohort=3,
    max_rounds=18,
    max_steps=20,
    max_message_bytes=1_000_000,
    max_backbone_bytes=8_000_000,
    max_memory_bytes=1,
    hours="12:00-12:01",
)


def test_what_is_at_every_limit_is_accepted() -> None:
    check(AT_THE_LIMIT, REQUEST, NOON)


CROSSED: dict[str, tuple[dict[str, Any], Request, str]] = {
    "methods": (
        {"methods": ("ia3", "vera")},
        REQUEST,
        "consent.methods = ['ia3', 'vera']: run 'r1' uses the tuning method 'lora'",
    ),
    "backbones": (
        {"backbones": ("cd" * 32,)},
        REQUEST,
        f"consent.backbones = 1 digests: run 'r1' uses the backbone {BACKBONE}",
    ),
    "unnamed backbone": ({}, replace(REQUEST, backbone=""), "uses the backbone (none named)"),
    "deliveries": (
        {"deliveries": ("emulator",)},
        REQUEST,
        "consent.deliveries = ['emulator']: run 'r1' has clients fetch the backbone itself",
    ),
    "protections": (
        {"protections": ("secagg",)},
        REQUEST,
        "consent.protections = ['secagg']: run 'r1' sends updates with protection 'sealed'",
    ),
    "min_cohort": ({"min_cohort": 4}, REQUEST, "consent.min_cohort = 4: run 'r1' asks 3 clients in this round"),
    "cohort of one": ({}, replace(REQUEST, cohort=1), "consent.min_cohort = 3: run 'r1' asks one client in this round"),
    "min_sum": (
        {"min_sum": 4, "protections": ("secagg",)},
        SUMS,
        "consent.min_sum = 4: run 'r1' may open the sum of 3 clients in this round",
    ),
    "roster_key": (
        {"roster_key": CONSORTIUMS_KEY},
        REQUEST,
        f"consent.roster_key = '{CONSORTIUMS_KEY}': run 'r1' sends updates with protection 'sealed', where the "
        "coordinator reads each, roster or not",
    ),
    "max_epsilon": ({"max_epsilon": 8.0}, REQUEST, "consent.max_epsilon = 8: run 'r1' has no differential privacy"),
    "max_rounds": ({"max_rounds": 17}, REQUEST, "consent.max_rounds = 17: run 'r1' has 18 rounds"),
    "max_steps": ({"max_steps": 19}, REQUEST, "consent.max_steps = 19: run 'r1' asks for 20 steps a round"),
    "max_epochs": (
        {"max_epochs": 1},
        replace(REQUEST, plan=plan("epochs = 2")),
        "consent.max_epochs = 1: run 'r1' asks for 2 epochs a round",
    ),
    "max_message_bytes": (
        {},
        replace(REQUEST, message_bytes=1_000_001),
        "consent.max_message_bytes = 1,000,000: run 'r1' sends a task of 1,000,001 bytes",
    ),
    "max_backbone_bytes": (
        {},
        replace(REQUEST, backbone_bytes=8_000_001),
        "consent.max_backbone_bytes = 8,000,000: run 'r1' uses a backbone of 8,000,001 bytes",
    ),
    "hours": ({"hours": "22:00-06:00"}, REQUEST, "consent.hours = '22:00-06:00': run 'r1' asks for work at 12:00"),
}


@pytest.mark.parametrize("case", CROSSED)
def test_a_limit_that_is_crossed_refuses_by_name_with_its_value_and_what_was_asked(case: str) -> None:
    changes, request, sentence = CROSSED[case]
    said = refusal(AT_THE_LIMIT.model_copy(update=changes), request)
    assert sentence in said
    assert said.endswith(", and the owner of this data does not allow that")


def test_every_limit_has_a_case_that_crosses_it() -> None:
    # One says how max_epsilon is counted, and memory is looked at when the backbone is there.
    assert set(Consent.model_fields) - {"delta", "max_memory_bytes"} <= set(CROSSED)


def test_updates_in_the_clear_cannot_be_allowed() -> None:
    bare = replace(REQUEST, plan=plan(protection="none"))
    for consent in (Consent(), Consent(protections=("sealed", "secagg")), Consent(protections=("secagg",))):
        assert "sends updates with protection 'none'" in refusal(consent, bare)
    for wanted in (("none",), ("sealed", "none")):
        with pytest.raises(ValidationError, match="Input should be 'sealed' or 'secagg'"):
            Consent.model_validate({"protections": wanted})


def test_a_size_that_is_not_known_yet_is_left_to_the_next_question() -> None:
    check(Consent(max_backbone_bytes=1), replace(REQUEST, backbone_bytes=None), NOON)
    assert "max_backbone_bytes" in refusal(Consent(max_backbone_bytes=1), REQUEST)


def test_steps_and_epochs_have_limits_of_their_own() -> None:
    check(Consent(max_epochs=1), REQUEST, NOON)
    check(Consent(max_steps=1), replace(REQUEST, plan=plan("epochs = 2")), NOON)


def test_a_sum_may_be_as_small_as_the_owner_says() -> None:
    check(Consent(min_sum=3), SUMS, NOON)
    check(Consent(min_sum=20), replace(SUMS, cohort=30), NOON)
    assert "the sum of 20 clients" in refusal(Consent(min_sum=21), replace(SUMS, cohort=30))
    check(Consent(min_sum=20), REQUEST, NOON)  # it opens no sum: the coordinator reads each update


def test_sums_go_with_a_roster_and_privacy_with_a_budget() -> None:
    check(Consent(roster_key=CONSORTIUMS_KEY), SUMS, NOON)
    check(Consent(max_epsilon=0.5), PRIVATE, NOON)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        ("08:30-17:00", ["08:30", "16:59"], ["08:29", "17:00", "00:00"]),
        ("18:00-24:00", ["18:00", "23:59"], ["17:59", "00:00"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
    ],
)
def test_hours(hours: str, inside: list[str], outside: list[str]) -> None:
    for clock in inside:
        check(Consent(hours=hours), REQUEST, datetime.fromisoformat(f"2031-05-06T{clock}"))
    for clock in outside:
        assert f"asks for work at {clock}" in refusal(
            Consent(hours=hours), REQUEST, datetime.fromisoformat(f"2031-05-06T{clock}")
        )


@given(st.times(), st.times(), st.times())
def test_a_span_and_its_complement_share_no_minute_and_leave_none_out(begin: Any, end: Any, now: Any) -> None:
    first, second = f"{begin:%H:%M}", f"{end:%H:%M}"
    if first == second:
        return
    moment = datetime.combine(NOON.date(), now)

    def allowed(hours: str) -> bool:
        try:
            check(Consent(hours=hours), REQUEST, moment)
        except ConsentError:
            return False
        return True

    assert allowed(f"{first}-{second}") != allowed(f"{second}-{first}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"hours": "22-6"}, {"hours": "22:00-25:00"}, {"hours": "24:00-06:00"}, {"hours": "6:00-22:00"},
        {"hours": "06:00-06:00"}, {"hours": "22:00-06:00\n"}, {"hours": "22:00-0\u0666:00"}, {"min_cohort": 0},
        {"max_rounds": "9"}, {"max_steps": 0}, {"max_epochs": True}, {"max_memory_bytes": 1.5},
        {"backbones": ("abc",)}, {"methods": "lora"}, {"protections": ()}, {"protections": ("open",)},
        {"max_rouds": 1}, {"min_sum": 2}, {"roster_key": "ab"}, {"roster_key": "AB" * 32}, {"roster_key": None},
        {"roster_key": "ab" * 32 + "\n"}, {"max_epsilon": 0.0}, {"max_epsilon": float("inf")}, {"max_epsilon": "8"},
        {"delta": 0.0}, {"delta": 1.0},
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Consent.model_validate(wrong)


# --- The terms of a secure aggregation --------------------------------------------------------------------------------

NOW = datetime(2031, 5, 6, 12, tzinfo=UTC)
MEMBERS = {"ann": b"a" * 32, "bob": b"b" * 32}
ROSTER = sign(draw_up("clinics", MEMBERS, NOW, NOW + timedelta(days=1)), CONSORTIUM)
BOUND = Consent(min_cohort=5, min_sum=4, roster_key=CONSORTIUMS_KEY)


def test_with_a_consortiums_key_its_roster_says_who_the_peers_are() -> None:
    assert terms(BOUND, ROSTER, NOW) == Terms(5, 4, MEMBERS)


@pytest.mark.parametrize("roster", [b"", ROSTER, b"anything"])
def test_without_one_a_roster_says_nothing(roster: bytes) -> None:
    assert terms(Consent(), roster, NOW) == Terms(1, 3, None)


def test_a_run_without_a_roster_is_refused_by_who_asks_for_one() -> None:
    with pytest.raises(ConsentError) as caught:
        terms(BOUND, b"", NOW)
    assert f"consent.roster_key = '{CONSORTIUMS_KEY}': the run comes without a consortium's roster" in str(caught.value)


@pytest.mark.parametrize(
    ("roster", "now", "said"),
    [
        (sign(draw_up("clinics", MEMBERS, NOW, None), Ed25519PrivateKey.generate()), NOW, "signed with the key"),
        (ROSTER.replace(b'"bob"', b'"eve"'), NOW, "altered after it was signed"),
        (ROSTER, NOW + timedelta(days=1), "expired at 2031-05-07 12:00"),
        (b"anything", NOW, "malformed"),
    ],
)
def test_a_roster_that_does_not_hold_is_no_roster(roster: bytes, now: datetime, said: str) -> None:
    with pytest.raises(TrustError, match=said):
        terms(BOUND, roster, now)

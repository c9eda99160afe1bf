"""A report is believed whole and under its signature, or not at all; and what can be checked of it is."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farfield.coordinator import plans
from farfield.emulator import methods
from farfield.protocols import identity
from farfield.protocols.audit import provenance
from farfield.protocols.audit.finding import Finding
from farfield.protocols.audit.promise import promise
from farfield.protocols.audit.report import MOST_BYTES, Report, opened, seal
from farfield.protocols.audit.spending import spending
from farfield.protocols.audit.verify import Check, checks
from farfield.protocols.errors import AuditError
from farfield.protocols.plan import Plan, parse
from farfield.protocols.privacy.ledger import Entry, Ledger
from farfield.protocols.privacy.mechanism import mechanism

REPORT = reports.report()
SEALED = seal(REPORT, reports.KEY)
PLAN = plans.load(reports.EXAMPLES / "private.toml")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def refusal(raw: bytes) -> str:
    with pytest.raises(AuditError) as caught:
        opened(raw, "report.json")
    said = str(caught.value)
    assert said.startswith("report.json: ") and said.isprintable() and len(said) < 600
    return said


def spelled(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def signed(report: dict[str, Any]) -> bytes:
    """Any document as a report, canonical, and signed by the right key over just these bytes."""
    value = reports.KEY.sign(identity.statement("audit report", spelled(report))).hex()
    signature = {"algorithm": "Ed25519", "key": reports.PUBLIC.hex(), "value": value}
    return spelled({"report": report, "signature": signature})


def forged(**changes: Any) -> bytes:
    return signed(json.loads(SEALED)["report"] | changes)


def test_what_was_sealed_is_what_is_opened() -> None:
    sealed = opened(SEALED, "report.json")
    assert sealed.report == REPORT and sealed.key == reports.PUBLIC
    assert signed(json.loads(SEALED)["report"]) == SEALED  # so that what `forged` makes fails for its changes alone
    assert list(json.loads(SEALED)) == ["report", "signature"]


@given(st.dictionaries(st.text(), json_values, max_size=4), st.text(max_size=40))
def test_whatever_an_attack_measured_comes_back(data: dict[str, Any], words: str) -> None:
    finding = Finding(attack="a", title=words, attacker=words, verdict="leak", tried=(words,), found=(), data=data)
    report = REPORT.model_copy(update={"findings": (finding,)})
    assert opened(seal(report, reports.KEY), "report.json").report == report


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_not_sealed(value: float) -> None:
    finding = reports.self_test().model_copy(update={"data": {"scores": [1.0, value]}})
    with pytest.raises(AuditError, match="cannot be written as JSON"):
        seal(REPORT.model_copy(update={"findings": (finding,)}), reports.KEY)


def test_a_report_that_nobody_would_open_is_not_sealed() -> None:
    finding = reports.self_test().model_copy(update={"data": {"scores": "x" * MOST_BYTES}})
    with pytest.raises(AuditError, match="too large"):
        seal(REPORT.model_copy(update={"findings": (finding,)}), reports.KEY)


def test_each_thing_that_can_be_wrong_has_its_sentence() -> None:
    assert "not JSON" in refusal(b"\x00\xff")
    assert "not JSON" in refusal(b"[" * 100_000)
    assert "not JSON" in refusal(SEALED.decode().encode("utf-16"))
    assert "too large" in refusal(b" " * (MOST_BYTES + 1))
    assert "not the report of an audit" in refusal(b"[]")
    assert "not the report of an audit" in refusal(b'{"report":{"format":7}}')
    assert "NaN is no number of JSON" in refusal(SEALED.replace(b'"seed":7', b'"seed":NaN'))
    assert "Infinity is no number" in refusal(SEALED.replace(b'"seed":7', b'"seed":-Infinity'))
    assert "this version of Farfield reads 'farfield-audit/1'" in refusal(forged(format="farfield-audit/2"))
    assert "unknown key 'report.sed'. Did you mean 'seed'?" in refusal(forged(sed=7))
    assert "'report.rounds.0.client'" in refusal(forged(rounds=[{"round": 1, "clients": 2, "client": 3}]))
    assert "altered after it was signed" in refusal(reports.altered(SEALED, seed=8))
    assert "not the one whose digest it names" in refusal(forged(plan=PLAN.canonical().decode() + " "))
    assert "says twice what came of the attack 'exposure'" in refusal(
        forged(untried=[{"attack": "exposure", "title": "again", "reason": "no"}])
    )
    assert "spelled differently" in refusal(json.dumps(json.loads(SEALED), indent=1).encode())
    assert "spelled differently" in refusal(forged(seed="7"))
    assert "spelled differently" in refusal(SEALED + b"\n")


def test_a_key_that_stands_twice_gets_nobody_past() -> None:
    """A reader that takes the first and one that takes the last would see two reports under one signature."""
    before, after = b'"seed":7', b'"seed":8,"seed":7'
    assert SEALED.count(before) == 1
    assert "the key 'seed' stands twice" in refusal(SEALED.replace(before, after))
    assert "the key 'report' stands twice" in refusal(SEALED.replace(b'{"report"', b'{"report":{},"report"', 1))


def test_the_signature_is_of_a_report_by_the_key_in_it() -> None:
    document = json.loads(SEALED)
    content = spelled(document["report"])
    for value in (
        Ed25519PrivateKey.generate().sign(identity.statement("audit report", content)),
        reports.KEY.sign(identity.statement("roster", content)),
        reports.KEY.sign(content),
    ):
        document["signature"]["value"] = value.hex()
        assert "altered after it was signed, or never signed" in refusal(spelled(document))
    document = json.loads(SEALED)
    document["signature"]["key"] = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    assert "never signed with the key that it names" in refusal(spelled(document))
    document["signature"]["algorithm"] = "none"
    assert "'none' is not one of 'Ed25519'" in refusal(spelled(document))


@given(st.data())
def test_no_byte_can_be_changed(data: st.DataObject) -> None:
    raw = bytearray(SEALED)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    refusal(bytes(raw))


@given(st.integers(0, len(SEALED) - 1))
def test_no_report_is_read_that_was_cut_off(length: int) -> None:
    refusal(SEALED[:length])


@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_else_is_in_the_file_is_refused(raw: bytes) -> None:
    refusal(raw)


@given(st.sampled_from(sorted(Report.model_fields)), json_values)
def test_a_signature_alone_makes_no_report(key: str, value: Any) -> None:
    """Whoever may sign can still not put into a report what is no part of one."""
    raw = forged(**{key: value})
    try:
        report = opened(raw, "report.json").report
    except AuditError as error:
        assert str(error).isprintable()
    else:
        assert spelled({"report": report.model_dump(mode="json")})[:-1] in raw


def test_a_moment_is_one_in_utc() -> None:
    for made in ("2031-05-06T12:30:15+02:00", "2031-05-06T12:30:15.5Z", "2031-05-06T12:30:15"):
        with pytest.raises(ValidationError, match="made"):
            reports.report(made=made)


# --- what a Plan promises ---


def test_nothing_is_promised_where_nothing_is() -> None:
    assert promise(plans.load(reports.EXAMPLES / "quickstart.toml")) is None


def test_a_promise_has_the_numbers_of_the_mechanism() -> None:
    found, made = promise(PLAN), mechanism(PLAN)
    assert found is not None and made is not None
    assert found.unit == "example" and found.delta == 1e-5 and found.noise_multiplier == made.release.noise_multiplier
    assert found.epsilon is not None and found.epsilon_rdp is not None
    assert 7.9 < found.epsilon <= 8 and found.epsilon_rdp > found.epsilon
    assert found.accountant.startswith("PLD (dp-accounting ")
    assert found.counted.startswith("2 steps in each of all 4 rounds")
    assert "probability 0.2" in found.sampling and found.enforced and "operating system" in found.enforcement
    assert "own machine" in found.trust and found.noise.startswith("each client")
    assert any("held-out losses" in one for one in found.uncovered)  # exact_evaluation = true


CLIENT = """
[model]
backbone = "builtin:tiny-llama-py"
[tuning]
kind = "lora"
[training]
rounds = 6
steps = 1
[cohort]
minimum = 5
[aggregation]
weighting = "uniform"
[privacy]
kind = "client"
noise_multiplier = 2.0
clipping_norm = 0.5
"""


def client_plan(**keys: object) -> Plan:
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    return parse(CLIENT + more, methods.registered(), None)


def test_who_is_trusted_follows_from_who_adds_the_noise() -> None:
    central, distributed = promise(client_plan(noise="central")), promise(client_plan(noise="distributed"))
    assert central is not None and distributed is not None
    assert central.unit == distributed.unit == "client"
    assert "trust the coordinator" in central.trust and central.noise.startswith("the coordinator")
    assert "the coordinator is not trusted" in distributed.trust and distributed.noise.startswith("the clients")
    assert distributed.accountant.startswith("RDP") and not any("held-out" in one for one in distributed.uncovered)
    assert central.sampling.startswith("none is counted") and "nothing to enforce" in central.enforcement


def test_turns_are_an_assumption_that_clients_enforce() -> None:
    turns, always = promise(client_plan(participations=2)), promise(client_plan())
    assert turns is not None and always is not None and turns.epsilon is not None and always.epsilon is not None
    assert turns.epsilon < always.epsilon and turns.counted.startswith("2 of 6 rounds")
    assert "at most 2 of 6 rounds" in turns.sampling and "refuses" in turns.enforcement


# --- which program made it ---


def test_the_digest_of_the_sources_is_that_of_the_repository() -> None:
    found = {name for package in provenance.PACKAGES for name, _ in provenance.sources(package)}
    root = reports.EXAMPLES.parent
    assert {
        path.relative_to(root).as_posix() for name in provenance.PACKAGES for path in (root / name).rglob("*.py")
    } <= found
    assert {"protocols/audit/page.html.jinja", "protocols/audit/page.css", "protocols/messages.proto"} <= found
    assert len(provenance.code_digest()) == 64


def test_the_digest_does_not_depend_on_how_it_is_installed(tmp_path: Path) -> None:
    """The same sources in another folder, as a wheel puts them, and then with one byte more."""
    root, packages = reports.EXAMPLES.parent, tmp_path / "farfield"
    for name in provenance.PACKAGES:
        shutil.copytree(root / name, packages / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    here = provenance.code_digest.__wrapped__()
    code = (
        "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one)]; "
        "from farfield.protocols.audit import provenance; print(provenance.__file__, provenance.code_digest())"
    )

    def digest() -> list[str]:
        call = [sys.executable, "-c", code]
        return subprocess.run(call, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()

    assert digest() == [str(packages / "protocols/audit/provenance.py"), here]
    with (packages / "kernels" / "clip.py").open("a") as file:
        file.write("\n")
    assert digest()[1] != here


def test_versions_are_those_that_are_installed() -> None:
    found = provenance.versions()
    assert found["numpy"] == np.__version__ and {"torch", "dp-accounting", "cryptography", "opacus"} <= set(found)


# --- verifying ---


def checked(report: Report = REPORT, **given: Any) -> dict[str, Check]:
    found = checks(opened(seal(report, reports.KEY), "report.json"), methods.registered(), **given)
    assert all(one.said for one in found)
    return {one.name: one for one in found}


def outcome(report: Report = REPORT, **given: Any) -> dict[str, bool | None]:
    return {name: one.ok for name, one in checked(report, **given).items()}


def test_what_is_not_given_is_not_called_checked() -> None:
    nothing = {"signature": True, "signer": None, "Plan": True, "code": True, "accounting": True}
    assert outcome() == nothing | {"backbone": None, "ledger": None}
    assert outcome(reports.report("quickstart.toml")) == nothing | {"backbone": None, "ledger": None}


def test_who_signed_is_compared_with_who_should_have() -> None:
    assert checked(key=reports.PUBLIC)["signer"].ok is True
    assert checked(key=bytes(32))["signer"].ok is False


def test_another_program_is_noticed() -> None:
    assert checked(reports.report(code="ab" * 32))["code"].ok is None


def test_another_backbone_is_noticed() -> None:
    assert checked(backbone=REPORT.backbone)["backbone"].ok is True
    assert checked(backbone="ab" * 32)["backbone"].ok is False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 1.0),
        ("epsilon", None),
        ("epsilon_rdp", 8.5),
        ("delta", 1e-6),
        ("noise_multiplier", 2.0),
        ("unit", "client"),
        ("trust", "nobody has to be trusted with anything"),
        ("uncovered", ()),
    ],
)
def test_a_claim_that_the_plan_does_not_come_to_is_noticed(key: str, value: object) -> None:
    assert REPORT.promise is not None
    check = checked(reports.report(promise=REPORT.promise.model_copy(update={key: value})))["accounting"]
    assert check.ok is False and key.replace("_", " ") in check.said and repr(value) in check.said


def test_a_promise_that_is_missing_or_made_up_is_noticed() -> None:
    assert checked(reports.report(promise=None, findings=()))["accounting"].ok is False
    assert checked(reports.report("quickstart.toml", promise=REPORT.promise))["accounting"].ok is False


def test_another_accountant_of_the_same_result_is_named() -> None:
    assert REPORT.promise is not None
    other = REPORT.promise.model_copy(update={"accountant": "PLD (dp-accounting 0.5.0)"})
    check = checked(reports.report(promise=other))["accounting"]
    assert check.ok is True and "dp-accounting 0.6" in check.said


def test_a_plan_that_this_version_does_not_know_is_not_accounted_for() -> None:
    plan = PLAN.canonical().replace(b'"fed-sb"', b'"fed-sc"')
    report = reports.report(plan=plan.decode(), plan_digest=hashlib.sha256(plan).hexdigest())
    check = checked(report)["accounting"]
    assert check.ok is False and "fed-sc" in check.said


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spend(ledger, 3)
    return ledger


def spend(ledger: Ledger, rounds: int) -> None:
    made = mechanism(PLAN)
    assert made is not None
    for number in range(1, rounds + 1):
        ledger.spend(Entry("2031-05-06T12:00:00Z", "default", "run-1", number, PLAN.digest, made))


def test_the_ledger_of_the_run_has_what_the_report_says(ledger: Ledger) -> None:
    said = spending(ledger, PLAN)
    assert said is not None and said.entries == 3 and said.head == ledger.head
    report = reports.report(ledger=said)
    before = ledger.path.read_bytes()
    assert checked(report, ledger=ledger.path)["ledger"].ok is True
    assert ledger.path.read_bytes() == before

    spend(ledger, 2)
    check = checked(report, ledger=ledger.path)["ledger"]
    assert check.ok is True and "2 lines were written since" in check.said


def test_a_ledger_that_says_otherwise_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    said = spending(ledger, PLAN)
    assert said is not None and said.epsilon is not None

    def with_ledger(**changes: object) -> Check:
        report = reports.report(ledger=said.model_copy(update=changes))
        return checked(report, ledger=ledger.path)["ledger"]

    assert with_ledger().ok is True
    for changes in ({"head": "ab" * 32}, {"entries": 2}, {"epsilon": said.epsilon / 2}, {"epsilon": None}):
        assert with_ledger(**changes).ok is False, changes
    assert with_ledger(population="others").ok is False
    assert checked(reports.report(ledger=None), ledger=ledger.path)["ledger"].ok is False
    assert checked(reports.report(ledger=said), ledger=tmp_path / "none.jsonl")["ledger"].ok is False
    assert not (tmp_path / "none.jsonl").exists()

    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:2]))  # cut off at the end, which the file alone does not show
    assert "none of its 2 lines" in with_ledger().said
    ledger.path.write_bytes(b"".join([lines[1], lines[0], lines[2]]))
    assert "damaged" in with_ledger().said and with_ledger().ok is False


def test_nothing_is_spent_where_nothing_is_promised(ledger: Ledger, tmp_path: Path) -> None:
    assert spending(ledger, plans.load(reports.EXAMPLES / "quickstart.toml")) is None
    assert spending(Ledger(tmp_path / "empty.jsonl"), PLAN) is None

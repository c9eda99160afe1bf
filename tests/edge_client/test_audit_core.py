"""The frame of audits: attacks are made once and kept, what they plant is in the run, and federations are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import audits
import numpy as np
import pytest
from audits import subject
from pydantic import ValidationError

from farfield.edge_client.audit import Attack, Member, Planted, Planting, Subject, registered
from farfield.edge_client.audit.attack import Attacker
from farfield.edge_client.audit.conduct import chosen, conduct
from farfield.edge_client.audit.notes import Notes
from farfield.edge_client.records import Text
from farfield.emulator.bench import Bench
from farfield.protocols.audit.finding import Finding, Untried
from farfield.protocols.errors import AuditError, TuningError
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State, digest

SEALED: dict[str, Any] = {"protection": {"kind": "sealed"}, "aggregation": {"weighting": "uniform"}}
SECAGG: dict[str, Any] = {"protection": {"kind": "secagg"}, "aggregation": {"weighting": "uniform"}}


class Silent:
    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.untried: list[Untried] = []

    def on_attack(self, attack: Attack, number: int, attacks: int) -> None: ...

    def on_finding(self, finding: Finding) -> None:
        self.findings.append(finding)

    def on_untried(self, untried: Untried) -> None:
        self.untried.append(untried)


class Counting(Attack):
    """Plants a record and a member, and counts how often it is made."""

    name = "counting"
    title = "Counting"
    attacker = Attacker.HOLDER
    cost = "nothing"
    place = 1
    made: ClassVar[int] = 0

    def unfit(self, subject: Subject) -> str | None:
        return None if subject.plan.tuning.kind == "lora" else "it counts LoRA only"

    def plant(self, subject: Subject) -> Planting:
        client = sorted(subject.clients)[0]
        other = Member(subject.clients[client], lambda number, adapter, honest: honest())
        return Planting((Planted(client, Text("the heron saw one star and no other"), 2),), {"zz-planted": other})

    def run(self, subject: Subject) -> Finding:
        type(self).made += 1
        members = subject.course.members(1)
        return Finding(
            attack=self.name, title=self.title, attacker=self.attacker, verdict="passed", tried=("counted",),
            found=(f"{len(members)} members",), data={"members": list(members)},
        )  # fmt: skip


def test_every_attack_says_what_a_report_needs() -> None:
    places = [attack.place for attack in registered().values()]
    assert len(registered()) >= 8 and places == sorted(set(places)), "no two stand in one place"
    for name, attack in registered().items():
        assert attack.name == name and attack.title and attack.cost and isinstance(attack.attacker, Attacker)
        assert not attack.title.endswith(".")


def test_attacks_are_chosen_by_name_and_made_in_the_order_of_a_report() -> None:
    assert [attack.name for attack in chosen(["backdoor", "protocol"])] == ["protocol", "backdoor"]
    assert {attack.name for attack in chosen(None)} == {name for name, one in registered().items() if one.default}
    with pytest.raises(AuditError, match=r"no attack .backdor.\..*backdoor"):
        chosen(["backdor"])


def test_an_attack_is_made_once_and_then_read(tmp_path: Path) -> None:
    Counting.made, said = 0, Silent()
    for _ in range(2):
        findings, untried = conduct(subject(tmp_path), [Counting()], said)
    assert Counting.made == 1 and said.findings[0] == said.findings[1] == findings[0]
    assert "zz-planted" in findings[0].data["members"], "what it planted takes part"  # type: ignore[operator]
    assert {one.attack for one in untried} == set(registered()) and untried[0].reason == "it was not asked for"


def test_what_does_not_fit_is_said_and_plants_nothing(tmp_path: Path) -> None:
    one = subject(tmp_path, tuning={"kind": "ia3", "rank": None})
    assert conduct(one, [Counting()], Silent())[0] == [] and one.plantings == {}


def test_planted_records_are_trained_on_and_never_held_out(tmp_path: Path) -> None:
    one = subject(tmp_path, data={"packing": False})
    name = sorted(one.clients)[0]
    record = Text("the heron saw one star")
    ids = one.bench.tokenizer(record.text)["input_ids"]
    before, after = one.clients[name](), one.prepare(name, [record, record])
    assert before.held_out == after.held_out and len(after.train) == len(before.train) + 2
    assert sum(list(example.input_ids)[: len(ids)] == ids for example in after.train) == 2


@pytest.mark.parametrize("sections", [SEALED, SECAGG])
def test_a_member_sends_what_its_act_says(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Under secure aggregation, too; all others are honest, and the aggregate is the mean of what was sent."""
    one = subject(tmp_path, clients=3, **sections)
    sent: list[State] = []

    def honest(number: int, adapter: State, part: Any) -> Part:
        sent.append(dict(part().update))
        return Part(sent[-1], 1, 1, 0.0, 1)

    def contrary(number: int, adapter: State, part: Any) -> Part:
        sent.append({name: np.full_like(value, 0.01) for name, value in adapter.items()})
        return Part(sent[-1], 1, 1, 0.0, 1)

    acts = dict(zip(sorted(one.clients), (contrary, honest, honest), strict=True))
    members = {name: Member(one.clients[name], act) for name, act in acts.items()}
    plan = one.variant(training={"rounds": 1})
    assert one.federation is not None
    course = one.federation.run("acts", plan, members, audits.quiet)
    aggregate = course.aggregate(1)
    assert aggregate is not None and course.members(1) == tuple(sorted(one.clients)) and len(sent) == 3
    for name, value in aggregate.items():
        mean = sum(part[name] for part in sent) / 3
        np.testing.assert_allclose(value, mean, atol=1e-6 if sections is SEALED else 2e-5)
        np.testing.assert_allclose(course.adapter(1)[name], one.initial[name] + value, atol=1e-6)


def test_a_federation_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = subject(tmp_path / "whole")
    expected = digest(whole.course.adapter(3))

    class Stop(Exception):
        pass

    def stopping(what: str, done: int, total: int) -> None:
        if what.endswith("training") and done == 2:
            raise Stop

    cut = subject(tmp_path / "cut")
    assert cut.federation is not None
    members = {name: Member(read) for name, read in cut.clients.items()}
    with pytest.raises(Stop):
        cut.federation.run("audited", cut.plan, members, stopping)
    assert digest(subject(tmp_path / "cut").course.adapter(3)) == expected


def test_one_client_alone_lets_out_its_own_update(tmp_path: Path) -> None:
    one = subject(tmp_path)
    name = sorted(one.clients)[0]
    alone = subject_of_one(one, name, tmp_path)
    course = alone.course
    own = one.update(one.clients[name]().train, one.initial, client=name).update
    aggregate = course.aggregate(1)
    assert course.rounds == 1 and aggregate is not None and digest(aggregate) == digest(dict(own))
    after = course.adapter(1)
    assert all((after[key] == one.initial[key] + own[key]).all() for key in own) and course.adapter(0) is one.initial


def subject_of_one(one: Subject, name: str, folder: Path) -> Subject:
    return Subject(
        one.plan, one.folder, one.bench, one.initial, 1, {name: one.clients[name]}, one.prepare, None,
        Notes(folder / "alone"), audits.quiet,
    )  # fmt: skip


def test_a_variant_is_checked_as_a_plan_is(tmp_path: Path) -> None:
    one = subject(tmp_path)
    assert one.variant(training={"rounds": 7}).training.rounds == 7 != one.plan.training.rounds
    with pytest.raises(ValidationError):
        one.variant(training={"epochs": 2})


def test_a_bench_works_under_another_plan_of_the_same_model_only(tmp_path: Path) -> None:
    one = subject(tmp_path)
    other = one.variant(training={"rounds": 7})
    under = one.bench.under(other)
    assert under.plan == other and under.tuned is one.bench.tuned and isinstance(under, Bench)
    with pytest.raises(TuningError, match=r"another \[tuning\]"):
        one.bench.under(one.variant(tuning={"rank": 4}))


def test_notes_are_made_once_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    notes, made = Notes(tmp_path / "notes"), []

    def make() -> dict[str, float]:
        made.append(1)
        return {"a": 1.5}

    assert notes.values("deep/one", make) == notes.values("deep/one", make) == {"a": 1.5} and made == [1]
    state = notes.state("two", lambda: {"w": np.ones(3, np.float32)})
    assert (Notes(tmp_path / "notes").state("two", dict)["w"] == state["w"]).all()
    (tmp_path / "notes" / "deep" / "one.json").write_text("{")
    with pytest.raises(AuditError, match=r"one\.json: cannot be read"):
        notes.values("deep/one", make)
    with pytest.raises(ValueError):
        notes.values("nan", lambda: float("nan"))
    assert not (tmp_path / "notes" / "nan.json").exists()

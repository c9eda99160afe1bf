"""A participant between machines: what it verifies, refuses, loads, and tells, with a real Plan and a real backbone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secure_clients import TERMS, Clients
from tiny import plan_text, write_backbone, write_clients

from farfield.coordinator.rounds import trained_shapes
from farfield.coordinator.secure_rounds import SecureRound
from farfield.edge_client.choice import Fit, Way
from farfield.edge_client.consent import Consent
from farfield.edge_client.data import Example
from farfield.edge_client.participant import Participant
from farfield.edge_client.train import Outcome as Done
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.envelope import Charter, Desk, Identity, Signer, sign_charter
from farfield.protocols.errors import TrustError
from farfield.protocols.messages import (
    Evaluate,
    Evaluated,
    Failed,
    Outcome,
    Refused,
    Reply,
    Secure,
    Secured,
    Task,
    Train,
    Trained,
    Work,
)
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Ledger
from farfield.protocols.privacy.mechanism import promised
from farfield.protocols.secagg import Step
from farfield.protocols.summing import Part, Subject
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

ANN = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
SIGNER = Signer(Ed25519PrivateKey.generate(), b"certificate")
BACKBONE = "ab" * 32


class Place:
    """A coordinator's desk on one side, and a participant on the other."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.folder = folder
        self.plan: Plan = plans.parse(plan_text(**{"protection": {"kind": "sealed"}} | sections), registered(), None)
        bench = Bench(self.plan, folder / "backbone")
        self.adapter = pack_state(bench.adapter(), "float32")
        self.charter = Charter("run-1", self.plan.canonical(), BACKBONE, 1000, bench.frozen)
        self.fetched: list[str] = []
        self.said: list[str] = []

    def participant(
        self,
        consent: Consent | None = None,
        data: str = "data/client-000.jsonl",
        ledger: Path | None = None,
        foretold: Path | None = None,
    ) -> Participant:
        return Participant(
            "ann",
            ANN,
            self._trusted,
            consent or Consent(),
            self.folder / data,
            self._fetch,
            lambda run, number, activity: self.said.append(activity),
            ledger=ledger,
            foretold=foretold,
        )

    def ask(
        self, who: Participant, work: Work | None = None, cohort: int = 3, number: int = 1, **charter: Any
    ) -> Outcome:
        stated = replace(self.charter, **charter)
        work = work or Evaluate(self.adapter)
        task = Task(stated.run, number, "ann", stated.plan_digest, work, cohort)
        desk = Desk(sign_charter(stated, SIGNER), SIGNER, work, expires=time.time() + 60, sealed=True)
        return desk.open(who.answer(desk.address(task, ANN.member)), task, ANN.member).outcome

    def _trusted(self, certificate: bytes) -> Ed25519PublicKey:
        if certificate != SIGNER.certificate:
            raise TrustError("another signer")
        return SIGNER.key.public_key()

    def _fetch(self, digest: str) -> Path:
        self.fetched.append(digest)
        return self.folder / "backbone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("participant")
    write_backbone(path / "backbone")
    write_clients(path / "data", 2)
    return path


@pytest.fixture
def place(folder: Path) -> Place:
    return Place(folder)


def test_one_backbone_serves_all_tasks_of_a_run(place: Place) -> None:
    ann = place.participant()
    assert isinstance(place.ask(ann), Evaluated)
    assert isinstance(place.ask(ann, Train(place.adapter)), Trained)
    assert isinstance(place.ask(ann), Evaluated)
    assert (ann.loads, place.fetched) == (1, [BACKBONE])
    assert isinstance(place.ask(ann, run="run-2"), Evaluated)
    assert ann.loads == 2


@pytest.mark.parametrize(
    ("consent", "reason"),
    [
        (Consent(methods=("vera",)), "consent.methods = ['vera']"),
        (Consent(backbones=("cd" * 32,)), "consent.backbones"),
        (Consent(max_rounds=2), "consent.max_rounds = 2"),
        (Consent(min_cohort=4), "consent.min_cohort = 4"),
        (Consent(max_message_bytes=10), "consent.max_message_bytes = 10"),
        (Consent(max_backbone_bytes=999), "consent.max_backbone_bytes = 999"),
    ],
)
def test_a_refusal_is_a_reply_and_nothing_was_opened(place: Place, consent: Consent, reason: str) -> None:
    ann = place.participant(consent, data="no/such/file")
    outcome = place.ask(ann)
    assert isinstance(outcome, Refused)
    assert reason in outcome.reason
    assert (ann.loads, place.fetched) == (0, [])
    assert place.said[-1].startswith("refused: ")


def test_what_fails_is_told_in_full_to_the_owner_and_without_paths_to_the_coordinator(place: Place) -> None:
    outcome = place.ask(place.participant(data="no/such/file"))
    assert outcome == Failed("its data does not fit the Plan; its own log says why")
    assert str(place.folder) in place.said[-1]


def test_other_frozen_weights_are_noticed(place: Place) -> None:
    outcome = place.ask(place.participant(), frozen="00" * 32)
    assert isinstance(outcome, Failed)
    assert "other frozen adapter weights" in outcome.reason


def test_a_whole_backbone_is_not_taken_for_an_emulator(folder: Path) -> None:
    """What a coordinator ships by mistake against its own Plan is not trained on, and the mistake is told."""
    place = Place(folder)
    offsite = plans.parse(
        plan_text(protection={"kind": "sealed"}, delivery={"kind": "emulator", "first": 1, "last": 1}),
        registered(),
        None,
    )
    ann = place.participant(data="no/such/file")
    outcome = place.ask(ann, plan=offsite.canonical())
    assert isinstance(outcome, Failed)
    assert outcome.reason == "the Plan's delivery.kind is 'emulator', and what was sent is a whole backbone"
    assert (ann.loads, place.fetched) == (0, [BACKBONE])
    assert isinstance(place.ask(place.participant(Consent(deliveries=("emulator",)))), Refused)


def test_what_nobody_foresaw_does_not_end_the_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("illegal memory access at /secret/path")

    ann = place.participant()
    monkeypatch.setattr("farfield.edge_client.worker.evaluate", crash)
    outcome = place.ask(ann)
    assert outcome == Failed("it failed unexpectedly (RuntimeError); its own log says more")
    assert "/secret/path" in place.said[-1]


def test_work_that_fits_into_no_memory_is_refused_before_data_is_opened(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = Fit(Way(None, 1, 2, True, 1, True), 930_000_000, 1.0, False)
    monkeypatch.setattr("farfield.edge_client.fitting.look_ahead", lambda *_, **__: (smallest,))
    ann = place.participant(Consent(max_memory_bytes=400_000_000), data="nowhere.jsonl")
    outcome = place.ask(ann)
    assert isinstance(outcome, Refused) and ann.loads == 0
    assert outcome.reason.startswith(
        "consent.max_memory_bytes = 400,000,000: this work takes at least 1.0 GB of memory, and 400.0 MB are allowed"
    )


def test_a_client_works_in_the_way_that_fits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    training = place.plan.training
    way = Way(None, 1, training.batch_size * training.gradient_accumulation, True, 1, False)
    monkeypatch.setattr("farfield.edge_client.fitting.look_ahead", lambda *_, **__: (Fit(way, 1, 1.0, True),))
    monkeypatch.setattr("farfield.edge_client.fitting.ample", lambda *_: 10**15)
    cut = place.ask(place.participant(), Train(place.adapter))
    assert any(said.startswith("fits into memory: ") for said in place.said)
    monkeypatch.undo()
    whole = place.ask(place.participant(), Train(place.adapter))
    assert isinstance(cut, Trained) and isinstance(whole, Trained)
    assert (cut.steps, cut.targets) == (whole.steps, whole.targets)
    assert cut.loss == pytest.approx(whole.loss, rel=0.02)


def test_nobody_looks_ahead_twice_unless_it_did_not_come_true(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def look_ahead(plan: Plan, folder: Path, most: int, allowed: Sequence[str]) -> tuple[Fit, ...]:
        looked.append(most)
        return (Fit(Way(None, 4, 1, False, 8, False), 930_000_000, 1.0, False),)

    monkeypatch.setattr("farfield.edge_client.fitting.look_ahead", look_ahead)
    monkeypatch.setattr("farfield.edge_client.fitting.ample", lambda *_: 10**15)
    file = tmp_path / "foretold.json"
    small = place.participant(Consent(max_memory_bytes=400_000_000), foretold=file)
    refusals = [place.ask(small), place.ask(small), place.ask(small, run="run-2")]
    assert isinstance(refusals[0], Refused) and refusals == [refusals[0]] * 3
    assert looked == [400_000_000] and place.said.count("looking for what fits into memory") == 1

    # A new process with more memory needs no look, and one whose limit was passed makes the next look again.
    large = place.participant(Consent(max_memory_bytes=10**12), foretold=file)
    assert isinstance(place.ask(large), Evaluated)
    assert len(looked) == 1 and place.said.count("fits into memory: lora, batch 4 × 1") == 1
    with monkeypatch.context() as patched:
        patched.setattr("farfield.edge_client.worker.evaluate", lambda *_, **__: torch.ones(10**14))
        assert isinstance(place.ask(large), Failed)
    assert isinstance(place.ask(small), Refused)
    assert len(looked) == 2
    assert isinstance(place.ask(small, backbone="cd" * 32), Refused)
    assert len(looked) == 3


def test_a_limit_that_is_passed_in_the_middle_is_a_reply(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object, **__: object) -> None:
        torch.ones(10**14)

    monkeypatch.setattr("farfield.edge_client.worker.evaluate", greedy)
    outcome = place.ask(place.participant())
    assert isinstance(outcome, Failed) and outcome.reason.startswith("this work takes more memory than")


def test_a_task_is_done_once(place: Place) -> None:
    ann = place.participant()
    work = Evaluate(place.adapter)
    desk = Desk(sign_charter(place.charter, SIGNER), SIGNER, work, expires=time.time() + 60, sealed=True)
    task = Task("run-1", 1, "ann", place.plan.digest, work, 3)
    parcel = desk.address(task, ANN.member)
    ann.answer(Parcel(parcel.head, list(parcel.frames)))
    with pytest.raises(TrustError, match="was here before: a replay"):
        ann.answer(Parcel(parcel.head, list(parcel.frames)))


def test_an_unknown_signer_gets_no_answer(place: Place) -> None:
    stranger = Signer(Ed25519PrivateKey.generate(), b"another certificate")
    work = Evaluate(place.adapter)
    desk = Desk(sign_charter(place.charter, stranger), stranger, work, expires=time.time() + 60, sealed=True)
    task = Task("run-1", 1, "ann", place.plan.digest, work, 3)
    with pytest.raises(TrustError, match="another signer"):
        place.participant().answer(desk.address(task, ANN.member))


# --- Secure aggregation and privacy -----------------------------------------------------------------------------------

SECAGG: dict[str, dict[str, Any]] = {"protection": {"kind": "secagg"}}
CLIENT: dict[str, dict[str, Any]] = {
    "aggregation": {"weighting": "uniform"},
    "privacy": {"kind": "client", "noise_multiplier": 2.0},
}


def others(task: Task, asked: Train | Evaluate) -> Part:
    """What those do who are no real participants: nothing, in the right form."""
    update = {name: np.zeros_like(one) for name, one in unpack_state(asked.adapter).items()}
    return Part(update if isinstance(asked, Train) else {}, 1, 1, 1.0, 1)


def added_up(
    place: Place, ann: Participant, work: Train | Evaluate, number: int = 1
) -> tuple[SecureRound, list[Outcome]]:
    """A secure round of ann, a real participant, and two others; and what she answered at each step."""
    crowd = Clients(place.plan, others, BACKBONE, place.charter.frozen, TERMS)
    shapes = trained_shapes(place.plan, unpack_state(work.adapter), number) if isinstance(work, Train) else {}
    subject = Subject(
        bytes.fromhex(place.plan.digest),
        bytes.fromhex(BACKBONE),
        bytes.fromhex(place.charter.frozen),
        "train" if shapes else "evaluate",
        bytes.fromhex(digest(unpack_state(work.adapter))),
        work.clipping_norm if isinstance(work, Train) else None,
        (1.0,) * len(shapes),
    )
    keys = {"ann": ANN.signing.public_key().public_bytes_raw(), **crowd.identities(("bob", "cy"))}
    session = secrets.token_bytes(32)
    round_ = SecureRound(place.plan, "run-1", number, work, subject, shapes, keys, session, lambda: 0.0)
    said: list[Outcome] = []
    for _, one in round_.steps():
        for task in one.tasks():
            if task.node == "ann":
                said.append(place.ask(ann, task.work, number=number))
                one.receive(Reply.to(task, said[-1]), 0.0)
            else:
                one.receive(Reply.to(task, crowd.answer(task)), 0.0)
    return round_, said


def test_a_participant_takes_all_steps_of_a_secure_round(folder: Path) -> None:
    place = Place(folder, **SECAGG)
    ann = place.participant()
    for work in (Train(place.adapter), Evaluate(place.adapter)):
        round_, said = added_up(place, ann, work)
        assert round_.failure == ""
        assert [type(one) for one in said] == [Secured] * 5
        assert round_.clients == ("ann", "bob", "cy")
        assert round_.sum is not None
        assert round_.sum.examples > 2
    assert ann.loads == 1
    assert "secure aggregation: advertise" in place.said
    assert "training" in place.said
    assert "evaluating" in place.said


@pytest.mark.parametrize("kind", [Train, Evaluate])
def test_an_answer_that_stands_alone_is_not_given_where_sums_are_promised(
    folder: Path, kind: type[Train] | type[Evaluate]
) -> None:
    place = Place(folder, **SECAGG)
    outcome = place.ask(place.participant(data="no/such/file"), kind(place.adapter))
    assert isinstance(outcome, Failed)
    assert "the Plan promises secure aggregation" in outcome.reason


def test_the_owners_limits_hold_for_every_sum(folder: Path) -> None:
    place = Place(folder, **SECAGG)
    for consent, reason in (
        (Consent(min_sum=4), "4"),
        (Consent(roster_key="ab" * 32), "without a consortium's roster"),
        (Consent(protections=("sealed",)), "consent.protections"),
    ):
        round_, said = added_up(place, place.participant(consent, data="no/such/file"), Train(place.adapter))
        assert "ann" not in round_.clients
        assert isinstance(said[0], Failed | Refused)
        assert reason in said[0].reason


def enough(place: Place) -> float:
    spent = promised(place.plan)
    assert spent is not None
    return spent.epsilon * 1.0001


def test_a_round_is_written_down_before_it_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays, though training failed: something of it may have been seen."""
    place = Place(folder, **CLIENT)
    ledger = tmp_path / "ledger.jsonl"
    rounds: list[list[int]] = []
    locally = Worker._locally

    def noted(self: Worker, task: Task, start: State, examples: Sequence[Example]) -> Done:
        rounds.append([entry.round for entry in Ledger(ledger).entries])
        return locally(self, task, start, examples)

    monkeypatch.setattr(Worker, "_locally", noted)
    ann = place.participant(ledger=ledger)
    assert isinstance(place.ask(ann, Train(place.adapter, 1.0)), Trained)
    assert isinstance(place.ask(ann, Train(place.adapter), number=2), Failed)  # without a norm
    assert rounds == [[1], [1, 2]]
    assert [(entry.run, entry.round, entry.plan) for entry in Ledger(ledger).entries] == [
        ("run-1", number, place.plan.digest) for number in (1, 2)
    ]


def test_an_owner_who_allows_what_the_plan_promises_is_in_all_of_its_rounds(folder: Path, tmp_path: Path) -> None:
    """At every step of the last round, too; and in no round of another run."""
    place = Place(folder, **SECAGG | CLIENT)
    ledger = tmp_path / "ledger.jsonl"
    ann = place.participant(Consent(max_epsilon=enough(place)), ledger=ledger)
    for number in (1, 2, 3):
        round_, said = added_up(place, ann, Train(place.adapter, 1.0), number)
        assert [type(one) for one in said] == [Secured] * 5
        assert "ann" in round_.clients
    assert [entry.round for entry in Ledger(ledger).entries] == [1, 2, 3]
    outcome = place.ask(ann, Secure(Step.ADVERTISE.value, bytes(32), b"", b""), run="run-2")
    assert isinstance(outcome, Refused)
    assert "on this machine's data 3 more rounds would bring" in outcome.reason


@pytest.mark.parametrize("sections", [CLIENT, SECAGG | CLIENT], ids=["sealed", "secagg"])
def test_a_run_that_would_spend_too_much_is_refused_at_its_first_task(
    folder: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    place = Place(folder, **sections)
    ledger = tmp_path / "ledger.jsonl"
    ann = place.participant(Consent(max_epsilon=enough(place) * 0.9), data="no/such/file", ledger=ledger)
    for number in (0, 1):
        outcome = place.ask(ann, Train(place.adapter, 1.0), number=number)
        assert isinstance(outcome, Refused)
        assert "consent.max_epsilon" in outcome.reason
    assert (ann.loads, place.fetched) == (0, [])
    assert Ledger(ledger).entries == ()


def test_without_privacy_a_run_over_data_with_a_limit_is_refused(place: Place, tmp_path: Path) -> None:
    ann = place.participant(Consent(max_epsilon=100.0), data="no/such/file", ledger=tmp_path / "ledger.jsonl")
    outcome = place.ask(ann, Train(place.adapter))
    assert isinstance(outcome, Refused)
    assert "max_epsilon" in outcome.reason


@pytest.mark.parametrize("sections", [CLIENT, SECAGG | CLIENT], ids=["sealed", "secagg"])
def test_a_loss_that_privacy_does_not_cover_is_not_told(folder: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    place = Place(folder, **sections)
    ledger = tmp_path / "ledger.jsonl"
    ann = place.participant(data="no/such/file", ledger=ledger)
    if sections is CLIENT:
        outcome = place.ask(ann, Evaluate(place.adapter))
    else:
        _, said = added_up(place, ann, Evaluate(place.adapter))
        outcome = said[-1]
    assert isinstance(outcome, Failed)
    assert "this Plan's privacy does not allow" in outcome.reason
    assert not ledger.exists()


def test_an_evaluation_spends_nothing(place: Place, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    assert isinstance(place.ask(place.participant(ledger=ledger)), Evaluated)
    assert not ledger.exists()

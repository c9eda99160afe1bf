"""A participant between machines: what it verifies, refuses, loads, and tells, with a real Plan and a real backbone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tiny import plan_text, write_backbone, write_clients

from farfield.edge_client.consent import Consent
from farfield.edge_client.participant import Participant
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.envelope import Charter, Desk, Identity, Signer, sign_charter
from farfield.protocols.errors import TrustError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Outcome, Refused, Task, Train, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import pack_state

ANN = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
SIGNER = Signer(Ed25519PrivateKey.generate(), b"certificate")
BACKBONE = "ab" * 32


class Place:
    """A coordinator's desk on one side, and a participant on the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: Plan = plans.parse(plan_text(), registered(), None)
        bench = Bench(self.plan, folder / "backbone")
        self.adapter = pack_state(bench.adapter(), "float32")
        self.charter = Charter("run-1", self.plan.canonical(), BACKBONE, 1000, bench.frozen)
        self.fetched: list[str] = []
        self.said: list[str] = []

    def participant(self, consent: Consent | None = None, data: str = "data/client-000.jsonl") -> Participant:
        return Participant(
            "ann",
            ANN,
            self._trusted,
            consent or Consent(),
            self.folder / data,
            self._fetch,
            lambda run, number, activity: self.said.append(activity),
        )

    def ask(self, who: Participant, work: Train | Evaluate | None = None, cohort: int = 3, **charter: Any) -> Outcome:
        stated = replace(self.charter, **charter)
        work = work or Evaluate(self.adapter)
        task = Task(stated.run, 1, "ann", stated.plan_digest, work, cohort)
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


def test_what_nobody_foresaw_does_not_end_the_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory at /secret/path")

    ann = place.participant()
    monkeypatch.setattr("farfield.edge_client.worker.evaluate", crash)
    outcome = place.ask(ann)
    assert outcome == Failed("it failed unexpectedly (RuntimeError); its own log says more")
    assert "/secret/path" in place.said[-1]


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

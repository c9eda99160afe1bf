"""A participant whose tuning method leaves it a part of its own: kept in its home by run, and never sent."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tiny import plan_text, write_backbone, write_clients

from farfield.edge_client.consent import Consent
from farfield.edge_client.participant import Participant
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.envelope import Charter, Desk, Identity, Signer, sign_charter
from farfield.protocols.messages import Evaluate, Evaluated, Outcome, Task, Train, Trained
from farfield.protocols.tensors import State, pack_state

ANN = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
SIGNER = Signer(Ed25519PrivateKey.generate(), b"certificate")


class Place:
    """A coordinator's desk on one side; on the other, participants that share one home."""

    def __init__(self, folder: Path) -> None:
        write_backbone(folder / "backbone")
        write_clients(folder / "data", 1)
        text = plan_text(
            tuning={"local_b": True}, training={"learning_rate": 0.05, "steps": 4}, protection={"kind": "sealed"}
        )
        plan = plans.parse(text, registered(), None)
        bench = Bench(plan, folder / "backbone")
        self.adapter: State = bench.adapter()
        self.folder, self.home = folder, folder / "local"
        self._canonical, self._frozen = plan.canonical(), bench.frozen

    def participant(self) -> Participant:
        return Participant(
            "ann",
            ANN,
            lambda _: SIGNER.key.public_key(),
            Consent(),
            self.folder / "data" / "client-000.jsonl",
            lambda _: self.folder / "backbone",
            lambda *_: None,
            keep=self.home,
        )

    def ask(self, who: Participant, kind: type[Train] | type[Evaluate], run: str = "run-1", number: int = 1) -> Outcome:
        charter, work = (
            Charter(run, self._canonical, "ab" * 32, 1000, self._frozen),
            kind(pack_state(self.adapter, "float32")),
        )
        task = Task(run, number, "ann", charter.plan_digest, work, 3)
        desk = Desk(sign_charter(charter, SIGNER), SIGNER, work, expires=time.time() + 60, sealed=True)
        return desk.open(who.answer(desk.address(task, ANN.member)), task, ANN.member).outcome


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def loss(outcome: Outcome) -> float:
    assert isinstance(outcome, Evaluated), outcome
    return outcome.loss


def test_what_is_kept_outlives_the_process_and_belongs_to_its_run_alone(place: Place) -> None:
    ann = place.participant()
    untrained = loss(place.ask(ann, Evaluate, number=0))
    trained = place.ask(ann, Train)
    assert isinstance(trained, Trained), trained
    assert trained.update.keys() == place.adapter.keys()
    assert not any(".lora_B." in name for name in trained.update)
    own = loss(place.ask(ann, Evaluate))
    assert own != untrained
    another_process = place.participant()
    assert loss(place.ask(another_process, Evaluate)) == own
    assert loss(place.ask(another_process, Evaluate, run="../run-2")) == untrained
    place.ask(another_process, Train, run="../run-2")
    files = list(place.home.rglob("*.safetensors"))
    assert len({file.parent for file in files}) == len(files) == 2
    assert {file.parent.parent for file in files} == {place.home}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_round_that_the_coordinator_asks_for_again_comes_out_the_same(place: Place) -> None:
    ann = place.participant()
    place.ask(ann, Train, number=1)
    second = place.ask(ann, Train, number=2)
    assert place.ask(place.participant(), Train, number=2) == second
    assert place.ask(ann, Train, number=3) != second

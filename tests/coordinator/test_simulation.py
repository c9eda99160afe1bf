"""A whole federation in this process, against what it must equal."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny import Place, Silent, write_backbone, write_clients

from farfield.coordinator import plans, simulation
from farfield.coordinator.accounts import LEDGER
from farfield.coordinator.results import Result
from farfield.coordinator.rounds import sample_cohort
from farfield.coordinator.runs import Checkpoint, RoundRecord, RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import Faults, Fleet, SimulatedParticipant, bound_memory, identity, sources
from farfield.edge_client.data import ClientData, TokenExample, batches
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.protocols import codec, envelope
from farfield.protocols import messages_pb2 as pb
from farfield.protocols.envelope import Charter, Desk, Member, Opened, Signer, sign_charter
from farfield.protocols.errors import PlanError, RunError, TrustError, WireError
from farfield.protocols.messages import Evaluate, Evaluated, Reply, Task
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Ledger
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State, digest, pack_state


class Quiet(Silent):
    """Nobody watching; keeps what was told."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.rounds: list[int] = []
        self.clients: list[tuple[int, str, int, int]] = []
        self.baseline: list[int] = []

    def on_preparing(self, done: int, clients: int) -> None:
        self.prepared.append(done)

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None:
        self.clients.append((number, activity, done, clients))

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record.round)

    def on_start(self, folder: Path, info: object, done: list[RoundRecord], rounds: int) -> None:
        self.rounds.extend(record.round for record in done)

    def on_baseline(self, done: int, steps: int, loss: float) -> None:
        self.baseline.append(done)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    return Place.make(tmp_path, backbone)


def go(place: Place, observer: Quiet | None = None, **request: Any) -> Result:
    asked = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs")
    return simulate(replace(asked, **request), observer or Quiet())


def fleet(place: Place) -> tuple[Plan, Bench, Fleet]:
    plan = plans.load(place.path / "plan.toml")
    bench = Bench(plan, place.path / "backbone")
    return plan, bench, Fleet(plan, bench, sources(None, place.path / "data"))


def last(result: Result) -> Checkpoint:
    return RunFolder.open(result.folder).load(len(result.rounds) - 1)


SEALED = {"kind": "sealed"}
ONE_STEP = {"rounds": 1, "steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9}


def test_one_client_and_one_step_are_one_centralised_step(tmp_path: Path, backbone: Path) -> None:
    """Through the codec, the round, the rule and the checkpoint; against torch's own loss and a step by hand."""
    place = Place.make(tmp_path, backbone, clients=1)
    place.plan(training=ONE_STEP, protection=SEALED)
    result = go(place)

    plan, bench, clients = fleet(place)
    (name,) = clients.names
    examples = clients.data(name).train
    (first, *_) = batches(examples, 4, derive(plan.training.seed, "train", 1, name), 0)
    assert len(first) == 4
    texts = [torch.tensor([list(one.input_ids)]) for one in first if isinstance(one, TokenExample)]
    before = bench.adapter()
    # Text by text, without padding; transformers' own loss is the mean over a text's predicted tokens.
    targets = [text.shape[1] - 1 for text in texts]
    loss = sum(bench.tuned.model(input_ids=text, labels=text).loss * n for text, n in zip(texts, targets, strict=True))
    loss = loss / sum(targets)
    loss.backward()
    moved = False
    trained = last(result).adapter
    for key, parameter in bench.tuned.trainable().items():
        assert parameter.grad is not None
        # Values and gradients are of size 1 and less; the sums behind a gradient are taken in another order here.
        np.testing.assert_allclose(trained[key], before[key] - 0.5 * parameter.grad.numpy(), rtol=0, atol=1e-6)
        moved |= bool((np.abs(trained[key] - before[key]) > 1e-4).any())
    assert moved, "the step is no larger than the tolerance"
    assert result.rounds[1].train_loss == pytest.approx(float(loss.detach()), abs=1e-5)


def test_a_federation_of_equals_is_one_centralised_step(tmp_path: Path, backbone: Path) -> None:
    """Clients with the same text and weight whose single batch is all they have: the mean update is anyone's."""
    place = Place.make(tmp_path, backbone, clients=1)
    place.plan(training=ONE_STEP | {"batch_size": 64}, data={"held_out": 0.0}, protection=SEALED)
    alone = last(go(place)).adapter
    text = (place.path / "data" / "client-000.jsonl").read_text()
    for other in "bcd":
        (place.path / "data" / f"{other}.jsonl").write_text(text)
    together = last(go(place)).adapter
    for key, value in alone.items():
        np.testing.assert_allclose(together[key], value, rtol=0, atol=1e-6)


def test_the_same_plan_and_seed_give_the_same_digest(place: Place) -> None:
    """And sums of the same bytes, though no mask and no key is the same twice."""
    assert plans.load(place.path / "plan.toml").protection.kind == "secagg"
    first, again = go(place), go(place)
    assert first.run != again.run
    assert first.adapter_digest == again.adapter_digest == digest(last(first).adapter)
    for ours, theirs in zip(first.rounds, again.rounds, strict=True):
        # The run's name is in every message, and all names are of one length.
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)
    place.plan(training={"seed": 6})
    assert go(place).adapter_digest != first.adapter_digest


def test_learning_shows(place: Place) -> None:
    place.plan(training={"rounds": 5, "steps": 5, "learning_rate": 0.05})
    quiet = Quiet()
    result = go(place, quiet, compare=True)
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.1
    assert result.centralised is not None
    assert result.centralised.steps == sum(record.steps for record in result.rounds) == 5 * 5 * 3
    assert result.centralised.eval_loss is not None
    assert result.centralised.eval_loss < result.eval_loss_before - 0.1
    assert quiet.rounds == [0, 1, 2, 3, 4, 5]
    assert quiet.prepared == [1, 2, 3]
    assert quiet.baseline == list(range(1, 76))
    steps = ("agreeing on keys", "sharing keys", "evaluating", "confirming who is there", "unmasking the sum")
    assert quiet.clients[:15] == [(0, what, done, 3) for what in steps for done in (1, 2, 3)]


def test_the_bytes_counted_are_those_that_travel(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    address, close = Desk.address, envelope.close_reply

    def addressed(self: Desk, task: Task, member: Member) -> Parcel:
        parcel = address(self, task, member)
        sent[task.round] = sent.get(task.round, 0) + len(parcel.head) + sum(map(len, parcel.frames))
        return parcel

    def closed(reply: Reply, to: Opened, key: Ed25519PrivateKey) -> Parcel:
        parcel = close(reply, to, key)
        received[reply.round] = received.get(reply.round, 0) + len(parcel.head) + sum(map(len, parcel.frames))
        return parcel

    monkeypatch.setattr(Desk, "address", addressed)
    monkeypatch.setattr(simulation, "close_reply", closed)
    for faults in (Faults(), Faults(dropout=0.4, stragglers=0.4)):
        sent.clear()
        received.clear()
        result = go(place, faults=faults)
        assert {record.round: record.bytes_down for record in result.rounds} == sent
        assert {record.round: record.bytes_up for record in result.rounds} == {n: received.get(n, 0) for n in sent}
    # Nobody is asked for less than the adapter, and updates are as large.
    values = 4 * sum(array.size for array in last(result).adapter.values())
    assert sent[0] > 3 * values


def test_every_task_and_every_reply_is_signed_and_sealed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between machines; with protection "none" they are not sealed, and come to the same adapter."""
    parcels: list[Parcel] = []
    tasks: list[tuple[Task, pb.SignedTask, bytes]] = []
    charters: list[Charter] = []
    address, close = Desk.address, envelope.close_reply

    def addressed(self: Desk, task: Task, member: Member) -> Parcel:
        parcel = address(self, task, member)
        tasks.append((task, codec.parse(pb.SignedTask(), parcel.head), b"".join(parcel.frames)))
        return parcel

    def closed(reply: Reply, to: Opened, key: Ed25519PrivateKey) -> Parcel:
        charters.append(to.charter)
        parcel = close(reply, to, key)
        parcels.append(Parcel(parcel.head, list(parcel.frames)))
        return parcel

    monkeypatch.setattr(Desk, "address", addressed)
    monkeypatch.setattr(simulation, "close_reply", closed)
    place.plan(protection=SEALED)
    sealed = go(place)
    plan, bench, _ = fleet(place)
    expected = Charter(sealed.run, plan.canonical(), "", 0, bench.frozen)
    assert len(charters) == 3 * (1 + 3 + 3)
    assert set(charters) == {expected}
    heads = [codec.parse(pb.SealedReply(), parcel.head) for parcel in parcels]
    assert len({head.nonce for head in heads}) == len({head.ephemeral for head in heads}) == len(parcels)
    for parcel in parcels:
        with pytest.raises(WireError):
            codec.decode_reply(parcel)
    assert len(tasks) == len(parcels) == len({head.body_key for _, head, _ in tasks})
    assert len({head.seal_to for _, head, _ in tasks}) == len({body for _, _, body in tasks}) == 1 + 3 + 3
    for task, _, body in tasks:
        values = b"".join(codec.pack_body(task.work).frames)
        assert len(values) < len(body)
        assert values[:64] not in body
    parcels.clear()
    tasks.clear()
    place.plan(protection={"kind": "none"})
    bare = go(place)
    assert len(parcels) == 3 * (1 + 3 + 3)
    assert {codec.decode_reply(parcel).run for parcel in parcels} == {bare.run}
    for task, head, body in tasks:
        assert body == b"".join(codec.pack_body(task.work).frames)
        assert head.seal_to == head.ephemeral == head.body_key == b""
        assert head.signature
    assert bare.adapter_digest == sealed.adapter_digest
    for ours, theirs in zip(bare.rounds, sealed.rounds, strict=True):
        assert ours.bytes_up < theirs.bytes_up < ours.bytes_up + 6 * 300  # what a seal takes, for each reply
        assert (ours.train_loss, ours.eval_loss) == (theirs.train_loss, theirs.eval_loss)


def test_the_keys_of_a_client_come_from_the_secret_of_its_run() -> None:
    """So every process that has the secret can be any client; and nobody else."""
    assert identity(b"s" * 32, "ann").member == identity(b"s" * 32, "ann").member
    raw = set()
    for secret in (b"s" * 32, b"t" * 32):
        for client in ("ann", "bob", ""):
            keys = identity(secret, client)
            raw |= {keys.signing.private_bytes_raw(), keys.sealing.private_bytes_raw()}
    assert len(raw) == 12


def test_a_simulated_client_does_what_its_own_coordinator_asks_of_it_alone(place: Place) -> None:
    place.plan(protection=SEALED)
    plan, bench, clients = fleet(place)
    name, other = clients.names[:2]
    signer, secret = Signer(Ed25519PrivateKey.generate()), bytes(32)
    own = identity(secret, name)
    participant = SimulatedParticipant(name, clients, own, signer.key.public_key(), True, None)
    task = Task("run", 1, name, plan.digest, Evaluate(pack_state(bench.adapter(), "float32")), 1)

    def desk_of(frozen: str = clients.frozen, by: Signer = signer) -> Desk:
        charter = sign_charter(Charter("run", plan.canonical(), "", 0, frozen), by)
        return Desk(charter, by, task.work, expires=0.0, sealed=True)

    desk = desk_of()
    reply = desk.open(participant.answer(desk.address(task, own.member)), task, own.member)
    assert isinstance(reply.outcome, Evaluated)
    for parcel, said in (
        (desk.address(task, identity(secret, other).member), "the seal does not hold"),
        (desk.address(replace(task, node=other), own.member), f"a task for '{other}', and this is '{name}'"),
        (desk_of(by=Signer(Ed25519PrivateKey.generate())).address(task, own.member), "does not hold"),
        (desk_of(frozen="00" * 32).address(task, own.member), "draws other frozen adapter weights"),
    ):
        with pytest.raises(TrustError, match=said):
            participant.answer(parcel)


def test_a_round_takes_as_long_as_it_takes(place: Place) -> None:
    """The clock of a simulation stands still: no task expires while other clients are at work."""
    place.plan(cohort={"round_seconds": 0.001})
    assert [record.clients for record in go(place).rounds] == [0, 3, 3, 3]


def test_what_bounds_memory_does_not_overrule_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    bound_memory()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    bound_memory()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


def test_over_selection_makes_up_for_dropouts(place: Place) -> None:
    write_clients(write := place.path / "many", 9, records=6)
    training = {"rounds": 6, "steps": 1}
    faults = Faults(dropout=0.3)
    place.plan(training=training, cohort={"size": 4}, protection=SEALED)
    without = go(place, data=write, faults=faults)
    place.plan(training=training, cohort={"size": 4, "over_selection": 1.0}, protection=SEALED)
    quiet = Quiet()
    result = go(place, quiet, data=write, faults=faults)
    assert any(record.clients < 4 for record in without.rounds[1:])
    assert [record.clients for record in result.rounds] == [0, 4, 4, 4, 4, 4, 4]
    assert any(record.problems for record in result.rounds)
    asked = [max(done for n, what, done, of in quiet.clients if (n, what) == (r, "training")) for r in range(1, 7)]
    assert {of for _, what, _, of in quiet.clients if what == "training"} == {8}
    # Nobody is asked any more once the round has what it wants.
    assert asked == [4 + len(record.problems) for record in result.rounds[1:]]


def test_updates_in_bfloat16_are_half_as_large(place: Place) -> None:
    place.plan(protection=SEALED)
    whole = go(place)
    place.plan(delivery={"dtype": "bfloat16"}, protection=SEALED)
    half = go(place)
    for ours, theirs in zip(half.rounds[1:], whole.rounds[1:], strict=True):
        assert 0.5 * theirs.bytes_up < ours.bytes_up < 0.75 * theirs.bytes_up
        assert ours.bytes_down < 0.75 * theirs.bytes_down


def test_evaluation_every_so_many_rounds_and_at_the_end(place: Place) -> None:
    place.plan(training={"rounds": 5, "steps": 1}, evaluation={"every": 2, "clients": 2}, protection=SEALED)
    quiet = Quiet()
    result = go(place, quiet)
    measured = [record.round for record in result.rounds if record.eval_loss is not None]
    assert measured == [0, 2, 4, 5]
    assert [(n, done, of) for n, what, done, of in quiet.clients if what == "evaluating"] == [
        (n, done, 2) for n in measured for done in (1, 2)
    ]
    assert result.eval_loss_before == result.rounds[0].eval_loss
    assert result.eval_loss_after == result.rounds[5].eval_loss


def test_a_round_asks_its_cohort_only(place: Place) -> None:
    write = place.path / "many"
    write_clients(write, 9, records=6)
    place.plan(training={"rounds": 4, "steps": 1}, cohort={"size": 4})
    quiet = Quiet()
    result = go(place, quiet, data=write)
    assert [record.clients for record in result.rounds] == [0, 4, 4, 4, 4]
    assert {of for _, what, _, of in quiet.clients if what == "training"} == {4}
    plan = plans.load(place.path / "plan.toml")
    names = [source.name for source in sources(None, write)]
    cohorts = [sample_cohort(plan, number, names) for number in range(1, 5)]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    place.plan(training={"rounds": 1, "steps": 1}, cohort={"fraction": 0.5})
    assert go(place, data=write, clients=6).rounds[1].clients == 3


def test_dropouts_and_stragglers_are_recorded_and_not_counted(place: Place) -> None:
    place.plan(training={"rounds": 8, "steps": 1}, cohort={"minimum": 2, "round_seconds": 60.0}, protection=SEALED)
    result = go(place, faults=Faults(dropout=0.3, stragglers=0.3))
    reasons = {reason for record in result.rounds for reason in record.problems.values()}
    assert reasons == {"dropped out (simulated)", "no answer within 60 s"}
    folder = RunFolder.open(result.folder)
    kinds = set()
    for record in result.rounds[1:]:
        came = 3 - len(record.problems)
        kinds.add(came)
        before, after = (folder.load(number).adapter for number in (record.round - 1, record.round))
        if came < 2:
            assert (record.clients, record.train_loss, record.steps) == (0, None, 0)
            assert digest(before) == digest(after)
        else:
            assert (record.clients, record.steps) == (came, came)
            assert digest(before) != digest(after)
    assert min(kinds) < 2 <= max(kinds), "both kinds of round are to be seen"


def test_what_stragglers_send_changes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clients, lost or late: the same adapter."""
    place.plan(cohort={"minimum": 1}, training={"rounds": 4}, protection=SEALED)

    def happens(self: object, what: str, probability: float, task: Task) -> bool:
        return probability > 0 and (task.round + int(task.node[-7])) % 2 == 0

    monkeypatch.setattr(simulation.Simulation, "_happens", happens)
    lost, late = go(place, faults=Faults(dropout=1.0)), go(place, faults=Faults(stragglers=1.0))
    assert {record.clients for record in lost.rounds[1:]} == {1, 2}
    assert lost.adapter_digest == late.adapter_digest
    assert sum(record.bytes_up for record in late.rounds) > sum(record.bytes_up for record in lost.rounds)


def test_a_federation_that_nobody_answers_ends_where_it_began(place: Place) -> None:
    result = go(place, faults=Faults(dropout=1.0))
    folder = RunFolder.open(result.folder)
    assert result.adapter_digest == digest(folder.load(0).adapter)
    assert [record.clients for record in result.rounds] == [0, 0, 0, 0]
    assert result.eval_loss_after == result.eval_loss_before
    assert (result.folder / "loss.png").is_file()


def test_who_falls_out_of_a_secure_round_is_not_in_its_sum(place: Place) -> None:
    """Of five it takes four; fewer are not opened, and the round says so."""
    place.plan(training={"rounds": 8, "steps": 1}, cohort={"round_seconds": 60.0})
    data = write_clients(place.path / "five", 5)
    result = go(place, data=data, faults=Faults(dropout=0.15, stragglers=0.15))
    folder = RunFolder.open(result.folder)
    came = set()
    for record in result.rounds[1:]:
        reasons = {reason for node, reason in record.problems.items() if node != "the round"}
        assert reasons <= {"dropped out (simulated)", "no answer within 60 s"}
        left = 5 - len(record.problems.keys() - {"the round"})
        came.add(left)
        assert record.clients == record.steps == (left if left >= 4 else 0)
        assert ("the round" in record.problems) is (left < 4)
        before, after = (digest(folder.load(number).adapter) for number in (record.round - 1, record.round))
        assert (before == after) is (left < 4)
        assert record.eval_loss is not None, "evaluations have no faults"
    assert came >= {3, 4}, "both kinds of round are to be seen"


@pytest.mark.parametrize("kind", ["sealed", "secagg"])
@pytest.mark.parametrize("what", ["trained", "_measured"])
def test_a_client_that_diverges_is_a_problem_of_its_own(
    place: Place, kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss or an update that is no number must not end the federation."""
    done = getattr(Worker, what)

    def sick(self: Worker, task: Task, work: Any) -> Part:
        part: Part = done(self, task, work)
        return replace(part, loss=float("nan")) if self.node == "client-001.jsonl" else part

    monkeypatch.setattr(Worker, what, sick)
    place.plan(protection={"kind": kind})
    result = go(place, data=write_clients(place.path / "four", 4))
    assert [record.clients for record in result.rounds] == [0, *[3 if what == "trained" else 4] * 3]
    assert all(list(record.problems) == ["client-001.jsonl"] for record in result.rounds[1:])
    assert all(record.eval_loss is not None for record in result.rounds)


def test_all_examples_of_many_clients_are_never_in_memory(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three clients' examples: those that have not been used for longest are read again, and are the same."""
    place = Place.make(tmp_path, backbone, clients=1)
    text = (place.path / "data" / "client-000.jsonl").read_text()
    for other in "bcdef":
        (place.path / "data" / f"{other}.jsonl").write_text(text)
    _, _, clients = fleet(place)
    one = clients.data(clients.names[0])
    examples = (*one.train, *one.held_out)
    size = sum(simulation.EXAMPLE_BYTES + 4 * len(example.input_ids) for example in examples)
    monkeypatch.setattr(simulation, "CACHED_BYTES", 3 * size)
    _, _, clients = fleet(place)
    reads: list[str] = []
    read = Fleet._read

    def counted(self: Fleet, name: str) -> ClientData:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Fleet, "_read", counted)
    clients.check(Quiet())
    assert reads == clients.names
    held = {name: clients.data(name) for name in reversed(clients.names)}
    kept = len(clients.names) * 2 - len(reads)
    assert 1 <= kept <= 3
    assert {name: clients.data(name) for name in clients.names} == held


@pytest.mark.parametrize(
    "tuning",
    [
        {"kind": "lora", "rank": 2, "dropout": 0.2},
        {"kind": "prompt-tuning", "rank": None, "tokens": 2},
        {"kind": "adalora", "rank": None, "initial_rank": 4, "target_rank": 2, "interval": 1},
    ],
    ids=lambda one: str(one["kind"]),
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    place: Place, tuning: dict[str, Any], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plan(
        tuning=tuning,
        training={"rounds": 4, "steps": 2},
        aggregation={"server_optimizer": "adam", "learning_rate": 0.01},
        cohort={"size": 4},
    )
    assert plans.load(place.path / "plan.toml").protection.kind == "secagg"
    faults, data = Faults(dropout=0.1, stragglers=0.1), write_clients(place.path / "five", 5)
    whole = go(place, faults=faults, data=data, runs=place.path / "whole")
    assert len({record.clients for record in whole.rounds[1:]}) > 1, "somebody fell out, and something was trained"
    save = RunFolder.save

    class Crash(Exception):
        pass

    def crash(self: RunFolder, checkpoint: Checkpoint) -> None:
        save(self, checkpoint)
        if checkpoint.record.round == after:
            raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(RunFolder, "save", crash)
        go(place, faults=faults, data=data)
    quiet = Quiet()
    resumed = go(place, quiet, resume=place.run().name, data=None)
    assert quiet.rounds == [0, 1, 2, 3, 4]
    assert resumed.adapter_digest == whole.adapter_digest
    assert [replace(one, seconds=0.0) for one in resumed.rounds] == [replace(one, seconds=0.0) for one in whole.rounds]


def test_what_does_not_fit_the_run_is_refused_on_resume(place: Place) -> None:
    run = str(go(place, faults=Faults(dropout=0.1)).folder)
    with pytest.raises(RunError, match=r"this run has 3 clients, not 2"):
        go(place, resume=run, clients=2)
    with pytest.raises(RunError, match=r"this run has --dropout 0\.1"):
        go(place, resume=run, faults=Faults(dropout=0.2))
    with pytest.raises(RunError, match="this run's data"):
        go(place, resume=run, data=write_clients(place.path / "other", 3))
    assert go(place, resume=run, clients=3, faults=Faults(dropout=0.1)).run == Path(run).name
    weights = (place.path / "backbone").resolve() / "model.safetensors"
    (place.path / "backbone").unlink()
    other = place.path / "backbone"
    other.mkdir()
    for file in weights.parent.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    with pytest.raises(RunError, match="the backbone has changed since this run began"):
        go(place, resume=run)


def test_fewer_clients_than_a_round_needs_is_said_at_once(place: Place) -> None:
    place.plan(cohort={"minimum": 4})
    with pytest.raises(PlanError, match=r"cohort\.minimum = 4, but there are 3 clients"):
        go(place)
    assert not place.runs()


def test_fewer_clients_than_a_sum_needs_is_said_at_once(place: Place) -> None:
    with pytest.raises(PlanError, match=r'"secagg" takes 3 clients, and there are 2.*protection\.kind = "sealed"'):
        go(place, clients=2)
    assert not place.runs()
    place.plan(protection=SEALED, training={"rounds": 1})
    assert go(place, clients=2).rounds[1].clients == 2


def test_privacy_is_written_down_in_the_run_folder(place: Place) -> None:
    """A line for each round; nothing is evaluated, and the rounds have noise of their own every time."""
    privacy = {"kind": "client", "noise_multiplier": 1.0, "clipping_norm": 0.1}
    place.plan(aggregation={"weighting": "uniform"}, privacy=privacy)
    first, again = go(place), go(place)
    for result in (first, again):
        ledger = Ledger(result.folder / LEDGER)
        assert [(entry.run, entry.round) for entry in ledger.entries] == [(result.run, n) for n in (1, 2, 3)]
        assert [record.clipping_norm for record in result.rounds] == [None, 0.1, 0.1, 0.1]
        assert (
            {record.eval_loss for record in result.rounds} == {record.train_loss for record in result.rounds} == {None}
        )
        assert [record.clients for record in result.rounds] == [0, 3, 3, 3]
    assert first.adapter_digest != again.adapter_digest


def test_a_crash_after_a_round_was_paid_for_leaves_it_spent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.plan(aggregation={"weighting": "uniform"}, privacy={"kind": "client", "noise_multiplier": 1.0})
    trained = Worker.trained

    class Crash(Exception):
        pass

    def crash(self: Worker, task: Task, work: Any) -> Part:
        if task.round == 2:
            raise Crash
        return trained(self, task, work)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(Worker, "trained", crash)
        go(place)
    go(place, resume=place.run().name, data=None)
    assert [entry.round for entry in Ledger(place.run() / LEDGER).entries] == [1, 2, 2, 3]


def test_the_run_folder_keeps_the_adapter_of_every_round(place: Place) -> None:
    result = go(place)
    folder = RunFolder.open(result.folder)
    assert folder.rounds() == [0, 1, 2, 3]
    states: list[State] = [folder.load(number).adapter for number in folder.rounds()]
    assert len({digest(state) for state in states}) == 4
    assert digest(states[-1]) == result.adapter_digest

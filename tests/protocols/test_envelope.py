"""What may pass between a coordinator and its clients, and everything else, which may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols import codec, envelope, identity, parcel, sealing
from farfield.protocols import messages_pb2 as pb
from farfield.protocols.envelope import (
    Charter,
    Desk,
    Identity,
    Member,
    Opened,
    Signer,
    close_reply,
    open_task,
    sign_charter,
)
from farfield.protocols.errors import (
    FarfieldError,
    MalformedMessage,
    MessageTooLarge,
    TrustError,
    UnknownVersion,
    WireError,
)
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Outcome, Refused, Reply, Task, Train, Trained, Work
from farfield.protocols.parcel import Parcel
from farfield.protocols.tensors import pack

CERTIFICATE = b"the signer's certificate"
SIGNER = Signer(Ed25519PrivateKey.generate(), CERTIFICATE)
ANN, BOB = (Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate()) for _ in range(2))
CHARTER = Charter("run", b'{"a":"Plan"}', "ab" * 32, 1000, "cd" * 32, b"a roster")
SIGNED = sign_charter(CHARTER, SIGNER)
ADAPTER = {"v": pack(np.arange(3, dtype=np.float32), "float32"), "w": pack(np.ones((2, 3), np.float32), "float32")}
TASK = Task("run", 1, "ann", CHARTER.plan_digest, Train(ADAPTER), 2)
BOBS = replace(TASK, node="bob")
TRAINED = Trained(ADAPTER, 4, 3, 2, 1.0)
NOW = 1_800_000_000.0
EXPIRES = NOW + 60

names = st.text(st.characters(codec="utf-8"), max_size=20)
reasons = names.map(codec.printable)
arrays = st.lists(st.floats(width=32), max_size=8).map(lambda values: pack(np.array(values, np.float32), "float32"))
states = st.dictionaries(names, arrays, max_size=3)
counts = st.integers(0, 2**63)
outcomes = st.one_of(
    st.builds(Trained, states, counts, counts, counts, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Evaluated, counts, counts, st.floats(0, 10), counts),
    st.builds(Failed, reasons),
    st.builds(Refused, reasons),
)
works = st.one_of(st.builds(Train, states), st.builds(Evaluate, states))
tasks = st.builds(Task, names, st.integers(0, 2**32 - 1), names, st.just(CHARTER.plan_digest), works, st.integers(0, 9))


def trusted(certificate: bytes) -> Ed25519PublicKey:
    if certificate != CERTIFICATE:
        raise TrustError("a certificate from nowhere")
    return SIGNER.key.public_key()


def desk_of(
    charter: pb.SignedCharter = SIGNED,
    signer: Signer = SIGNER,
    *,
    work: Work = TASK.work,
    expires: float = EXPIRES,
    sealed: bool = True,
) -> Desk:
    return Desk(charter, signer, work, expires=expires, sealed=sealed)


def addressed(desk: Desk, task: Task = TASK, to: Identity = ANN) -> Parcel:
    return desk.address(task, to.member)


def taken(
    sent: Parcel,
    node: str = "ann",
    by: Identity = ANN,
    now: float = NOW,
    limits: codec.Limits = codec.LIMITS,
    *,
    sealed: bool = True,
) -> Opened:
    """The task that a node finds in the parcel."""
    return open_task(sent, node, trusted, by.sealing, now, limits, sealed=sealed)


def opened(desk: Desk, task: Task = TASK, by: Identity = ANN) -> Opened:
    return taken(addressed(desk, task, by), task.node, by)


def answered(desk: Desk, task: Task = TASK, outcome: Outcome = TRAINED, by: Identity = ANN) -> Parcel:
    return close_reply(Reply.to(task, outcome), opened(desk, task, by), by.signing)


@contextmanager
def cut_into(size: int) -> Iterator[None]:
    """Bodies are cut into frames of this size, so that a few bytes are many."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", size)
        yield


def copied(sent: Parcel) -> Parcel:
    return Parcel(sent.head, list(sent.frames))


# --- what passes ------------------------------------------------------------------------------------------------------


@given(tasks, outcomes, st.booleans(), st.sampled_from((1, 7, 64, parcel.FRAME_BYTES)))
def test_a_task_and_its_reply_come_as_they_were(task: Task, outcome: Outcome, sealed: bool, frame: int) -> None:
    charter = replace(CHARTER, run=task.run)
    with cut_into(frame):
        desk = desk_of(sign_charter(charter, SIGNER), work=task.work, sealed=sealed)
    sent = addressed(desk, task)
    came = taken(sent, task.node, sealed=sealed)
    assert (came.task, came.charter, sent.frames) == (task, charter, [])
    reply = Reply.to(task, outcome)
    with cut_into(frame):
        answer = close_reply(reply, came, ANN.signing)
    assert desk.open(answer, task, ANN.member) == reply
    assert answer.frames == []


@pytest.mark.parametrize("sealed", [True, False])
def test_a_body_without_tensors_travels_too(sealed: bool) -> None:
    """What says that nothing was cut off is there even when there is nothing."""
    task = replace(TASK, work=Train({}))
    desk = desk_of(work=task.work, sealed=sealed)
    assert [len(frame) for frame in desk.frames] == ([sealing.TAG_BYTES] if sealed else [])
    came = taken(addressed(desk, task), sealed=sealed)
    assert came.task == task
    reply = Reply.to(task, Trained({}, 0, 0, 0, 0.0))
    assert desk.open(close_reply(reply, came, ANN.signing), task, ANN.member) == reply
    if sealed:
        sent = addressed(desk, task)
        for frames in ([], [b""], [bytes(sealing.TAG_BYTES)], sent.frames * 2):
            with pytest.raises(TrustError, match="seal"):
                taken(Parcel(sent.head, frames))


def test_every_task_has_a_nonce_and_every_round_keys_of_its_own() -> None:
    desk = desk_of()
    ann, bob = opened(desk), opened(desk, BOBS, BOB)
    assert ann.nonce != bob.nonce
    assert ann.seal_to == bob.seal_to
    other = desk_of()
    assert opened(other).seal_to != ann.seal_to
    assert not set(other.frames) & set(desk.frames)
    assert body_key(addressed(other)) != body_key(addressed(desk))


def test_all_tasks_of_a_round_share_one_body() -> None:
    """It is locked once, however many nodes there are; and one of them that has used its frames up takes no other's."""
    desk = desk_of()
    ann, bob = addressed(desk), addressed(desk, BOBS, BOB)
    for sent in (ann, bob):
        assert len(sent.frames) == len(desk.frames) > 0
        assert all(ours is theirs for ours, theirs in zip(sent.frames, desk.frames, strict=True))
    assert body_key(ann) == body_key(bob, BOB)
    heads = [pb.SignedTask.FromString(sent.head) for sent in (ann, bob)]
    assert len({head.ephemeral for head in heads}) == len({head.body_key for head in heads}) == 2
    taken(ann)
    assert ann.frames == []
    assert taken(bob, "bob", BOB).task == BOBS


def test_what_could_steer_a_terminal_does_not_come_with_a_reason() -> None:
    """People read it in tables and logs, and a node may seal what it likes."""
    desk = desk_of()
    for kind in (Failed, Refused):
        sent = answered(desk, outcome=kind("no \x1b[2J\r\n\u202eé"))
        assert desk.open(sent, TASK, ANN.member).outcome == kind("no \ufffd[2J\ufffd\ufffd\ufffdé")


def test_nothing_of_a_tasks_body_can_be_read_on_the_way() -> None:
    values = [bytes(tensor.data) for tensor in ADAPTER.values()]
    bare, sealed = addressed(desk_of(sealed=False)), addressed(desk_of())
    for text in (*values, values[0][4:8] + values[0][8:12]):  # a whole tensor, and two values of one
        assert text in b"".join([bare.head, *bare.frames])
        assert text not in b"".join([sealed.head, *sealed.frames])
    assert body_key(sealed) not in b"".join([sealed.head, *sealed.frames])


def test_nothing_of_a_reply_can_be_read_on_the_way() -> None:
    desk, secret = desk_of(), "at record 17 of patients.jsonl"
    for outcome, text in ((Failed(secret), secret.encode()), (TRAINED, bytes(ADAPTER["v"].data))):
        sent = answered(desk, outcome=outcome)
        head, frames = codec.encode_reply(Reply.to(TASK, outcome))
        assert text in b"".join([head, *frames])
        assert text not in b"".join([sent.head, *sent.frames])


def body_key(sent: Parcel, by: Identity = ANN) -> bytes:
    """The key to the task's body, taken out in a second writing of how it is sealed."""
    head = pb.SignedTask.FromString(sent.head)
    (key,) = sealing.unseal([head.body_key], head.ephemeral, by.sealing, key_context(head))
    return key


def key_context(head: pb.SignedTask) -> bytes:
    return identity.statement("body key", head.task, head.nonce)


def test_a_body_is_locked_as_it_is_written_down() -> None:
    """A change of it would be another wire version."""
    sent = addressed(desk_of())
    bodies = tuple(sealing.unlock(sent.frames, body_key(sent), identity.statement("body")))
    assert bodies == codec.pack_body(TASK.work).frames


def test_keys_do_not_show() -> None:
    assert repr(SIGNER) == "Signer(…)"
    assert repr(ANN) == "Identity(…)"


def test_a_member_is_the_public_half_of_an_identity() -> None:
    signing = ANN.signing.public_key().public_bytes_raw()
    assert ANN.member == Member.of(signing, ANN.sealing.public_key().public_bytes_raw())
    assert ANN.member != BOB.member


# --- tasks that do not ------------------------------------------------------------------------------------------------


def signed_task(change: Callable[[Any], object]) -> Parcel:
    """A task's parcel with something changed in its head."""
    sent = addressed(desk_of())
    head = pb.SignedTask.FromString(sent.head)
    change(head)
    return Parcel(head.SerializeToString(), sent.frames)


def signed_anew(head: Any, domain: str = "task", key: Ed25519PrivateKey = SIGNER.key) -> None:
    """As the coordinator signs, written out a second time."""
    expires = head.expires.to_bytes(8, "big")
    parts = head.charter.charter, head.task, head.nonce, expires, head.seal_to, head.ephemeral, head.body_key
    head.signature = identity.sign(key, domain, *parts)


def contradicting(change: Callable[[Any], object]) -> Parcel:
    """A task that the coordinator has signed so, whatever it says."""

    def change_and_sign(head: Any) -> None:
        change(head)
        signed_anew(head)

    return signed_task(change_and_sign)


def setting(name: str, value: object) -> Callable[[Any], None]:
    def change(head: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            head = getattr(head, part)
        setattr(head, last, value)

    return change


def cleared(*names: str) -> Callable[[Any], None]:
    def change(head: Any) -> None:
        for name in names:
            head.ClearField(name)

    return change


def inside(name: str, kind: Any, **values: object) -> Callable[[Any], None]:
    """Change what is in one of the signed messages."""

    def change(head: Any) -> None:
        holder = head.charter if name == "charter" else head
        message = kind.FromString(getattr(holder, name))
        for key, value in values.items():
            setattr(message, key, value)
        setattr(holder, name, message.SerializeToString())

    return change


def moved(first: str, second: str) -> Callable[[Any], None]:
    """Half of one field put in front of the next: the same bytes in the same order."""

    def change(head: Any) -> None:
        one, other = getattr(head, first), getattr(head, second)
        setattr(head, first, one[: len(one) // 2])
        setattr(head, second, one[len(one) // 2 :] + other)

    return change


OTHER_KEY = X25519PrivateKey.generate().public_key().public_bytes_raw()
ALTERED: dict[str, Callable[[Any], object]] = {
    "no signature": setting("signature", b""),
    "a signature of zeros": setting("signature", bytes(64)),
    "a signature that is cut": lambda head: setattr(head, "signature", head.signature[:-1]),
    "another round": inside("task", pb.Task, round=2),
    "another cohort": inside("task", pb.Task, cohort=1000),
    "another body": inside("task", pb.Task, body_digest=bytes(32)),
    "another node": inside("task", pb.Task, node="bob"),
    "another nonce": setting("nonce", bytes(16)),
    "no nonce": setting("nonce", b""),
    "another end": setting("expires", int(EXPIRES) + 1),
    "no end": setting("expires", 2**64 - 1),
    "another key to seal to": setting("seal_to", OTHER_KEY),
    "no key to seal to": setting("seal_to", b""),
    "another ephemeral key": setting("ephemeral", OTHER_KEY),
    "no ephemeral key": setting("ephemeral", b""),
    "another body key": setting("body_key", bytes(48)),
    "no body key": setting("body_key", b""),
    "none of the keys": cleared("seal_to", "ephemeral", "body_key"),
    "half the nonce before the key": moved("nonce", "seal_to"),
    "half the key to seal to before the ephemeral one": moved("seal_to", "ephemeral"),
    "half the ephemeral key before the body's": moved("ephemeral", "body_key"),
    "no charter": cleared("charter"),
    "no signature on the charter": setting("charter.signature", b""),
    "the task's signature on the charter": lambda head: setattr(head.charter, "signature", head.signature),
    "the charter's signature on the task": lambda head: setattr(head, "signature", head.charter.signature),
    "another Plan": inside("charter", pb.Charter, plan=b"{}"),
    "another backbone": inside("charter", pb.Charter, backbone=bytes(32)),
    "other frozen parts": inside("charter", pb.Charter, frozen=bytes(32)),
    "no certificate": setting("charter.signer", b""),
    "another certificate": setting("charter.signer", b"mine"),
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_task_is_refused(change: str) -> None:
    with pytest.raises(TrustError, match=r"the signature on this (task|charter) does not hold|from nowhere"):
        taken(signed_task(ALTERED[change]))


def test_the_signature_covers_every_field_of_a_task() -> None:
    """Also one that will be added; the version alone is told apart by what reads it."""
    fields = [one.name for one in pb.SignedTask.DESCRIPTOR.fields]
    assert {"expires", "seal_to", "ephemeral", "body_key"} <= set(fields)
    for name in fields:
        if name in ("version", "charter", "signature"):
            continue

        def change(head: Any, name: str = name) -> None:
            was = getattr(head, name)
            setattr(head, name, was + 1 if isinstance(was, int) else bytes(len(was)))

        with pytest.raises(TrustError, match="the signature on this task does not hold"):
            taken(signed_task(change))


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_another_version_is_refused_before_anything_else(version: int) -> None:
    for change in (setting("version", version), lambda head: head.CopyFrom(pb.SignedTask(version=version))):
        with pytest.raises(UnknownVersion, match=f"wire version {version}, expected 1"):
            taken(signed_task(change))
    sent = answered(desk := desk_of())
    with pytest.raises(UnknownVersion, match=f"wire version {version}, expected 1"):
        desk.open(restated(sent, setting("version", version)), TASK, ANN.member)


@pytest.mark.parametrize("sealed", [True, False])
def test_every_altered_bit_of_a_task_is_refused(sealed: bool) -> None:
    kind, match = (TrustError, "seal") if sealed else (MalformedMessage, "the body is not the one that the task names")
    sent = addressed(desk_of(sealed=sealed))
    for bit in range(8 * len(sent.head)):
        head = bytearray(sent.head)
        head[bit // 8] ^= 1 << bit % 8
        with pytest.raises((TrustError, WireError)):
            taken(Parcel(bytes(head), list(sent.frames)), sealed=sealed)
    (body,) = sent.frames
    for bit in range(8 * len(body)):
        altered = bytearray(body)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(kind, match=match):
            taken(Parcel(sent.head, [bytes(altered)]), sealed=sealed)
    for frames in ([], [body, b"\0"], [body[:-1]], [body, body]):
        with pytest.raises(kind, match=match):
            taken(Parcel(sent.head, frames), sealed=sealed)
    assert taken(sent, sealed=sealed).task == TASK


@given(st.data())
def test_any_other_sequence_of_a_tasks_frames_is_refused(data: st.DataObject) -> None:
    with cut_into(8):
        sent = addressed(desk_of())
    assert len(sent.frames) == 5
    first, second, *rest = sent.frames
    some = st.lists(st.sampled_from(sent.frames), max_size=7).filter(lambda some: some != sent.frames)
    for frames in ([first + second, *rest], [first[:1], first[1:], second, *rest], data.draw(some)):
        with pytest.raises(TrustError, match="seal"):
            taken(Parcel(sent.head, frames))
    assert taken(sent).task == TASK


@pytest.mark.parametrize("domain", ["task", "charter", "reply", "body", "body key", identity.ENROLMENT, ""])
def test_a_signature_is_worth_something_in_its_own_domain_only(domain: str) -> None:
    """The right key under the right parts, but as another kind of statement."""

    def sign(head: Any) -> None:
        signed_anew(head, domain)

    def sign_its_charter(head: Any) -> None:
        head.charter.signature = identity.sign(SIGNER.key, domain, head.charter.charter)

    for change, right in ((sign, "task"), (sign_its_charter, "charter")):
        if domain == right:
            assert taken(signed_task(change)).task == TASK
        else:
            with pytest.raises(TrustError, match=f"the signature on this {right} does not hold"):
                taken(signed_task(change))


def test_what_is_stated_as_one_thing_is_stated_as_no_other() -> None:
    domains = {envelope._CHARTER, envelope._TASK, envelope._REPLY, identity.ENROLMENT}
    head = pb.SignedTask(task=b"x", nonce=b"y")
    contexts = {envelope._BODY_CONTEXT, envelope._key_context(head), envelope._context(TASK, b"y")}
    assert len(contexts | {identity.statement(domain, b"x", b"y") for domain in domains}) == 7
    assert envelope._key_context(head) == key_context(head)


@pytest.mark.parametrize(
    "signer", [Signer(Ed25519PrivateKey.generate(), CERTIFICATE), Signer(ANN.signing, CERTIFICATE)]
)
def test_a_task_that_somebody_else_signed_is_refused(signer: Signer) -> None:
    """Another key behind the coordinator's certificate: on the task, on the charter, on both."""
    theirs = sign_charter(CHARTER, signer)
    for charter, by in ((SIGNED, signer), (theirs, SIGNER), (theirs, signer)):
        with pytest.raises(TrustError, match="does not hold"):
            taken(addressed(desk_of(charter, by)))


@pytest.mark.parametrize("sealed", [True, False])
def test_a_task_is_begun_until_it_expires_and_not_after(sealed: bool) -> None:
    desk = desk_of(expires=NOW + 0.9, sealed=sealed)  # whole seconds travel
    assert taken(addressed(desk), now=NOW, sealed=sealed).task == TASK
    for late, said in ((0.5, "0 s"), (90.4, "90 s"), (86_400.0, "86400 s")):
        sent = addressed(desk)
        with pytest.raises(TrustError) as caught:
            taken(sent, now=NOW + late, sealed=sealed)
        assert str(caught.value) == (
            f"a task of run 'run' that expired {said} ago. "
            "It was held up or is a replay, or one of the two clocks is wrong."
        )
        assert sent.frames, "its body was looked at"


def test_a_task_for_another_node_is_refused() -> None:
    """Whoever it is sealed to, and before its body is looked at; and by nobody who only goes by the node's name."""
    for by in (BOB, ANN):
        sent = addressed(desk_of(), BOBS, by)
        with pytest.raises(TrustError, match="a task for 'bob', and this is 'ann'"):
            taken(sent)
        assert sent.frames
    with pytest.raises(TrustError, match="the seal does not hold"):
        taken(addressed(desk_of(), BOBS, BOB), "bob", ANN)


def test_the_key_to_a_body_is_sealed_to_its_node_and_its_task() -> None:
    """Not even another task to the same node opens it."""
    desk = desk_of()
    with pytest.raises(TrustError, match="the seal does not hold"):
        body_key(addressed(desk), BOB)
    other = pb.SignedTask.FromString(addressed(desk).head)

    def exchange(head: Any) -> None:
        head.ephemeral, head.body_key = other.ephemeral, other.body_key

    with pytest.raises(TrustError, match="the seal does not hold"):
        taken(contradicting(exchange))


def test_a_node_cannot_put_another_body_in_a_task_of_its_round() -> None:
    """Bob has the key to the body, as every node of the round has, and sits between the coordinator and ann."""
    desk = desk_of()
    key = body_key(addressed(desk, BOBS, BOB), BOB)
    poisoned = {name: pack(np.full(tensor.shape, 7, np.float32), "float32") for name, tensor in ADAPTER.items()}
    frames = list(sealing.lock(codec.pack_body(Train(poisoned)).frames, key, identity.statement("body")))
    sent = addressed(desk)
    assert [len(frame) for frame in frames] == [len(frame) for frame in sent.frames]
    with pytest.raises(MalformedMessage, match="the body is not the one that the task names"):
        taken(Parcel(sent.head, frames))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_opens_no_body(size: int) -> None:
    def shorten(head: Any) -> None:
        head.ephemeral, (head.body_key,) = sealing.seal([bytes(size)], ANN.member.sealing, key_context(head))

    with pytest.raises(MalformedMessage, match=f"a body key of {size} bytes"):
        taken(contradicting(shorten))


@pytest.mark.parametrize("key", [bytes(32), b"short", b"\1" + bytes(31), b""])
def test_what_is_no_key_gets_no_task(key: bytes) -> None:
    with pytest.raises(TrustError, match="not a key"):
        desk_of().address(TASK, Member(ANN.member.signing, key))
    with pytest.raises(TrustError, match="not a key"):
        taken(contradicting(setting("ephemeral", key)))


@pytest.mark.parametrize("change", [{"run": "other"}, {"plan": b"{}"}])
def test_a_task_with_the_charter_of_another_run_or_plan_is_refused(change: dict[str, Any]) -> None:
    """Signed in order, both of them: a coordinator that contradicts itself."""
    charter = sign_charter(replace(CHARTER, **change), SIGNER)
    with pytest.raises(TrustError, match="the charter of another run or Plan"):
        taken(addressed(desk_of(charter)))


@pytest.mark.parametrize("change", [{"run": "other"}, {"plan": b"{}"}, {"backbone": "00" * 32}, {"frozen": ""}, {}])
def test_a_charter_cannot_be_put_in_anothers_place(change: dict[str, Any]) -> None:
    """Both were signed by the coordinator; the task belongs to one of them."""
    other = sign_charter(replace(CHARTER, **change), SIGNER)
    sent = signed_task(lambda head: head.charter.CopyFrom(other))
    if not change:
        assert taken(sent).task == TASK
        return
    with pytest.raises(TrustError, match="the signature on this task does not hold"):
        taken(sent)


def test_a_client_cannot_be_made_to_answer_unsealed() -> None:
    """Not even by the coordinator: unsealed replies are for simulations, which say so themselves."""
    with pytest.raises(TrustError, match="a task whose reply is not to be sealed"):
        taken(addressed(desk_of(sealed=False)))
    for gone in (["seal_to"], ["seal_to", "body_key"], ["seal_to", "ephemeral", "body_key"]):
        sent = contradicting(cleared(*gone))
        with pytest.raises(TrustError, match="a task whose reply is not to be sealed"):
            taken(sent)
        assert sent.frames
    with pytest.raises(TrustError, match="a task whose reply is to be sealed"):
        taken(addressed(desk_of()), sealed=False)
    assert taken(addressed(desk_of(sealed=False)), sealed=False).seal_to == b""


def test_a_client_cannot_be_made_to_take_a_body_that_is_not_locked() -> None:
    """Its reply would be sealed, and the adapter lie open on the way."""
    sent = contradicting(cleared("ephemeral", "body_key"))
    with pytest.raises(TrustError, match="not a key"):
        taken(sent)
    bare = addressed(desk_of(sealed=False))
    with pytest.raises(TrustError, match="the seal does not hold"):
        taken(Parcel(addressed(desk_of()).head, bare.frames))


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17)])
def test_a_nonce_of_another_size_is_refused(nonce: bytes) -> None:
    with pytest.raises(MalformedMessage, match=f"a nonce of {len(nonce)} bytes"):
        taken(contradicting(setting("nonce", nonce)))


@pytest.mark.parametrize("seal_to", [bytes(32), b"short", b"\1" + bytes(31)])
def test_nothing_is_sealed_to_what_is_no_key(seal_to: bytes) -> None:
    came = replace(opened(desk_of()), seal_to=seal_to)
    with pytest.raises(TrustError, match="not a key"):
        close_reply(Reply.to(TASK, TRAINED), came, ANN.signing)


# --- replies that do not ----------------------------------------------------------------------------------------------


def refused(desk: Desk, sent: Parcel, match: str | None = None, task: Task = TASK) -> None:
    with pytest.raises(TrustError, match=match):
        desk.open(sent, task, ANN.member)


@pytest.mark.parametrize(
    "other",
    [{"round": 2}, {"run": "other"}, {"node": "bob"}, {"plan_digest": "00" * 32}],
    ids=lambda one: next(iter(one)),
)
def test_a_reply_is_worth_nothing_elsewhere(other: dict[str, Any]) -> None:
    """The same key to seal to, so that only what the reply is bound to tells."""
    desk, elsewhere = desk_of(), replace(TASK, **other)
    sent = answered(desk)
    nonce = desk._nonces["ann"]
    addressed(desk, elsewhere)
    desk._nonces |= {"ann": nonce, elsewhere.node: nonce}
    refused(desk, copied(sent), "a reply to another task", elsewhere)

    def claim(head: pb.SealedReply) -> None:
        values = {"plan_digest": bytes(32)} if "plan_digest" in other else other
        for name, value in values.items():
            setattr(head, name, value)

    refused(desk, restated(sent, claim), "the signature on this reply", elsewhere)
    assert desk.open(sent, TASK, ANN.member).outcome == TRAINED


def restated(sent: Parcel, change: Callable[[Any], object]) -> Parcel:
    head = pb.SealedReply.FromString(sent.head)
    change(head)
    return Parcel(head.SerializeToString(), list(sent.frames))


def test_a_reply_to_an_earlier_task_is_refused() -> None:
    desk = desk_of()
    early = answered(desk)
    late = answered(desk)
    refused(desk, early, "a reply to another task")
    assert desk.open(late, TASK, ANN.member).outcome == TRAINED


def test_a_reply_to_another_desk_of_the_same_round_is_refused() -> None:
    """A coordinator that died and asks again: what was sealed to the lost key stays sealed."""
    before, after = desk_of(), desk_of()
    sent = answered(before)
    addressed(after)
    refused(after, copied(sent), "a reply to another task")
    after._nonces = dict(before._nonces)
    refused(after, copied(sent), "the signature on this reply")
    head = pb.SealedReply.FromString(sent.head)
    again = signature(ANN, sent, _seal_to(after), head)
    refused(after, restated(sent, setting("signature", again)), "the seal does not hold")


def signature(by: Identity, sent: Parcel, recipient: bytes, head: pb.SealedReply) -> bytes:
    """What the node would sign, were these its head and frames."""
    return identity.sign(by.signing, "reply", context(head), recipient, head.ephemeral, envelope._digest(sent.frames))


def context(head: pb.SealedReply) -> bytes:
    """What a reply with this head is bound to, written out a second time."""
    number = head.round.to_bytes(4, "big")
    return identity.statement("reply", head.run.encode(), number, head.node.encode(), head.plan_digest, head.nonce)


def test_a_reply_that_another_node_signed_is_refused() -> None:
    desk = desk_of()
    came = opened(desk)
    refused(desk, close_reply(Reply.to(TASK, TRAINED), came, BOB.signing), "the signature on this reply")


def test_a_node_cannot_sign_what_another_one_sealed() -> None:
    """Bob takes ann's sealed frames, and signs them as his own answer to his own task."""
    desk = desk_of()
    stolen, his = answered(desk), answered(desk, BOBS, by=BOB)
    head = pb.SealedReply.FromString(his.head)
    head.ephemeral = pb.SealedReply.FromString(stolen.head).ephemeral
    head.signature = signature(BOB, stolen, opened(desk).seal_to, head)
    with pytest.raises(TrustError, match="the seal does not hold"):
        desk.open(Parcel(head.SerializeToString(), stolen.frames), BOBS, BOB.member)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"round": 2}, {"run": "other"}, {"node": "bob"}, {"plan_digest": "00" * 32}],
    ids=lambda one: next(iter(one)),
)
def test_a_node_cannot_answer_in_anothers_name(other: dict[str, Any], sealed: bool) -> None:
    """Sealed and signed as it should be by ann, with another address inside."""
    desk = desk_of(sealed=sealed)
    came = taken(addressed(desk), sealed=sealed)
    sent = close_reply(replace(Reply.to(TASK, TRAINED), **other), came, ANN.signing)
    refused(desk, sent, "'ann' sent a reply to another task, or in another's name")


def test_an_unsealed_reply_to_a_sealed_round_is_refused() -> None:
    desk = desk_of()
    came = opened(desk)
    refused(
        desk, close_reply(Reply.to(TASK, TRAINED), replace(came, seal_to=b""), ANN.signing), "a reply to another task"
    )
    for outcome in (Failed("x" * 16), Evaluated(1, 1, 1.0, 1)):
        refused(desk, close_reply(Reply.to(TASK, outcome), replace(came, seal_to=b""), ANN.signing))
    open_desk = desk_of(sealed=False)
    addressed(open_desk)
    with pytest.raises(MalformedMessage, match=r"without outcome|unknown fields|not a Reply"):
        open_desk.open(answered(desk), TASK, ANN.member)


def test_every_altered_bit_of_a_reply_is_refused() -> None:
    desk = desk_of()
    sent = answered(desk)
    for bit in range(8 * len(sent.head)):
        head = bytearray(sent.head)
        head[bit // 8] ^= 1 << bit % 8
        with pytest.raises((TrustError, WireError)):
            desk.open(Parcel(bytes(head), list(sent.frames)), TASK, ANN.member)
    for at, frame in enumerate(sent.frames):
        for bit in range(8 * len(frame)):
            altered = bytearray(frame)
            altered[bit // 8] ^= 1 << bit % 8
            refused(desk, Parcel(sent.head, [*sent.frames[:at], bytes(altered), *sent.frames[at + 1 :]]))
    assert desk.open(sent, TASK, ANN.member).outcome == TRAINED


@given(st.data())
def test_any_other_sequence_of_a_replys_frames_is_refused(data: st.DataObject) -> None:
    desk = desk_of()
    came = opened(desk)
    with cut_into(8):
        sent = close_reply(Reply.to(TASK, TRAINED), came, ANN.signing)
    assert len(sent.frames) == 6
    first, second, *rest = sent.frames
    refused(desk, Parcel(sent.head, [first + second, *rest]), "the signature on this reply")
    refused(desk, Parcel(sent.head, [first[:1], first[1:], second, *rest]), "the signature on this reply")
    frames = data.draw(st.lists(st.sampled_from(sent.frames), max_size=8).filter(lambda some: some != sent.frames))
    refused(desk, Parcel(sent.head, frames), "the signature on this reply")
    head = pb.SealedReply.FromString(sent.head)
    head.signature = signature(ANN, Parcel(b"", frames), _seal_to(desk), head)
    refused(desk, Parcel(head.SerializeToString(), frames), "seal")


def _seal_to(desk: Desk) -> bytes:
    assert desk._private is not None
    return desk._private.public_key().public_bytes_raw()


def test_what_is_over_the_limit_is_refused_before_it_is_looked_at() -> None:
    desk = desk_of()
    sent = answered(desk)
    with pytest.raises(MessageTooLarge, match=r"a message of \d+ bytes"):
        desk.open(sent, TASK, ANN.member, codec.Limits(message_bytes=sent.size - 1))
    with pytest.raises(MessageTooLarge, match=r"a head of \d+ bytes"):
        desk.open(sent, TASK, ANN.member, codec.Limits(head_bytes=len(sent.head) - 1))
    assert sent.frames
    task = addressed(desk)
    with pytest.raises(MessageTooLarge, match=r"a head of \d+ bytes"):
        taken(task, limits=codec.Limits(head_bytes=len(task.head) - 1))
    with pytest.raises(MessageTooLarge, match=r"a message of \d+ bytes"):
        taken(task, limits=codec.Limits(message_bytes=task.size - 1))
    assert task.frames


def test_a_frame_that_no_sender_would_make_is_refused_before_it_is_looked_at() -> None:
    """A sealed one is as much longer as a tag is, and no more."""
    desk = desk_of()
    task, reply = addressed(desk), answered(desk)
    desk._nonces["ann"] = pb.SealedReply.FromString(reply.head).nonce
    reads: list[tuple[Parcel, Callable[[Parcel], object]]] = [
        (task, taken),
        (reply, lambda sent: desk.open(sent, TASK, ANN.member)),
    ]
    for sent, read in reads:
        before = list(sent.frames)
        longest = max(map(len, before))
        with cut_into(longest - sealing.TAG_BYTES - 1), pytest.raises(MessageTooLarge, match=f"a frame of {longest} "):
            read(sent)
        assert sent.frames == before
        with cut_into(longest - sealing.TAG_BYTES):
            read(sent)
        assert sent.frames == []


def test_a_message_does_not_repeat_what_a_stranger_wrote_at_length() -> None:
    desk = desk_of()
    sent = restated(answered(desk), lambda head: setattr(head, "run", "x" * 100_000))
    with pytest.raises(TrustError) as caught:
        desk.open(sent, TASK, ANN.member)
    assert len(str(caught.value)) < 500


# --- bytes from nowhere -----------------------------------------------------------------------------------------------

raw = st.binary(max_size=80)
keys = st.one_of(st.binary(min_size=32, max_size=32), raw)
frames = st.lists(raw, max_size=4)
address = st.fixed_dictionaries(
    {
        "version": st.sampled_from((0, 1, 1, 1, 2)),
        "run": st.sampled_from(("run", "", "other")),
        "round": st.sampled_from((1, 0, 2**32 - 1)),
        "node": st.sampled_from(("ann", "bob")),
        "plan_digest": st.sampled_from((bytes.fromhex(CHARTER.plan_digest), b"")),
    }
)


@given(raw, frames)
def test_any_bytes_are_refused_as_a_task_and_as_a_reply(head: bytes, body: list[bytes]) -> None:
    desk = desk_of()
    addressed(desk)
    with pytest.raises((WireError, TrustError)):
        taken(Parcel(head, list(body)))
    for one in (desk, desk_of(sealed=False)):
        addressed(one)
        with pytest.raises((WireError, TrustError)):
            one.open(Parcel(head, list(body)), TASK, ANN.member)


@given(address, raw, keys, raw, frames)
def test_any_bytes_in_the_fields_of_a_reply_are_refused(
    fields: dict[str, Any], nonce: bytes, ephemeral: bytes, signed: bytes, body: list[bytes]
) -> None:
    """Signed at random, and signed by the node as it should be."""
    desk = desk_of()
    came = opened(desk)
    for drawn in (nonce, came.nonce):
        head = pb.SealedReply(**fields, nonce=drawn, ephemeral=ephemeral, signature=signed)
        for made in (signed, signature(ANN, Parcel(b"", body), came.seal_to, head)):
            head.signature = made
            with pytest.raises((WireError, TrustError)):
                desk.open(Parcel(head.SerializeToString(), list(body)), TASK, ANN.member)


@given(st.lists(raw, min_size=1, max_size=4))
def test_any_bytes_that_a_node_seals_are_refused(inside: list[bytes]) -> None:
    desk = desk_of()
    came = opened(desk)
    head = pb.SealedReply.FromString(close_reply(Reply.to(TASK, TRAINED), came, ANN.signing).head)
    for plain in (inside, [codec.encode_reply(Reply.to(TASK, TRAINED))[0], *inside[:1]]):
        head.ephemeral, closing = sealing.seal(plain, came.seal_to, context(head))
        closed = list(closing)
        head.signature = signature(ANN, Parcel(b"", closed), came.seal_to, head)
        with pytest.raises(WireError):
            desk.open(Parcel(head.SerializeToString(), closed), TASK, ANN.member)


@given(raw, st.lists(raw, min_size=1, max_size=4))
def test_any_bytes_that_a_coordinator_locks_are_refused(task: bytes, inside: list[bytes]) -> None:
    """Signed and sealed as it should be: another task, another body, or both."""
    key = bytes(range(32))
    right = codec.pack_body(TASK.work).frames
    for said, plain in ((task, inside), (task, right), (None, inside)):

        def change(head: Any, said: bytes | None = said) -> None:
            head.task = head.task if said is None else said
            head.ephemeral, (head.body_key,) = sealing.seal([key], ANN.member.sealing, key_context(head))

        sent = contradicting(change)
        with pytest.raises((WireError, TrustError)) as caught:
            taken(Parcel(sent.head, list(sealing.lock(plain, key, identity.statement("body")))))
        assert "seal" not in str(caught.value), "it did not get as far as what is inside"


@settings(max_examples=300)
@given(
    st.builds(
        pb.SignedTask,
        version=st.sampled_from((1, 1, 1, 0, 2)),
        task=raw,
        nonce=st.one_of(st.binary(min_size=16, max_size=16), raw),
        expires=st.sampled_from((int(EXPIRES), 2**64 - 1, 0)),
        seal_to=keys,
        ephemeral=keys,
        body_key=st.one_of(st.binary(min_size=48, max_size=48), raw),
        signature=raw,
    ),
    st.builds(pb.SignedCharter, charter=st.one_of(st.just(SIGNED.charter), raw), signer=raw, signature=raw),
    frames,
    st.booleans(),
)
def test_any_bytes_in_the_fields_of_a_task_are_refused(
    head: pb.SignedTask, charter: pb.SignedCharter, body: list[bytes], own: bool
) -> None:
    """Signed at random, and signed by the coordinator as it should be."""
    if own:
        charter.signer = CERTIFICATE
        charter.signature = identity.sign(SIGNER.key, "charter", charter.charter)
    head.charter.CopyFrom(charter)
    if own:
        signed_anew(head)
    with pytest.raises((WireError, TrustError)):
        taken(Parcel(head.SerializeToString(), body))


def test_all_that_is_refused_is_an_error_of_ours() -> None:
    assert issubclass(TrustError, FarfieldError)
    assert issubclass(WireError, FarfieldError)

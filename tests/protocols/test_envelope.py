"""What may pass between a coordinator and its clients, and everything else, which may not."""

from __future__ import annotations

from collections.abc import Callable
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
from farfield.protocols.envelope import Charter, Opened, ReplyDesk, Signer, close_reply, open_task, sign_charter
from farfield.protocols.errors import FarfieldError, MalformedMessage, MessageTooLarge, TrustError, WireError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Outcome, Refused, Reply, Task, Train, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.tensors import pack

CERTIFICATE = b"the signer's certificate"
SIGNER = Signer(Ed25519PrivateKey.generate(), CERTIFICATE)
ANN, BOB = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
CHARTER = Charter("run", b'{"a":"Plan"}', "ab" * 32, 1000, "cd" * 32)
SIGNED = sign_charter(CHARTER, SIGNER)
ADAPTER = {"v": pack(np.arange(3, dtype=np.float32), "float32"), "w": pack(np.ones((2, 3), np.float32), "float32")}
TASK = Task("run", 1, "ann", CHARTER.plan_digest, Train(ADAPTER), 2)
TRAINED = Trained(ADAPTER, 4, 3, 2, 1.0)

names = st.text(st.characters(codec="utf-8"), max_size=20)
arrays = st.lists(st.floats(width=32), max_size=8).map(lambda values: pack(np.array(values, np.float32), "float32"))
states = st.dictionaries(names, arrays, max_size=3)
counts = st.integers(0, 2**63)
outcomes = st.one_of(
    st.builds(Trained, states, counts, counts, counts, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Evaluated, counts, counts, st.floats(0, 10), counts),
    st.builds(Failed, names),
    st.builds(Refused, names),
)
works = st.one_of(st.builds(Train, states), st.builds(Evaluate, states))
tasks = st.builds(Task, names, st.integers(0, 2**32 - 1), names, st.just(CHARTER.plan_digest), works, st.integers(0, 9))


def trusted(certificate: bytes) -> Ed25519PublicKey:
    if certificate != CERTIFICATE:
        raise TrustError("a certificate from nowhere")
    return SIGNER.key.public_key()


def desk_of(charter: pb.SignedCharter = SIGNED, signer: Signer = SIGNER, *, sealed: bool = True) -> ReplyDesk:
    return ReplyDesk(charter, signer, sealed=sealed)


def addressed(desk: ReplyDesk, task: Task = TASK) -> Parcel:
    return desk.address(task, codec.pack_body(task.work))


def opened(desk: ReplyDesk, task: Task = TASK) -> Opened:
    return open_task(addressed(desk, task), task.node, trusted)


def answered(desk: ReplyDesk, task: Task = TASK, outcome: Outcome = TRAINED, key: Ed25519PrivateKey = ANN) -> Parcel:
    return close_reply(Reply.to(task, outcome), opened(desk, task), key)


def copied(sent: Parcel) -> Parcel:
    return Parcel(sent.head, list(sent.frames))


# --- what passes ------------------------------------------------------------------------------------------------------


@given(tasks, outcomes, st.booleans(), st.sampled_from((1, 7, 64, parcel.FRAME_BYTES)))
def test_a_task_and_its_reply_come_as_they_were(task: Task, outcome: Outcome, sealed: bool, frame: int) -> None:
    charter = replace(CHARTER, run=task.run)
    desk = desk_of(sign_charter(charter, SIGNER), sealed=sealed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", frame)
        sent = addressed(desk, task)
        came = open_task(sent, task.node, trusted, sealed=sealed)
        assert (came.task, came.charter, sent.frames) == (task, charter, [])
        reply = Reply.to(task, outcome)
        answer = close_reply(reply, came, ANN)
    assert desk.open(answer, task, ANN.public_key()) == reply
    assert answer.frames == []


def test_every_task_has_a_nonce_and_every_round_a_key_of_its_own() -> None:
    desk = desk_of()
    ann, bob = opened(desk), opened(desk, replace(TASK, node="bob"))
    assert ann.nonce != bob.nonce
    assert ann.seal_to == bob.seal_to
    assert opened(desk_of()).seal_to != ann.seal_to


def test_nothing_of_a_reply_can_be_read_on_the_way() -> None:
    desk, secret = desk_of(), "at record 17 of patients.jsonl"
    for outcome, text in ((Failed(secret), secret.encode()), (TRAINED, bytes(ADAPTER["v"].data))):
        sent = answered(desk, outcome=outcome)
        head, frames = codec.encode_reply(Reply.to(TASK, outcome))
        assert text in b"".join([head, *frames])
        assert text not in b"".join([sent.head, *sent.frames])


def test_keys_do_not_show() -> None:
    assert repr(SIGNER) == "Signer(…)"


# --- tasks that do not ------------------------------------------------------------------------------------------------


def signed_task(change: Callable[[Any], object]) -> Parcel:
    """A task's parcel with something changed in its head."""
    sent = addressed(desk_of())
    head = pb.SignedTask.FromString(sent.head)
    change(head)
    return Parcel(head.SerializeToString(), sent.frames)


def setting(name: str, value: bytes) -> Callable[[Any], None]:
    def change(head: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            head = getattr(head, part)
        setattr(head, last, value)

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
    "another key to seal to": setting("seal_to", OTHER_KEY),
    "no key to seal to": setting("seal_to", b""),
    "half the nonce before the key": lambda head: head.MergeFrom(
        pb.SignedTask(nonce=head.nonce[:8], seal_to=head.nonce[8:] + head.seal_to)
    ),
    "no charter": lambda head: head.ClearField("charter"),
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
    with pytest.raises(TrustError):
        open_task(signed_task(ALTERED[change]), "ann", trusted)


def test_every_altered_bit_of_a_task_is_refused() -> None:
    sent = addressed(desk_of())
    for bit in range(8 * len(sent.head)):
        head = bytearray(sent.head)
        head[bit // 8] ^= 1 << bit % 8
        with pytest.raises((TrustError, WireError)):
            open_task(Parcel(bytes(head), list(sent.frames)), "ann", trusted)
    (body,) = sent.frames
    for bit in range(8 * len(body)):
        altered = bytearray(body)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedMessage, match="the body is not the one"):
            open_task(Parcel(sent.head, [bytes(altered)]), "ann", trusted)
    for frames in ([], [body, b"\0"], [body[:-1]], [body, body]):
        with pytest.raises(MalformedMessage, match="the body is not the one"):
            open_task(Parcel(sent.head, frames), "ann", trusted)


@pytest.mark.parametrize("domain", ["task", "charter", "reply", identity.ENROLMENT, ""])
def test_a_signature_is_worth_something_in_its_own_domain_only(domain: str) -> None:
    """The right key under the right parts, but as another kind of statement."""

    def sign(head: Any) -> None:
        parts = head.charter.charter, head.task, head.nonce, head.seal_to
        head.signature = identity.sign(SIGNER.key, domain, *parts)

    def sign_its_charter(head: Any) -> None:
        head.charter.signature = identity.sign(SIGNER.key, domain, head.charter.charter)

    for change, right in ((sign, "task"), (sign_its_charter, "charter")):
        if domain == right:
            assert open_task(signed_task(change), "ann", trusted).task == TASK
        else:
            with pytest.raises(TrustError, match=f"the signature on this {right} does not hold"):
                open_task(signed_task(change), "ann", trusted)


def test_what_is_signed_as_one_thing_is_signed_as_no_other() -> None:
    assert len({envelope._CHARTER, envelope._TASK, envelope._REPLY, identity.ENROLMENT}) == 4


@pytest.mark.parametrize("signer", [Signer(Ed25519PrivateKey.generate(), CERTIFICATE), Signer(ANN, CERTIFICATE)])
def test_a_task_that_somebody_else_signed_is_refused(signer: Signer) -> None:
    """Another key behind the coordinator's certificate: on the task, on the charter, on both."""
    theirs = sign_charter(CHARTER, signer)
    for charter, by in ((SIGNED, signer), (theirs, SIGNER), (theirs, signer)):
        with pytest.raises(TrustError, match="does not hold"):
            open_task(addressed(desk_of(charter, by)), "ann", trusted)


def test_a_task_for_another_node_is_refused() -> None:
    with pytest.raises(TrustError, match="a task for 'bob', and this is 'ann'"):
        open_task(addressed(desk_of(), replace(TASK, node="bob")), "ann", trusted)


@pytest.mark.parametrize("change", [{"run": "other"}, {"plan": b"{}"}])
def test_a_task_with_the_charter_of_another_run_or_plan_is_refused(change: dict[str, Any]) -> None:
    """Signed in order, both of them: a coordinator that contradicts itself."""
    charter = sign_charter(replace(CHARTER, **change), SIGNER)
    with pytest.raises(TrustError, match="the charter of another run or Plan"):
        open_task(addressed(desk_of(charter)), "ann", trusted)


@pytest.mark.parametrize("change", [{"run": "other"}, {"plan": b"{}"}, {"backbone": "00" * 32}, {"frozen": ""}, {}])
def test_a_charter_cannot_be_put_in_anothers_place(change: dict[str, Any]) -> None:
    """Both were signed by the coordinator; the task belongs to one of them."""
    other = sign_charter(replace(CHARTER, **change), SIGNER)
    sent = signed_task(lambda head: head.charter.CopyFrom(other))
    if not change:
        assert open_task(sent, "ann", trusted).task == TASK
        return
    with pytest.raises(TrustError, match="the signature on this task does not hold"):
        open_task(sent, "ann", trusted)


def test_a_client_cannot_be_made_to_answer_unsealed() -> None:
    """Not even by the coordinator: unsealed replies are for simulations, which say so themselves."""
    with pytest.raises(TrustError, match="a task whose reply is not to be sealed"):
        open_task(addressed(desk_of(sealed=False)), "ann", trusted)
    with pytest.raises(TrustError, match="a task whose reply is to be sealed"):
        open_task(addressed(desk_of()), "ann", trusted, sealed=False)
    assert open_task(addressed(desk_of(sealed=False)), "ann", trusted, sealed=False).seal_to == b""


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17)])
def test_a_nonce_of_another_size_is_refused(nonce: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_bytes", lambda _: nonce)
    with pytest.raises(MalformedMessage, match=f"a nonce of {len(nonce)} bytes"):
        opened(desk_of())


@pytest.mark.parametrize("seal_to", [bytes(32), b"short", b"\1" + bytes(31)])
def test_nothing_is_sealed_to_what_is_no_key(seal_to: bytes) -> None:
    came = replace(opened(desk_of()), seal_to=seal_to)
    with pytest.raises(TrustError, match="not a key"):
        close_reply(Reply.to(TASK, TRAINED), came, ANN)


# --- replies that do not ----------------------------------------------------------------------------------------------


def refused(desk: ReplyDesk, sent: Parcel, match: str | None = None, task: Task = TASK) -> None:
    with pytest.raises(TrustError, match=match):
        desk.open(sent, task, ANN.public_key())


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
    assert desk.open(sent, TASK, ANN.public_key()).outcome == TRAINED


def restated(sent: Parcel, change: Callable[[pb.SealedReply], object]) -> Parcel:
    head = pb.SealedReply.FromString(sent.head)
    change(head)
    return Parcel(head.SerializeToString(), list(sent.frames))


def test_a_reply_to_an_earlier_task_is_refused() -> None:
    desk = desk_of()
    early = answered(desk)
    late = answered(desk)
    refused(desk, early, "a reply to another task")
    assert desk.open(late, TASK, ANN.public_key()).outcome == TRAINED


def test_a_reply_to_another_desk_of_the_same_round_is_refused() -> None:
    """A coordinator that died and asks again: what was sealed to the lost key stays sealed."""
    before, after = desk_of(), desk_of()
    sent = answered(before)
    addressed(after)
    refused(after, copied(sent), "a reply to another task")
    after._nonces = dict(before._nonces)
    refused(after, copied(sent), "the signature on this reply")
    head = pb.SealedReply.FromString(sent.head)
    signed_anew = signature(ANN, sent, _seal_to(after), head)
    refused(after, restated(sent, lambda head: setattr(head, "signature", signed_anew)), "the seal does not hold")


def signature(key: Ed25519PrivateKey, sent: Parcel, recipient: bytes, head: pb.SealedReply) -> bytes:
    """What the node would sign, were these its head and frames."""
    context = envelope._stated(head)
    return identity.sign(key, "reply", context, recipient, head.ephemeral, envelope._digest(sent.frames))


def test_a_reply_that_another_node_signed_is_refused() -> None:
    desk = desk_of()
    refused(desk, answered(desk, key=BOB), "the signature on this reply")


def test_a_node_cannot_sign_what_another_one_sealed() -> None:
    """Bob takes ann's sealed frames, and signs them as his own answer to his own task."""
    desk, bobs = desk_of(), replace(TASK, node="bob")
    stolen, his = answered(desk), answered(desk, bobs, key=BOB)
    head = pb.SealedReply.FromString(his.head)
    head.ephemeral = pb.SealedReply.FromString(stolen.head).ephemeral
    head.signature = signature(BOB, stolen, opened(desk).seal_to, head)
    with pytest.raises(TrustError, match="the seal does not hold"):
        desk.open(Parcel(head.SerializeToString(), stolen.frames), bobs, BOB.public_key())


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"round": 2}, {"run": "other"}, {"node": "bob"}, {"plan_digest": "00" * 32}],
    ids=lambda one: next(iter(one)),
)
def test_a_node_cannot_answer_in_anothers_name(other: dict[str, Any], sealed: bool) -> None:
    """Sealed and signed as it should be by ann, with another address inside."""
    desk = desk_of(sealed=sealed)
    came = open_task(addressed(desk), "ann", trusted, sealed=sealed)
    sent = close_reply(replace(Reply.to(TASK, TRAINED), **other), came, ANN)
    refused(desk, sent, "'ann' sent a reply to another task, or in another's name")


def test_an_unsealed_reply_to_a_sealed_round_is_refused() -> None:
    desk = desk_of()
    came = opened(desk)
    refused(desk, close_reply(Reply.to(TASK, TRAINED), replace(came, seal_to=b""), ANN), "a reply to another task")
    for outcome in (Failed("x" * 16), Evaluated(1, 1, 1.0, 1)):
        refused(desk, close_reply(Reply.to(TASK, outcome), replace(came, seal_to=b""), ANN))
    open_desk = desk_of(sealed=False)
    addressed(open_desk)
    with pytest.raises(MalformedMessage, match=r"without outcome|unknown fields|not a Reply"):
        open_desk.open(answered(desk), TASK, ANN.public_key())


def test_every_altered_bit_of_a_reply_is_refused() -> None:
    desk = desk_of()
    sent = answered(desk)
    for bit in range(8 * len(sent.head)):
        head = bytearray(sent.head)
        head[bit // 8] ^= 1 << bit % 8
        with pytest.raises((TrustError, WireError)):
            desk.open(Parcel(bytes(head), list(sent.frames)), TASK, ANN.public_key())
    for at, frame in enumerate(sent.frames):
        for bit in range(8 * len(frame)):
            altered = bytearray(frame)
            altered[bit // 8] ^= 1 << bit % 8
            refused(desk, Parcel(sent.head, [*sent.frames[:at], bytes(altered), *sent.frames[at + 1 :]]))
    assert desk.open(sent, TASK, ANN.public_key()).outcome == TRAINED


@given(st.data())
def test_any_other_sequence_of_a_replys_frames_is_refused(data: st.DataObject) -> None:
    desk = desk_of()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", 8)
        sent = answered(desk)
    assert len(sent.frames) == 6
    first, second, *rest = sent.frames
    refused(desk, Parcel(sent.head, [first + second, *rest]), "the signature on this reply")
    refused(desk, Parcel(sent.head, [first[:1], first[1:], second, *rest]), "the signature on this reply")
    frames = data.draw(st.lists(st.sampled_from(sent.frames), max_size=8).filter(lambda some: some != sent.frames))
    refused(desk, Parcel(sent.head, frames), "the signature on this reply")
    head = pb.SealedReply.FromString(sent.head)
    head.signature = signature(ANN, Parcel(b"", frames), _seal_to(desk), head)
    refused(desk, Parcel(head.SerializeToString(), frames), "seal")


def _seal_to(desk: ReplyDesk) -> bytes:
    assert desk._private is not None
    return desk._private.public_key().public_bytes_raw()


def test_what_is_over_the_limit_is_refused_before_it_is_looked_at() -> None:
    desk = desk_of()
    sent = answered(desk)
    with pytest.raises(MessageTooLarge, match=r"a message of \d+ bytes"):
        desk.open(sent, TASK, ANN.public_key(), codec.Limits(message_bytes=sent.size - 1))
    with pytest.raises(MessageTooLarge, match=r"a head of \d+ bytes"):
        desk.open(sent, TASK, ANN.public_key(), codec.Limits(head_bytes=len(sent.head) - 1))
    assert sent.frames
    task = addressed(desk)
    with pytest.raises(MessageTooLarge, match=r"a head of \d+ bytes"):
        open_task(task, "ann", trusted, codec.Limits(head_bytes=len(task.head) - 1))


def test_a_message_does_not_repeat_what_a_stranger_wrote_at_length() -> None:
    desk = desk_of()
    sent = restated(answered(desk), lambda head: setattr(head, "run", "x" * 100_000))
    with pytest.raises(TrustError) as caught:
        desk.open(sent, TASK, ANN.public_key())
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
        open_task(Parcel(head, list(body)), "ann", trusted)
    for one in (desk, desk_of(sealed=False)):
        addressed(one)
        with pytest.raises((WireError, TrustError)):
            one.open(Parcel(head, list(body)), TASK, ANN.public_key())


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
                desk.open(Parcel(head.SerializeToString(), list(body)), TASK, ANN.public_key())


@given(st.lists(raw, min_size=1, max_size=4))
def test_any_bytes_that_a_node_seals_are_refused(inside: list[bytes]) -> None:
    desk = desk_of()
    came = opened(desk)
    context = envelope._context(TASK, came.nonce)
    for plain in (inside, [codec.encode_reply(Reply.to(TASK, TRAINED))[0], *inside[:1]]):
        ephemeral, closing = sealing.seal(plain, came.seal_to, context)
        closed = list(closing)
        head = pb.SealedReply.FromString(context)
        head.ephemeral = ephemeral
        head.signature = signature(ANN, Parcel(b"", closed), came.seal_to, head)
        with pytest.raises(WireError):
            desk.open(Parcel(head.SerializeToString(), closed), TASK, ANN.public_key())


@settings(max_examples=300)
@given(raw, raw, raw, raw, keys, raw, frames, st.booleans(), st.booleans())
def test_any_bytes_in_the_fields_of_a_task_are_refused(
    charter: bytes,
    certificate: bytes,
    task: bytes,
    nonce: bytes,
    seal_to: bytes,
    signed: bytes,
    body: list[bytes],
    known: bool,
    own: bool,
) -> None:
    """Signed at random, and signed by the coordinator as it should be."""
    if known:
        charter = SIGNED.charter
    sent = pb.SignedCharter(charter=charter, signer=CERTIFICATE if own else certificate, signature=signed)
    if own:
        sent.signature = identity.sign(SIGNER.key, "charter", charter)
        signed = identity.sign(SIGNER.key, "task", charter, task, nonce, seal_to)
    head = pb.SignedTask(charter=sent, task=task, nonce=nonce, seal_to=seal_to, signature=signed)
    with pytest.raises((WireError, TrustError)):
        open_task(Parcel(head.SerializeToString(), body), "ann", trusted)


def test_all_that_is_refused_is_an_error_of_ours() -> None:
    assert issubclass(TrustError, FarfieldError)
    assert issubclass(WireError, FarfieldError)

"""Any bit of any message turned over: a typed error, or a client that is left out, and never a wrong sum.

The values of a masked vector are under the envelope's seal and signature, so they are turned over inside it.
"""

from __future__ import annotations

from typing import Literal

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_session import Federation, federation

from farfield.protocols.envelope import Charter, Desk, Identity, Signer, close_reply, open_task, sign_charter
from farfield.protocols.errors import TrustError, WireError
from farfield.protocols.messages import Reply, Secure, Secured, Task
from farfield.protocols.parcel import Parcel
from farfield.protocols.secagg import Phase, Step, Sum
from farfield.protocols.secagg.session import LABEL_BYTES

Part = Literal["common", "own", "answer"]

SMALL, LARGE = 6, 52
PARTS: list[tuple[int, Step, Part]] = [
    (SMALL, Step.ADVERTISE, "common"),
    (SMALL, Step.ADVERTISE, "answer"),
    (LARGE, Step.REVEAL, "common"),
    (LARGE, Step.REVEAL, "answer"),
    (SMALL, Step.SHARE, "common"),
    (LARGE, Step.SHARE, "common"),
    (SMALL, Step.SHARE, "answer"),
    (SMALL, Step.SUBMIT, "common"),
    (SMALL, Step.SUBMIT, "own"),
    (SMALL, Step.SUBMIT, "answer"),
    (SMALL, Step.CONFIRM, "common"),
    (SMALL, Step.CONFIRM, "answer"),
    (SMALL, Step.UNMASK, "own"),
    (SMALL, Step.UNMASK, "answer"),
]


def flipped(raw: bytes, place: int) -> bytes:
    """`raw` with one bit turned over; as it is, where it is empty."""
    if not raw:
        return raw
    changed = bytearray(raw)
    changed[place // 8 % len(raw)] ^= 1 << place % 8
    return bytes(changed)


def asked(run: Federation, victim: str, step: Step, part: Part, place: int) -> Phase | Sum:
    """Go through the server's phase; whoever makes or sends something wrong is silent from then on."""
    phase = run.phase
    here = phase.step is step
    run.tamper = lambda _, client, common, own: (
        flipped(common, place) if here and client == victim and part == "common" else common,
        flipped(own, place) if here and client == victim and part == "own" else own,
    )
    for client in phase.clients:
        try:
            answer = run.ask(client)
            if here and client == victim and part == "answer":
                bits = 8 * LABEL_BYTES if step is Step.SUBMIT else 8 * len(answer)
                answer = flipped(answer, place % bits)
            phase.receive(client, answer)
        except WireError:
            continue
    return phase.close()


def goes_on_or_stops(clients: int, step: Step, part: Part, place: int) -> None:
    run = federation(clients)
    victim = list(run.vectors)[place % clients]
    while True:
        try:
            after = asked(run, victim, step, part, place)
        except WireError:
            return
        if isinstance(after, Sum):
            assert after.total.tolist() == run.plain_sum(after.clients)
            return
        run.phase = after


@pytest.mark.parametrize(("clients", "step", "part"), [case for case in PARTS if case[0] == SMALL])
@settings(max_examples=12, deadline=None)
@given(place=st.integers(0, 2**20))
def test_one_bit_of_a_message(clients: int, step: Step, part: Part, place: int) -> None:
    goes_on_or_stops(clients, step, part, place)


@pytest.mark.parametrize(("clients", "step", "part"), [case for case in PARTS if case[0] == LARGE])
@settings(max_examples=2, deadline=None)
@given(place=st.integers(0, 2**20))
def test_one_bit_of_a_message_on_a_sparse_graph(clients: int, step: Step, part: Part, place: int) -> None:
    goes_on_or_stops(clients, step, part, place)


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "step", "part"), PARTS)
@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 2**20))
def test_many_bits_of_every_message(clients: int, step: Step, part: Part, place: int) -> None:
    goes_on_or_stops(clients, step, part, place)


CHARTER = Charter("run", b"{}", "", 0, "")
SIGNER = Signer(Ed25519PrivateKey.generate(), b"certificate")
CLIENT = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, 2**20), frame=st.booleans())
def test_one_bit_of_a_masked_vector_in_its_envelope(place: int, frame: bool) -> None:
    run = federation()
    run.until(Step.SUBMIT)
    masked = run.ask("client-0000")
    work = Secure("submit", run.opened.session, b"", b"")
    task = Task("run", 3, "client-0000", CHARTER.plan_digest, work, 5)
    desk = Desk(sign_charter(CHARTER, SIGNER), SIGNER, work, expires=100, sealed=True)
    opened = open_task(desk.address(task, CLIENT.member), task.node, trusted, CLIENT.sealing, 0)
    sent = close_reply(Reply.to(task, Secured(masked)), opened, CLIENT.signing)
    honest = Parcel(sent.head, list(sent.frames))
    outcome = desk.open(honest, task, CLIENT.member).outcome
    assert isinstance(outcome, Secured)
    assert bytes(outcome.answer) == masked
    if frame:
        sent.frames[place % len(sent.frames)] = flipped(sent.frames[place % len(sent.frames)], place)
    else:
        sent = Parcel(flipped(sent.head, place), sent.frames)
    with pytest.raises((WireError, TrustError)):
        desk.open(sent, task, CLIENT.member)


def trusted(certificate: bytes) -> Ed25519PublicKey:
    return SIGNER.key.public_key()

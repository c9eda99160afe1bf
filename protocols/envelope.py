"""Envelopes: what makes a task worth believing and a reply unreadable.

    coordinator                                             client
    charter = Charter(…);  signed once for the run
    desk = ReplyDesk(charter)      an X25519 key for this round
    parcel = address(task, …)   ───────────────────────▶    opened = open_task(parcel, …)
                                                            reply = worker.perform(opened.task)
    reply = desk.open(parcel, …)   ◀───────────────────     parcel = close_reply(reply, opened, …)

A task is signed with the coordinator's key together with the charter of its run, a nonce and the key to seal to. A
reply is sealed to that key in the context (run, round, node, Plan, nonce) and signed by its node, so it can be neither
read by whoever carries it, nor counted anywhere else, nor made by another node. See docs/security.md.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from . import codec, identity, sealing
from . import messages_pb2 as pb
from .codec import LIMITS, WIRE_VERSION, Limits
from .errors import MalformedMessage, MessageTooLarge, TrustError
from .messages import Reply, Task
from .parcel import Body, Parcel

NONCE_BYTES: Final = 16

_CHARTER, _TASK, _REPLY = "charter", "task", "reply"


@dataclass(frozen=True, slots=True)
class Charter:
    """What a coordinator states once about a run.

    Attributes:
        plan: the Plan's canonical bytes.
        backbone: digest of the backbone's bundle, hexadecimal; empty where both sides have it already.
        backbone_bytes: its size.
        frozen: digest of the adapter's parts that are drawn from the seed and not trained, hexadecimal.
    """

    run: str
    plan: bytes
    backbone: str
    backbone_bytes: int
    frozen: str

    @property
    def plan_digest(self) -> str:
        return hashlib.sha256(self.plan).hexdigest()


@dataclass(frozen=True, slots=True)
class Signer:
    """The coordinator's signing key, with the certificate (DER) that says so; empty in a simulation."""

    key: Ed25519PrivateKey
    certificate: bytes = b""

    def __repr__(self) -> str:
        return "Signer(…)"


@dataclass(frozen=True, slots=True)
class Opened:
    """A task that was verified: what is asked, under which charter, and how to answer."""

    task: Task
    charter: Charter
    nonce: bytes
    seal_to: bytes


def sign_charter(charter: Charter, signer: Signer) -> pb.SignedCharter:
    raw = pb.Charter(
        version=WIRE_VERSION,
        run=charter.run,
        plan=charter.plan,
        backbone=bytes.fromhex(charter.backbone),
        backbone_bytes=charter.backbone_bytes,
        frozen=bytes.fromhex(charter.frozen),
    ).SerializeToString(deterministic=True)
    signature = identity.sign(signer.key, _CHARTER, raw)
    return pb.SignedCharter(charter=raw, signer=signer.certificate, signature=signature)


class ReplyDesk:
    """The coordinator's side of one round: addresses its tasks, and opens the replies to them.

    The key that replies are sealed to is made here and kept in memory only; with the desk it is gone.
    """

    def __init__(self, charter: pb.SignedCharter, signer: Signer, *, sealed: bool) -> None:
        self._charter = charter
        self._signer = signer
        self._private = X25519PrivateKey.generate() if sealed else None
        self._nonces: dict[str, bytes] = {}

    def address(self, task: Task, body: Body) -> Parcel:
        """The signed task, ready to travel. A second task to the same node in a round replaces the first."""
        parcel = codec.encode_task(task, body)
        nonce = self._nonces[task.node] = secrets.token_bytes(NONCE_BYTES)
        seal_to = self._private.public_key().public_bytes_raw() if self._private else b""
        signature = identity.sign(self._signer.key, _TASK, self._charter.charter, parcel.head, nonce, seal_to)
        head = pb.SignedTask(charter=self._charter, task=parcel.head, nonce=nonce, seal_to=seal_to, signature=signature)
        return Parcel(head.SerializeToString(deterministic=True), parcel.frames)

    def open(self, parcel: Parcel, task: Task, key: Ed25519PublicKey, limits: Limits = LIMITS) -> Reply:
        """The reply to `task` in `parcel`, whose frames are used up.

        Args:
            key: with which the task's node signs.

        Raises:
            TrustError: sealed for another round, run, node or task, altered, or signed by somebody else.
            WireError: what was sealed is no reply.
        """
        if self._private is None:
            return _answering(task, codec.decode_reply(parcel, limits))
        if parcel.size > limits.message_bytes:
            raise MessageTooLarge(f"a message of {parcel.size} bytes", hint=f"The limit is {limits.message_bytes}.")
        sealed = codec.parse(pb.SealedReply(), parcel.head, limits)
        context = _context(task, self._nonces[task.node])
        if _stated(sealed) != context:
            raise TrustError(
                f"a reply to another task: of {sealed.node[:64]!r} to round {sealed.round} of run {sealed.run[:64]!r}",
                where=f"round {task.round} of run {task.run!r}, waiting for {task.node!r}",
            )
        recipient = self._private.public_key().public_bytes_raw()
        identity.verify(key, sealed.signature, _REPLY, context, recipient, sealed.ephemeral, _digest(parcel.frames))
        frames = sealing.unseal(_consumed(parcel.frames), sealed.ephemeral, self._private, context)
        head = next(frames, None)
        if head is None:
            raise MalformedMessage("a sealed reply without its head")
        return _answering(task, codec.decode_reply(Parcel(head, list(frames)), limits))


def open_task(
    parcel: Parcel,
    node: str,
    trusted: Callable[[bytes], Ed25519PublicKey],
    limits: Limits = LIMITS,
    *,
    sealed: bool = True,
) -> Opened:
    """The task in `parcel`, if the coordinator signed it and its charter for `node`. Uses the frames up.

    Args:
        trusted: gives the key in a signer's certificate (DER); raises TrustError when it is not to be trusted.
        sealed: whether replies are to be sealed. Only a simulation may say no.

    Raises:
        TrustError: unsigned, altered, for another node, for another run or Plan than its charter is, or without a key
            to seal to (with one, where nothing is to be sealed).
        WireError: no task.
    """
    signed = codec.parse(pb.SignedTask(), parcel.head, limits)
    key = trusted(signed.charter.signer)
    identity.verify(key, signed.charter.signature, _CHARTER, signed.charter.charter)
    identity.verify(key, signed.signature, _TASK, signed.charter.charter, signed.task, signed.nonce, signed.seal_to)
    charter = _charter(signed.charter.charter, limits)
    task = codec.decode_task(Parcel(signed.task, parcel.frames), limits)
    if task.node != node:
        raise TrustError(f"a task for {task.node!r}, and this is {node!r}")
    if (task.run, task.plan_digest) != (charter.run, charter.plan_digest):
        raise TrustError(f"the task of run {task.run!r} came with the charter of another run or Plan")
    if len(signed.nonce) != NONCE_BYTES:
        raise MalformedMessage(f"a nonce of {len(signed.nonce)} bytes")
    if bool(signed.seal_to) != sealed:
        raise TrustError(f"a task whose reply is {'not ' if sealed else ''}to be sealed", where=f"run {task.run!r}")
    return Opened(task, charter, signed.nonce, signed.seal_to)


def close_reply(reply: Reply, to: Opened, key: Ed25519PrivateKey) -> Parcel:
    """The reply, sealed to the key that its task named and signed by the node; as it is, where the task named none.

    Raises:
        TrustError: what the task named is no key.
    """
    head, frames = codec.encode_reply(reply)
    if not to.seal_to:
        return Parcel(head, list(frames))
    context = _context(to.task, to.nonce)
    ephemeral, sealed = sealing.seal(_chained(head, frames), to.seal_to, context)
    closed = list(sealed)
    signature = identity.sign(key, _REPLY, context, to.seal_to, ephemeral, _digest(closed))
    task = to.task
    outer = pb.SealedReply(
        version=WIRE_VERSION,
        run=task.run,
        round=task.round,
        node=task.node,
        plan_digest=bytes.fromhex(task.plan_digest),
        nonce=to.nonce,
        ephemeral=ephemeral,
        signature=signature,
    )
    return Parcel(outer.SerializeToString(deterministic=True), closed)


def _answering(task: Task, reply: Reply) -> Reply:
    """`reply`, if it is one to `task`: a node that seals what it likes could put another's name inside."""
    if (reply.run, reply.round, reply.node, reply.plan_digest) != (task.run, task.round, task.node, task.plan_digest):
        raise TrustError(f"{task.node!r} sent a reply to another task, or in another's name", where=f"run {task.run!r}")
    return reply


def _charter(raw: bytes, limits: Limits) -> Charter:
    charter = codec.parse(pb.Charter(), raw, limits)
    return Charter(charter.run, charter.plan, charter.backbone.hex(), charter.backbone_bytes, charter.frozen.hex())


def _context(task: Task, nonce: bytes) -> bytes:
    """What a reply is bound to."""
    return _bound(task.run, task.round, task.node, bytes.fromhex(task.plan_digest), nonce)


def _stated(sealed: pb.SealedReply) -> bytes:
    return _bound(sealed.run, sealed.round, sealed.node, sealed.plan_digest, sealed.nonce)


def _bound(run: str, number: int, node: str, plan_digest: bytes, nonce: bytes) -> bytes:
    return pb.SealedReply(
        version=WIRE_VERSION, run=run, round=number, node=node, plan_digest=plan_digest, nonce=nonce
    ).SerializeToString(deterministic=True)


def _digest(frames: list[bytes]) -> bytes:
    hashed = hashlib.sha256()
    for frame in frames:
        hashed.update(len(frame).to_bytes(8, "big"))
        hashed.update(frame)
    return hashed.digest()


def _chained(head: bytes, frames: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from frames


def _consumed(frames: list[bytes]) -> Iterator[bytes]:
    frames.reverse()
    while frames:
        yield frames.pop()

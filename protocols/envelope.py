"""Envelopes: what makes a task worth believing, and task and reply unreadable on the way.

    coordinator                                             client
    charter = Charter(…);  signed once for the run
    desk = Desk(charter, …)        keys for this round
    parcel = desk.address(task, member) ───────────────▶    opened = open_task(parcel, …)
                                                            reply = worker.perform(opened.task)
    reply = desk.open(parcel, …)   ◀───────────────────     parcel = close_reply(reply, opened, …)

A task is signed with the coordinator's key, together with the charter of its run, a nonce, a time after which it is
worth nothing, and the key to seal to. Its body, the adapter, is the same for all nodes of a round, so it is locked
once, and the key to it is sealed to each node. A reply is sealed to the round's key in the context (run, round, node,
Plan, nonce) and signed by its node, so it can be neither read by whoever carries it, nor counted anywhere else, nor
made by another node. See docs/security.md.
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
from .errors import MalformedMessage, TrustError
from .messages import Reply, Task, Work
from .parcel import Parcel

NONCE_BYTES: Final = 16

_CHARTER, _TASK, _REPLY = "charter", "task", "reply"
_BODY_CONTEXT: Final = identity.statement("body")


@dataclass(frozen=True, slots=True)
class Charter:
    """What a coordinator states once about a run.

    Attributes:
        plan: the Plan's canonical bytes.
        backbone: digest of the backbone's bundle, hexadecimal; empty where both sides have it already.
        backbone_bytes: its size.
        frozen: digest of the adapter's parts that are drawn from the seed and not trained, hexadecimal.
        roster: of a consortium, as `roster.open_roster` takes it; empty where there is none. It proves itself to those
            who know the consortium's key, and nothing by being here.
    """

    run: str
    plan: bytes
    backbone: str
    backbone_bytes: int
    frozen: str
    roster: bytes = b""

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
class Member:
    """A node's public keys: it signs with the first, and opens what is sealed to the second (X25519, 32 bytes)."""

    signing: Ed25519PublicKey
    sealing: bytes

    @classmethod
    def of(cls, signing: bytes, sealing: bytes) -> Member:
        """From the raw keys, 32 bytes each."""
        return cls(Ed25519PublicKey.from_public_bytes(signing), sealing)


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's private keys, those of its `Member`."""

    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey

    def __repr__(self) -> str:
        return "Identity(…)"

    @property
    def member(self) -> Member:
        return Member(self.signing.public_key(), self.sealing.public_key().public_bytes_raw())


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
        roster=charter.roster,
    ).SerializeToString(deterministic=True)
    signature = identity.sign(signer.key, _CHARTER, raw)
    return pb.SignedCharter(charter=raw, signer=signer.certificate, signature=signature)


class Desk:
    """The coordinator's side of one round: addresses its tasks, and opens the replies to them.

    The keys of the round are made here and kept in memory only; with the desk they are gone, and no recording of the
    replies can be opened any more.

    Attributes:
        frames: the body of every task of the round, as it travels.
    """

    def __init__(self, charter: pb.SignedCharter, signer: Signer, work: Work, *, expires: float, sealed: bool) -> None:
        """
        Args:
            expires: seconds since 1970, after which no node is to begin with a task of this round.
            sealed: whether anything is sealed at all. Only a simulation may say no.
        """
        self._charter, self._signer, self._expires = charter, signer, int(expires)
        self._body = codec.pack_body(work)
        self._private = X25519PrivateKey.generate() if sealed else None
        self._body_key = secrets.token_bytes(sealing.KEY_BYTES)
        locked = sealing.lock(self._body.frames or (b"",), self._body_key, _BODY_CONTEXT)
        self.frames = tuple(locked) if sealed else self._body.frames
        self._nonces: dict[str, bytes] = {}

    def address(self, task: Task, member: Member) -> Parcel:
        """The signed task, ready to travel. A second task to the same node in a round replaces the first.

        Raises:
            TrustError: the member's key is none that anything can be sealed to.
        """
        head = codec.encode_task(task, self._body).head
        nonce = self._nonces[task.node] = secrets.token_bytes(NONCE_BYTES)
        signed = pb.SignedTask(version=WIRE_VERSION, charter=self._charter, task=head, nonce=nonce)
        signed.expires = self._expires
        if self._private is not None:
            signed.seal_to = self._private.public_key().public_bytes_raw()
            context = _key_context(signed)
            signed.ephemeral, (signed.body_key,) = sealing.seal([self._body_key], member.sealing, context)
        signed.signature = identity.sign(self._signer.key, _TASK, *_signed_parts(signed))
        return Parcel(signed.SerializeToString(deterministic=True), list(self.frames))

    def open(self, parcel: Parcel, task: Task, member: Member, limits: Limits = LIMITS) -> Reply:
        """The reply to `task` in `parcel`, whose frames are used up.

        Args:
            member: the task's node.

        Raises:
            TrustError: sealed for another round, run, node or task, altered, or signed by somebody else.
            WireError: what was sealed is no reply.
        """
        if self._private is None:
            return _answering(task, codec.decode_reply(parcel, limits))
        parcel.check(limits.message_bytes)
        sealed = codec.parse(pb.SealedReply(), parcel.head, limits)
        nonce = self._nonces[task.node]
        stated = (sealed.run, sealed.round, sealed.node, sealed.plan_digest.hex(), sealed.nonce)
        if stated != (task.run, task.round, task.node, task.plan_digest, nonce):
            raise TrustError(
                f"a reply to another task: of {sealed.node[:64]!r} to round {sealed.round} of run {sealed.run[:64]!r}",
                where=f"round {task.round} of run {task.run!r}, waiting for {task.node!r}",
            )
        context = _context(task, nonce)
        recipient = self._private.public_key().public_bytes_raw()
        signed = (context, recipient, sealed.ephemeral, _digest(parcel.frames))
        identity.verify(member.signing, sealed.signature, _REPLY, *signed)
        frames = sealing.unseal(_consumed(parcel.frames), sealed.ephemeral, self._private, context)
        head = next(frames, None)
        if head is None:
            raise MalformedMessage("a sealed reply without its head")
        return _answering(task, codec.decode_reply(Parcel(head, list(frames)), limits))


def open_task(
    parcel: Parcel,
    node: str,
    trusted: Callable[[bytes], Ed25519PublicKey],
    key: X25519PrivateKey,
    now: float,
    limits: Limits = LIMITS,
    *,
    sealed: bool = True,
) -> Opened:
    """The task in `parcel`, if the coordinator signed it and its charter for `node`. Uses the frames up.

    Args:
        trusted: gives the key in a signer's certificate (DER); raises TrustError when it is not to be trusted.
        key: opens what is sealed to this node.
        now: seconds since 1970.
        sealed: whether anything is to be sealed. Only a simulation may say no.

    Raises:
        TrustError: unsigned, altered, expired, for another node, for another run or Plan than its charter is, or
            without keys (with them, where nothing is to be sealed).
        WireError: no task.
    """
    parcel.check(limits.message_bytes)
    signed = codec.parse(pb.SignedTask(), parcel.head, limits)
    coordinator = trusted(signed.charter.signer)
    identity.verify(coordinator, signed.charter.signature, _CHARTER, signed.charter.charter)
    identity.verify(coordinator, signed.signature, _TASK, *_signed_parts(signed))
    charter = _charter(signed.charter.charter, limits)
    if len(signed.nonce) != NONCE_BYTES:
        raise MalformedMessage(f"a nonce of {len(signed.nonce)} bytes")
    if now > signed.expires:
        raise TrustError(
            f"a task of run {charter.run!r} that expired {now - signed.expires:.0f} s ago",
            hint="It was held up or is a replay, or one of the two clocks is wrong.",
        )
    if bool(signed.seal_to) != sealed:
        raise TrustError(f"a task whose reply is {'not ' if sealed else ''}to be sealed", where=f"run {charter.run!r}")
    addressed = codec.parse(pb.Task(), signed.task, limits)
    if addressed.node != node:
        raise TrustError(f"a task for {addressed.node[:64]!r}, and this is {node!r}")
    frames = parcel.frames
    if sealed:
        (body_key,) = sealing.unseal([signed.body_key], signed.ephemeral, key, _key_context(signed))
        if len(body_key) != sealing.KEY_BYTES:
            raise MalformedMessage(f"a body key of {len(body_key)} bytes")
        frames = list(sealing.unlock(_consumed(frames), body_key, _BODY_CONTEXT))
    task = codec.decode_task(Parcel(signed.task, frames), limits)
    if (task.run, task.plan_digest) != (charter.run, charter.plan_digest):
        raise TrustError(f"the task of run {task.run[:64]!r} came with the charter of another run or Plan")
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
    return Charter(
        charter.run,
        charter.plan,
        charter.backbone.hex(),
        charter.backbone_bytes,
        charter.frozen.hex(),
        charter.roster,
    )


def _signed_parts(signed: pb.SignedTask) -> list[bytes]:
    """What the coordinator's signature on a task covers: all of it, and the charter that it comes with."""
    expires = signed.expires.to_bytes(8, "big")
    return [
        signed.charter.charter, signed.task, signed.nonce, expires, signed.seal_to, signed.ephemeral, signed.body_key
    ]  # fmt: skip


def _key_context(signed: pb.SignedTask) -> bytes:
    """What the key to the body is bound to: this task, and so this node."""
    return identity.statement("body key", signed.task, signed.nonce)


def _context(task: Task, nonce: bytes) -> bytes:
    """What a reply is bound to."""
    plan = bytes.fromhex(task.plan_digest)
    return identity.statement(_REPLY, task.run.encode(), task.round.to_bytes(4, "big"), task.node.encode(), plan, nonce)


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

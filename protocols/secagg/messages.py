"""The messages of a secure aggregation as bytes, and back.

Bytes from outside are believed only after they were checked: their size before anything is parsed, then their version,
then every name and length. Whatever is wrong is a WireError; no input raises anything else. Whether a message belongs
here, and whether it is true, is not judged in this file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar, get_args

from google.protobuf.message import Message

from farfield.protocols import codec
from farfield.protocols import secagg_pb2 as pb
from farfield.protocols.codec import WIRE_VERSION, Limits
from farfield.protocols.errors import MalformedMessage
from farfield.protocols.identity import NAME

from .fixedpoint import MODULI
from .parameters import FEWEST, Adversary
from .shamir import SHARE_BYTES

KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
SESSION_BYTES: Final = 32
MOST_CLIENTS: Final = 1 << 16
MOST_ENTRIES: Final = 1 << 30

_FIXED_BYTES: Final = 8192
_BYTES_PER_CLIENT: Final = 512

M = TypeVar("M", bound=Message)


class Step(Enum):
    """What a client is asked for, in this order; REVEAL only where more are asked than a full graph takes."""

    ADVERTISE = "advertise"
    REVEAL = "reveal"
    SHARE = "share"
    SUBMIT = "submit"
    CONFIRM = "confirm"
    UNMASK = "unmask"


@dataclass(frozen=True)
class Open:
    """What a session is about; everybody answers to the same one.

    Attributes:
        session: 32 bytes that the server drew for this session alone.
        context: SHA-256 of all else that must be the same for everybody: Plan, backbone, adapter, ranges, noise.
        clients: how many are asked; no more than these can be on the roster.
        modulus_bits: the sum is known modulo 2 to this power: 16, 24 or 32.
        length: entries of the vector.
        minimum: the fewest clients whose sum may be opened.
        corrupt, dropouts, adversary: what the graph has to withstand; see `parameters.choose`.
    """

    session: bytes
    run: str
    round: int
    context: bytes
    clients: int
    modulus_bits: int
    length: int
    minimum: int
    corrupt: float
    dropouts: float
    adversary: Adversary


@dataclass(frozen=True)
class Advertisement:
    """A client's public keys for one session.

    Attributes:
        box_key: X25519; shares for this client are encrypted to it.
        mask_key: X25519; masks are agreed on with it. Its private half is opened when the client drops out.
        seed_digest: of the seed of its own mask.
        reveal_digest: of its part in the randomness of the graph.
        signature: by its identity, over all these and the session's Open.
    """

    name: str
    box_key: bytes
    mask_key: bytes
    seed_digest: bytes
    reveal_digest: bytes
    signature: bytes


@dataclass(frozen=True)
class Dealt:
    """What one holder gets of a dealer's two secrets.

    Attributes:
        box: both shares, which only the holder can read; empty where the dealer holds them itself.
        seed_digest, key_digest: of each share, for the server.
    """

    box: bytes
    seed_digest: bytes
    key_digest: bytes


def encode_open(one: Open) -> bytes:
    return _encoded(
        pb.Open(
            version=WIRE_VERSION,
            session=one.session,
            run=one.run,
            round=one.round,
            context=one.context,
            clients=one.clients,
            modulus_bits=one.modulus_bits,
            length=one.length,
            minimum=one.minimum,
            corrupt=one.corrupt,
            dropouts=one.dropouts,
            adversary=one.adversary,
        )
    )


def decode_open(raw: bytes) -> Open:
    """Raises WireError, also where the numbers contradict one another."""
    message = _parsed(pb.Open(), raw, 0)
    _sized(message.session, SESSION_BYTES, "session number")
    _sized(message.context, DIGEST_BYTES, "context")
    if message.modulus_bits not in MODULI:
        raise MalformedMessage(f"a modulus of {message.modulus_bits} bits", hint=f"It has one of {MODULI}.")
    if not FEWEST <= message.clients <= MOST_CLIENTS:
        raise MalformedMessage(f"{message.clients} clients", hint=f"From {FEWEST} to {MOST_CLIENTS} can take part.")
    if not 2 <= message.minimum <= message.clients:
        raise MalformedMessage(f"a sum of {message.minimum} or more of {message.clients} clients")
    if not 1 <= message.length <= MOST_ENTRIES:
        raise MalformedMessage(f"a vector of {message.length} entries", hint=f"From 1 to {MOST_ENTRIES} are possible.")
    if not all(math.isfinite(share) and 0 <= share < 1 for share in (message.corrupt, message.dropouts)):
        raise MalformedMessage(f"shares of {message.corrupt} corrupt clients and {message.dropouts} dropouts")
    adversary = next((known for known in get_args(Adversary) if known == message.adversary), None)
    if adversary is None:
        raise MalformedMessage(f"an adversary that is {message.adversary[:64]!r}")
    return Open(
        message.session,
        message.run,
        message.round,
        message.context,
        message.clients,
        message.modulus_bits,
        message.length,
        message.minimum,
        message.corrupt,
        message.dropouts,
        adversary,
    )


def encode_advertisement(one: Advertisement) -> bytes:
    return _encoded(_advertisement(one))


def decode_advertisement(raw: bytes) -> Advertisement:
    """Raises WireError."""
    return _read_advertisement(_parsed(pb.Advertisement(), raw, 1))


def encode_roster(members: Iterable[tuple[bytes, Advertisement]]) -> bytes:
    """Raw identity key and advertisement of each client, in the order of their names."""
    parts = [pb.Member(identity=identity, advertisement=_advertisement(one)) for identity, one in members]
    return _encoded(pb.Roster(version=WIRE_VERSION, members=parts))


def decode_roster(raw: bytes, most: int) -> list[tuple[bytes, Advertisement]]:
    """At most `most` members, in ascending order of their names, which differ. Raises WireError."""
    message = _parsed(pb.Roster(), raw, most)
    members = []
    for part in message.members:
        _sized(part.identity, KEY_BYTES, "identity key")
        members.append((part.identity, _read_advertisement(part.advertisement)))
    _names([one.name for _, one in members], most)
    return members


def encode_reveal(value: bytes) -> bytes:
    return _encoded(pb.Reveal(version=WIRE_VERSION, value=value))


def decode_reveal(raw: bytes) -> bytes:
    """Raises WireError."""
    return _sized(_parsed(pb.Reveal(), raw, 0).value, KEY_BYTES, "reveal")


def encode_reveals(reveals: Mapping[str, bytes]) -> bytes:
    return _encoded(pb.Reveals(version=WIRE_VERSION, reveals=_pairs(reveals)))


def decode_reveals(raw: bytes, most: int) -> dict[str, bytes]:
    """Raises WireError."""
    return _read_pairs(_parsed(pb.Reveals(), raw, most).reveals, most, KEY_BYTES, "reveal")


def encode_shares(dealt: Mapping[str, Dealt]) -> bytes:
    """By name of the holder."""
    parts = [
        pb.Dealt(holder=holder, box=one.box, seed_digest=one.seed_digest, key_digest=one.key_digest)
        for holder, one in sorted(dealt.items())
    ]
    return _encoded(pb.Shares(version=WIRE_VERSION, dealt=parts))


def decode_shares(raw: bytes, most: int) -> dict[str, Dealt]:
    """Raises WireError."""
    message = _parsed(pb.Shares(), raw, most)
    names = _names([part.holder for part in message.dealt], most)
    for part in message.dealt:
        _sized(part.seed_digest, DIGEST_BYTES, "digest of a share")
        _sized(part.key_digest, DIGEST_BYTES, "digest of a share")
    return {
        name: Dealt(part.box, part.seed_digest, part.key_digest)
        for name, part in zip(names, message.dealt, strict=True)
    }


def encode_sharers(names: Iterable[str]) -> bytes:
    return _encoded(pb.Sharers(version=WIRE_VERSION, names=sorted(names)))


def decode_sharers(raw: bytes, most: int) -> tuple[str, ...]:
    """Raises WireError."""
    return _names(_parsed(pb.Sharers(), raw, most).names, most)


def encode_inbox(boxes: Mapping[str, bytes]) -> bytes:
    """By name of the dealer."""
    return _encoded(pb.Inbox(version=WIRE_VERSION, boxes=_pairs(boxes)))


def decode_inbox(raw: bytes, most: int) -> dict[str, bytes]:
    """Raises WireError."""
    return _read_pairs(_parsed(pb.Inbox(), raw, most).boxes, most, None, "box")


def encode_survivors(survivors: Iterable[str], dropped: Iterable[str]) -> bytes:
    return _encoded(pb.Survivors(version=WIRE_VERSION, survivors=sorted(survivors), dropped=sorted(dropped)))


def decode_survivors(raw: bytes, most: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those whose vectors count, and those who shared and dropped out. Raises WireError."""
    message = _parsed(pb.Survivors(), raw, 2 * most)
    return _names(message.survivors, most), _names(message.dropped, most)


def encode_confirmation(signature: bytes) -> bytes:
    return _encoded(pb.Confirmation(version=WIRE_VERSION, signature=signature))


def decode_confirmation(raw: bytes) -> bytes:
    """Raises WireError."""
    return _sized(_parsed(pb.Confirmation(), raw, 0).signature, SIGNATURE_BYTES, "signature")


def encode_confirmations(signatures: Mapping[str, bytes]) -> bytes:
    return _encoded(pb.Confirmations(version=WIRE_VERSION, signatures=_pairs(signatures)))


def decode_confirmations(raw: bytes, most: int) -> dict[str, bytes]:
    """Raises WireError."""
    return _read_pairs(_parsed(pb.Confirmations(), raw, most).signatures, most, SIGNATURE_BYTES, "signature")


def encode_revelation(shares: Mapping[str, bytes]) -> bytes:
    """By name of the dealer."""
    return _encoded(pb.Revelation(version=WIRE_VERSION, shares=_pairs(shares)))


def decode_revelation(raw: bytes, most: int) -> dict[str, bytes]:
    """Raises WireError."""
    return _read_pairs(_parsed(pb.Revelation(), raw, most).shares, most, SHARE_BYTES, "share")


def _encoded(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _parsed(message: M, raw: bytes, clients: int) -> M:
    return codec.parse(message, raw, Limits(head_bytes=_FIXED_BYTES + clients * _BYTES_PER_CLIENT))


def _sized(value: bytes, size: int, what: str) -> bytes:
    if len(value) != size:
        raise MalformedMessage(f"a {what} of {len(value)} bytes", hint=f"It has {size}.")
    return value


def _names(names: Collection[str], most: int) -> tuple[str, ...]:
    """The names, each one that a node may have, in ascending order and none twice."""
    if len(names) > most:
        raise MalformedMessage(f"{len(names)} names", hint=f"At most {most} can be here.")
    before = ""
    for name in names:
        if not NAME.fullmatch(name):
            raise MalformedMessage(f"{codec.printable(name[:64])!r} is no name for a node")
        if name <= before:
            raise MalformedMessage(f"{name!r} is named twice or out of order")
        before = name
    return tuple(names)


def _pairs(values: Mapping[str, bytes]) -> list[pb.Named]:
    return [pb.Named(name=name, value=value) for name, value in sorted(values.items())]


def _read_pairs(pairs: Any, most: int, size: int | None, what: str) -> dict[str, bytes]:
    """Values by name, each of `size` bytes unless that is None."""
    names = _names([pair.name for pair in pairs], most)
    values = [pair.value for pair in pairs]
    if size is not None:
        values = [_sized(value, size, what) for value in values]
    return dict(zip(names, values, strict=True))


def _advertisement(one: Advertisement) -> pb.Advertisement:
    return pb.Advertisement(
        version=WIRE_VERSION,
        name=one.name,
        box_key=one.box_key,
        mask_key=one.mask_key,
        seed_digest=one.seed_digest,
        reveal_digest=one.reveal_digest,
        signature=one.signature,
    )


def _read_advertisement(message: pb.Advertisement) -> Advertisement:
    if message.version != WIRE_VERSION:
        raise MalformedMessage(f"an advertisement of wire version {message.version}, expected {WIRE_VERSION}")
    _names([message.name], 1)
    return Advertisement(
        message.name,
        _sized(message.box_key, KEY_BYTES, "key"),
        _sized(message.mask_key, KEY_BYTES, "key"),
        _sized(message.seed_digest, DIGEST_BYTES, "digest"),
        _sized(message.reveal_digest, DIGEST_BYTES, "digest"),
        _sized(message.signature, SIGNATURE_BYTES, "signature"),
    )

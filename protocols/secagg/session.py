"""What everybody in a session derives from what everybody was told: the roster, the graph, and one digest of it all.

Functions of public bytes alone. They are remembered, because in a simulation all clients of a process read the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from farfield.protocols import identity
from farfield.protocols.errors import SecAggError, TrustError
from farfield.protocols.identity import statement

from . import graph, parameters
from .boxes import commitment
from .messages import DIGEST_BYTES, Advertisement, Open, decode_open, decode_reveals, decode_roster, decode_survivors

ADVERTISEMENT: Final = "secagg advertisement"
CONFIRMATION: Final = "secagg confirmation"
REVEAL: Final = "reveal"
SEED: Final = "seed"

_REMEMBERED: Final = 4


@dataclass(frozen=True)
class Member:
    """A client on the roster.

    Attributes:
        identity: raw Ed25519 public key, with which its advertisement is signed.
    """

    identity: bytes
    advertisement: Advertisement


@dataclass(frozen=True)
class Session:
    """Who takes part, and who shares with whom.

    Attributes:
        digest: SHA-256 over the Open, the roster and the reveals as they came.
        members: by name, in ascending order.
        holders: of each member's secrets, in ascending order: its neighbours, and itself where all are neighbours.
        threshold: so many holders give a secret back.
    """

    open: Open
    digest: bytes
    members: Mapping[str, Member]
    holders: Mapping[str, tuple[str, ...]]
    threshold: int

    def within(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        """Those of `names` that hold shares of `name`'s secrets, in ascending order."""
        return tuple(holder for holder in self.holders[name] if holder in names)


@dataclass(frozen=True)
class Split:
    """Who of the sharers survived to the sum, and who dropped out after sharing."""

    survivors: frozenset[str]
    dropped: frozenset[str]


@lru_cache(_REMEMBERED)
def read_open(raw: bytes) -> Open:
    """Raises WireError."""
    return decode_open(raw)


def sparse(opened: Open) -> bool:
    """Whether there is a step REVEAL: more are asked than a full graph takes."""
    return opened.clients > parameters.SMALL


def advertisement_parts(opened: bytes, one: Advertisement) -> list[bytes]:
    """What an advertisement's signature covers (domain `ADVERTISEMENT`)."""
    digest = hashlib.sha256(opened).digest()
    return [digest, one.name.encode(), one.box_key, one.mask_key, one.seed_digest, one.reveal_digest]


def check_advertisement(opened: bytes, one: Advertisement, key: bytes) -> None:
    """Raises SecAggError unless the identity `key` signed it for this session."""
    _check_signature(key, one.signature, ADVERTISEMENT, advertisement_parts(opened, one), one.name)


@lru_cache(_REMEMBERED)
def read_roster(opened: bytes, raw: bytes) -> Mapping[str, Member]:
    """The members by name, each of whom signed its keys for this session.

    Raises:
        SecAggError: more members than were asked, fewer than may be summed, a signature that does not hold, or an
            identity or key that is there twice: one client under two names would weaken what the others count on.
        WireError: no roster.
    """
    one = read_open(opened)
    parts = decode_roster(raw, one.clients)
    if len(parts) < one.minimum:
        raise SecAggError(f"a roster of {len(parts)} clients, too few for a sum of {one.minimum} or more")
    _no_repeats("identity key", (key for key, _ in parts))
    _no_repeats("X25519 key", (key for _, part in parts for key in (part.box_key, part.mask_key)))
    for key, part in parts:
        check_advertisement(opened, part, key)
    return {part.name: Member(key, part) for key, part in parts}


@lru_cache(_REMEMBERED)
def read_session(opened: bytes, roster: bytes, reveals: bytes) -> Session:
    """The session of all on the roster; on a sparse graph, of all who revealed what they had committed themselves to.

    Args:
        reveals: empty for a full graph.

    Raises:
        SecAggError: a reveal that was not committed to, too few of them, or no graph that withstands what is stated.
        WireError: no reveals.
    """
    one, members = read_open(opened), read_roster(opened, roster)
    seed = bytes(graph.SEED_BYTES)
    if sparse(one):
        revealed = decode_reveals(reveals, len(members))
        for name, value in revealed.items():
            check_reveal(members, name, value)
        if len(revealed) < one.minimum:
            raise SecAggError(f"{len(revealed)} clients are left, too few for a sum of {one.minimum} or more")
        members = {name: members[name] for name in revealed}
        seed = _digest("secagg graph", opened, roster, reveals)
    elif reveals:
        raise SecAggError("reveals, where everybody is everybody's neighbour")
    chosen = parameters.choose(len(members), one.corrupt, one.dropouts, one.adversary)
    full = chosen.degree == len(members) - 1
    names = list(members)
    around = graph.neighbours(len(names), chosen.degree, seed)
    holders = {
        name: tuple(names[place] for place in (sorted((*near, own)) if full else near))
        for own, (name, near) in enumerate(zip(names, around, strict=True))
    }
    return Session(one, _digest("secagg session", opened, roster, reveals), members, holders, chosen.threshold)


def check_reveal(members: Mapping[str, Member], name: str, value: bytes) -> None:
    """Raises SecAggError unless `name` committed itself to `value`."""
    if name not in members or commitment(REVEAL, value) != members[name].advertisement.reveal_digest:
        raise SecAggError("what was revealed for the graph is not what was committed to", where=name)


def read_split(session: Session, sharers: Collection[str], raw: bytes) -> Split:
    """The survivors and the dropped, who together are the sharers, each of them once.

    Raises:
        SecAggError: somebody who is both or neither, or a stranger; or fewer survivors than may be summed.
        WireError: no survivors.
    """
    survivors, dropped = (frozenset(names) for names in decode_survivors(raw, len(session.members)))
    if both := survivors & dropped:
        raise SecAggError("said to be alive and said to have dropped out", where=min(both))
    if wrong := (survivors | dropped) ^ frozenset(sharers):
        raise SecAggError("survivors and dropped are not the clients who shared their secrets", where=min(wrong))
    if len(survivors) < session.open.minimum:
        raise SecAggError(f"{len(survivors)} survivors, and no sum of fewer than {session.open.minimum} may be opened")
    return Split(survivors, dropped)


def confirm(key: Ed25519PrivateKey, session: Session, survivors: bytes) -> bytes:
    """A member's signature that it was told of these survivors, in the bytes that came."""
    return identity.sign(key, CONFIRMATION, session.digest, survivors)


def check_confirmation(session: Session, survivors: bytes, name: str, signature: bytes) -> None:
    """Raises SecAggError unless the member `name` was told of the same survivors, in the same session."""
    key = session.members[name].identity
    _check_signature(key, signature, CONFIRMATION, [session.digest, survivors], name)


def input_label(session: Session, sharers: bytes, name: str) -> bytes:
    """What stands before a masked vector, `LABEL_BYTES`: whose it is, of which session, masked with whom."""
    return _digest("secagg input", session.digest, sharers, name.encode())


LABEL_BYTES: Final = DIGEST_BYTES


def _digest(domain: str, *parts: bytes) -> bytes:
    return hashlib.sha256(statement(domain, *parts)).digest()


def _check_signature(key: bytes, signature: bytes, domain: str, parts: list[bytes], name: str) -> None:
    try:
        identity.verify(Ed25519PublicKey.from_public_bytes(key), signature, domain, *parts)
    except (TrustError, ValueError):
        raise SecAggError(f"the signature on this {domain} does not hold", where=name) from None


def _no_repeats(what: str, values: Iterable[bytes]) -> None:
    seen: set[bytes] = set()
    for value in values:
        if value in seen:
            raise SecAggError(f"the roster has an {what} twice")
        seen.add(value)

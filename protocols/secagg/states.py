"""What a client knows in each state of a session, and how it answers the step that it waits for.

    Joining ─ADVERTISE▶ Advertised ─REVEAL▶ Revealed ─SHARE▶ Shared ─SUBMIT▶ Submitted ─CONFIRM▶ Confirmed ─UNMASK▶
                             └────────── SHARE ──────────────▲       on a full graph

Each record holds what its step needs and nothing else: the secrets of a client's masks are gone once its vector is
masked. `client.State` hands each of them out once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.protocols import identity
from farfield.protocols.errors import SecAggError

from . import boxes, fixedpoint, masks, shamir
from .masks import Words
from .messages import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Advertisement,
    Dealt,
    Open,
    Step,
    decode_confirmations,
    decode_inbox,
    decode_sharers,
    encode_advertisement,
    encode_confirmation,
    encode_reveal,
    encode_revelation,
    encode_shares,
)
from .session import (
    ADVERTISEMENT,
    REVEAL,
    SEED,
    Session,
    advertisement_parts,
    check_confirmation,
    confirm,
    input_label,
    read_open,
    read_roster,
    read_session,
    read_split,
    sparse,
)

Answer: TypeAlias = bytes | memoryview
Known: TypeAlias = "Joining | Advertised | Revealed | Shared | Submitted | Confirmed"


@dataclass(frozen=True)
class Terms:
    """What the owner of the data asks for; no coordinator can change it.

    Attributes:
        smallest_cohort: fewest clients on the roster, and, on a sparse graph, of those who stay for the sharing.
        smallest_survivors: what the session's own `minimum` must at least be.
        peers: raw Ed25519 key by name of all who may be on the roster; None for whomever the coordinator enrolled.
    """

    smallest_cohort: int
    smallest_survivors: int
    peers: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class Owner:
    """Whose side this is, and what it accepts. `expected` raises when an Open is not about what the owner knows."""

    name: str
    identity: Ed25519PrivateKey
    terms: Terms
    expected: Callable[[Open], None]

    def __repr__(self) -> str:
        return f"Owner({self.name!r})"


@final
@dataclass(frozen=True, repr=False)
class Joining:
    """Knows nothing yet."""

    @property
    def step(self) -> Step:
        return Step.ADVERTISE

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[Known, Answer]:
        _nothing(own)
        opened = read_open(common)
        terms = owner.terms
        if opened.clients < terms.smallest_cohort:
            raise SecAggError(
                f"{opened.clients} clients are asked, and this one takes part from {terms.smallest_cohort} on"
            )
        if opened.minimum < terms.smallest_survivors:
            raise SecAggError(
                f"a sum of {opened.minimum} may be opened, and this client asks for {terms.smallest_survivors} at least"
            )
        owner.expected(opened)
        box, mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        seed, reveal = secrets.token_bytes(shamir.SECRET_BYTES), secrets.token_bytes(KEY_BYTES)
        unsigned = Advertisement(
            owner.name,
            box.public_key().public_bytes_raw(),
            mask.public_key().public_bytes_raw(),
            boxes.commitment(SEED, seed),
            boxes.commitment(REVEAL, reveal),
            bytes(SIGNATURE_BYTES),
        )
        signature = identity.sign(owner.identity, ADVERTISEMENT, *advertisement_parts(common, unsigned))
        sent = encode_advertisement(replace(unsigned, signature=signature))
        return Advertised(common, sent, box.private_bytes_raw(), mask.private_bytes_raw(), seed, reveal), sent


@final
@dataclass(frozen=True, repr=False)
class Advertised:
    """Has sent its keys, and waits for everybody's.

    Attributes:
        sent: its advertisement.
        box, mask: its private keys.
        seed: of its own mask.
        reveal: its part in the randomness of the graph.
    """

    opened: bytes
    sent: bytes
    box: bytes
    mask: bytes
    seed: bytes
    reveal: bytes

    @property
    def step(self) -> Step:
        return Step.REVEAL if sparse(read_open(self.opened)) else Step.SHARE

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[Known, Answer]:
        _nothing(own)
        members = read_roster(self.opened, common)
        mine = members.get(owner.name)
        identity_key = owner.identity.public_key().public_bytes_raw()
        if mine is None or mine.identity != identity_key or encode_advertisement(mine.advertisement) != self.sent:
            raise SecAggError("the roster does not name this client as it advertised itself", where=owner.name)
        peers = owner.terms.peers
        if peers is not None:
            for name, member in members.items():
                if peers.get(name) != member.identity:
                    raise SecAggError(
                        "on the coordinator's roster, but not on the consortium's with this key",
                        where=name,
                        hint="The consortium must sign a new roster, or the coordinator leave this client out.",
                    )
        _enough(len(members), owner.terms)
        revealed = Revealed(self.opened, common, self.box, self.mask, self.seed)
        if self.step is Step.REVEAL:
            return revealed, encode_reveal(self.reveal)
        return revealed.share(owner, b"")


@final
@dataclass(frozen=True, repr=False)
class Revealed:
    """Knows everybody's keys; on a sparse graph, waits for the randomness that the neighbours come from."""

    opened: bytes
    roster: bytes
    box: bytes
    mask: bytes
    seed: bytes

    @property
    def step(self) -> Step:
        return Step.SHARE

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[Known, Answer]:
        _nothing(own)
        return self.share(owner, common)

    def share(self, owner: Owner, reveals: bytes) -> tuple[Known, Answer]:
        """Shares of both secrets for all holders, each pair in a box that only its holder can open."""
        session = read_session(self.opened, self.roster, reveals)
        if owner.name not in session.members:
            raise SecAggError("what this client revealed was left out", where=owner.name)
        _enough(len(session.members), owner.terms)
        holders = session.holders[owner.name]
        shares = zip(
            shamir.split(self.seed, session.threshold, len(holders)),
            shamir.split(self.mask, session.threshold, len(holders)),
            strict=True,
        )
        private = X25519PrivateKey.from_private_bytes(self.box)
        dealt, inbox_keys, kept = {}, {}, {}
        for holder, pair in zip(holders, shares, strict=True):
            box = b""
            if holder == owner.name:
                kept[holder] = pair
            else:
                secret = boxes.agree(private, session.members[holder].advertisement.box_key)
                key = boxes.box_key(secret, session.digest, owner.name, holder)
                inbox_keys[holder] = boxes.box_key(secret, session.digest, holder, owner.name)
                box = boxes.close_box(key, pair, session.digest, owner.name, holder)
            dealt[holder] = Dealt(box, *boxes.share_digests(pair, session.digest, owner.name, holder))
        seeds, keys = _unzipped(kept)
        after = Shared(self.opened, self.roster, reveals, self.mask, self.seed, inbox_keys, seeds, keys)
        return after, encode_shares(dealt)


@final
@dataclass(frozen=True, repr=False)
class Shared:
    """Has shared its secrets, and waits for those of its neighbours who did so too.

    Attributes:
        inbox_keys: by neighbour, what its box opens with.
        seeds, keys: its shares of its own seed and mask key, by its own name, where everybody holds shares of all.
    """

    opened: bytes
    roster: bytes
    reveals: bytes
    mask: bytes
    seed: bytes
    inbox_keys: Mapping[str, bytes]
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]

    @property
    def step(self) -> Step:
        return Step.SUBMIT

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[Known, Answer]:
        session = read_session(self.opened, self.roster, self.reveals)
        sharers = _sharers(session, owner, common)
        near = session.within(owner.name, sharers)
        neighbours = [name for name in near if name != owner.name]
        inbox = decode_inbox(own, len(session.members))
        if set(inbox) != set(neighbours):
            raise SecAggError(
                "the boxes are not those of the neighbours who shared", where=min(set(inbox) ^ set(neighbours))
            )
        held = {
            dealer: boxes.open_box(self.inbox_keys[dealer], box, session.digest, dealer, owner.name)
            for dealer, box in inbox.items()
        }
        masked = self._masked(session, owner, neighbours, vector, input_label(session, common, owner.name))
        seeds, keys = _unzipped(held)
        after = Submitted(
            self.opened, self.roster, self.reveals, common, {**self.seeds, **seeds}, {**self.keys, **keys}
        )
        return after, masked

    def _masked(
        self, session: Session, owner: Owner, neighbours: list[str], vector: Words | None, label: bytes
    ) -> memoryview:
        """The label, and the vector under its own mask and one for each neighbour, packed."""
        opened = session.open
        dtype = np.uint16 if opened.modulus_bits == 16 else np.uint32
        if vector is None or vector.dtype != dtype or vector.shape != (opened.length,):
            found = "no vector" if vector is None else f"a vector of {vector.shape} {vector.dtype}"
            raise SecAggError(f"{found}, where {opened.length} values of {dtype.__name__} are asked for")
        private = X25519PrivateKey.from_private_bytes(self.mask)
        plus = [boxes.own_key(self.seed, session.digest, owner.name)]
        minus: list[bytes] = []
        for name in neighbours:
            secret = boxes.agree(private, session.members[name].advertisement.mask_key)
            (plus if owner.name < name else minus).append(boxes.pair_key(secret, session.digest, owner.name, name))
        masks.add(vector, plus, minus)
        return fixedpoint.pack(vector, opened.modulus_bits, label)


@final
@dataclass(frozen=True, repr=False)
class Submitted:
    """Has sent its masked vector, and waits to be told whose were summed.

    Attributes:
        seeds, keys: its shares of its sharing neighbours' seeds and mask keys, by their names.
    """

    opened: bytes
    roster: bytes
    reveals: bytes
    sharers: bytes
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]

    @property
    def step(self) -> Step:
        return Step.CONFIRM

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[Known, Answer]:
        _nothing(own)
        session = read_session(self.opened, self.roster, self.reveals)
        survivors = _survivors(session, self.sharers, common)
        if owner.name not in survivors:
            raise SecAggError("this client is said to have dropped out, and has not", where=owner.name)
        _enough_holders(session, owner, survivors)
        after = Confirmed(self.opened, self.roster, self.reveals, self.sharers, common, self.seeds, self.keys)
        return after, encode_confirmation(confirm(owner.identity, session, common))


@final
@dataclass(frozen=True, repr=False)
class Confirmed:
    """Has signed who survived, and waits for its neighbours' signatures that they were told the same."""

    opened: bytes
    roster: bytes
    reveals: bytes
    sharers: bytes
    survivors: bytes
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]

    @property
    def step(self) -> Step:
        return Step.UNMASK

    def answer(self, owner: Owner, common: bytes, own: bytes, vector: Words | None) -> tuple[None, Answer]:
        _nothing(common)
        session = read_session(self.opened, self.roster, self.reveals)
        survivors = _survivors(session, self.sharers, self.survivors)
        near = session.within(owner.name, survivors)
        signatures = decode_confirmations(own, len(session.members))
        for name, signature in signatures.items():
            if name not in near:
                raise SecAggError("a confirmation by nobody who holds this client's shares and survived", where=name)
            check_confirmation(session, self.survivors, name, signature)
        _enough_holders(session, owner, signatures)
        shares = {name: share if name in survivors else self.keys[name] for name, share in self.seeds.items()}
        return None, encode_revelation(shares)


def _nothing(part: bytes) -> None:
    if part:
        raise SecAggError(f"{len(part)} bytes that belong to no part of this step")


def _enough(members: int, terms: Terms) -> None:
    if members < terms.smallest_cohort:
        raise SecAggError(f"{members} clients take part, and this one asks for {terms.smallest_cohort} at least")


def _sharers(session: Session, owner: Owner, raw: bytes) -> frozenset[str]:
    """Those who shared their secrets: members, this client, and enough others."""
    sharers = frozenset(decode_sharers(raw, len(session.members)))
    if strangers := sharers - session.members.keys():
        raise SecAggError("said to have shared, and is no member", where=min(strangers))
    if owner.name not in sharers:
        raise SecAggError("the shares of this client were left out", where=owner.name)
    if len(sharers) < session.open.minimum:
        raise SecAggError(f"{len(sharers)} clients shared, too few for a sum of {session.open.minimum} or more")
    _enough_holders(session, owner, sharers)
    return sharers


def _survivors(session: Session, sharers: bytes, split: bytes) -> frozenset[str]:
    """Whose vectors were summed, of those who shared."""
    return read_split(session, decode_sharers(sharers, len(session.members)), split).survivors


def _enough_holders(session: Session, owner: Owner, names: Collection[str]) -> None:
    found = len(session.within(owner.name, names))
    if found < session.threshold:
        raise SecAggError(f"{found} of this client's holders are left, and {session.threshold} are needed")


def _unzipped(pairs: Mapping[str, tuple[bytes, bytes]]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

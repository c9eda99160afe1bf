"""What each step asks of the clients, how an answer to it is checked, and what comes of the answers.

    Advertising ─▶ (Revealing) ─▶ Sharing ─▶ Submitting ─▶ Confirming ─▶ Unmasking ─▶ Sum

Masked vectors are summed as they arrive, so the server holds one vector and not one for each client.

A client can spoil a session by what it deals or submits, as it can by submitting nonsense; it cannot make a sum come
out wrong by what it reveals. Every dealer commits itself to its seed and to each share, and its mask key has a public
half: a revealed share that is not the one that was dealt is left out, and a secret that is not the one that was
committed to is refused with the dealer's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.protocols.errors import SecAggError

from . import boxes, fixedpoint, masks, shamir
from .masks import Words
from .messages import (
    Advertisement,
    Dealt,
    Step,
    decode_advertisement,
    decode_confirmation,
    decode_open,
    decode_reveal,
    decode_revelation,
    decode_shares,
    encode_confirmations,
    encode_inbox,
    encode_reveals,
    encode_roster,
    encode_sharers,
    encode_survivors,
)
from .session import (
    LABEL_BYTES,
    SEED,
    Member,
    Session,
    check_advertisement,
    check_confirmation,
    check_reveal,
    input_label,
    read_roster,
    read_session,
    sparse,
)

Answer: TypeAlias = bytes | memoryview
T = TypeVar("T")


@final
@dataclass(frozen=True)
class Sum:
    """What a session comes to.

    Attributes:
        total: sum of the vectors of `clients`, modulo 2 to the power that the Open names.
        clients: whose vectors are in it, in ascending order.
        disputed: holder and dealer of each revealed share that is not the one that was dealt. One of the two lies.
    """

    total: Words
    clients: tuple[str, ...]
    disputed: tuple[tuple[str, str], ...]


class Record(Protocol[T]):
    """One step: whom it asks what, how it reads an answer, and what follows."""

    @property
    def step(self) -> Step: ...

    @property
    def clients(self) -> Sequence[str]: ...

    @property
    def common(self) -> bytes: ...

    def own(self, client: str) -> bytes: ...

    def read(self, client: str, answer: Answer) -> T:
        """What the answer says. Raises WireError and changes nothing when it is wrong."""
        ...

    def close(self, answers: Mapping[str, T]) -> Record[T] | Sum: ...


@final
@dataclass(frozen=True)
class Advertising:
    """Asks everybody for keys."""

    opened: bytes
    identities: Mapping[str, bytes]

    @property
    def step(self) -> Step:
        return Step.ADVERTISE

    @property
    def clients(self) -> Sequence[str]:
        return list(self.identities)

    @property
    def common(self) -> bytes:
        return self.opened

    def own(self, client: str) -> bytes:
        return b""

    def read(self, client: str, answer: Answer) -> Advertisement:
        one = decode_advertisement(bytes(answer))
        if one.name != client:
            raise SecAggError(f"advertises the keys of {one.name!r}", where=client)
        check_advertisement(self.opened, one, self.identities[client])
        return one

    def close(self, answers: Mapping[str, Advertisement]) -> Revealing | Sharing:
        roster = encode_roster((self.identities[name], one) for name, one in sorted(answers.items()))
        members = read_roster(self.opened, roster)
        if sparse(decode_open(self.opened)):
            return Revealing(self.opened, roster, members)
        return Sharing(read_session(self.opened, roster, b""), roster)


@final
@dataclass(frozen=True)
class Revealing:
    """Asks all on the roster for the randomness that they committed themselves to."""

    opened: bytes
    roster: bytes
    members: Mapping[str, Member]

    @property
    def step(self) -> Step:
        return Step.REVEAL

    @property
    def clients(self) -> Sequence[str]:
        return list(self.members)

    @property
    def common(self) -> bytes:
        return self.roster

    def own(self, client: str) -> bytes:
        return b""

    def read(self, client: str, answer: Answer) -> bytes:
        value = decode_reveal(bytes(answer))
        check_reveal(self.members, client, value)
        return value

    def close(self, answers: Mapping[str, bytes]) -> Sharing:
        reveals = encode_reveals(answers)
        return Sharing(read_session(self.opened, self.roster, reveals), reveals)


@final
@dataclass(frozen=True)
class Sharing:
    """Asks every member for shares of its secrets.

    Attributes:
        common: the roster; on a sparse graph, whose members have it already, the reveals.
    """

    session: Session
    common: bytes

    @property
    def step(self) -> Step:
        return Step.SHARE

    @property
    def clients(self) -> Sequence[str]:
        return list(self.session.members)

    def own(self, client: str) -> bytes:
        return b""

    def read(self, client: str, answer: Answer) -> Mapping[str, Dealt]:
        holders = self.session.holders[client]
        dealt = decode_shares(bytes(answer), len(holders))
        if tuple(dealt) != holders:
            raise SecAggError("the shares are not for the holders of its secrets", where=client)
        for holder, one in dealt.items():
            if len(one.box) != (0 if holder == client else boxes.BOX_BYTES):
                raise SecAggError(f"a box of {len(one.box)} bytes", where=client)
        return dealt

    def close(self, answers: Mapping[str, Mapping[str, Dealt]]) -> Submitting:
        dealt = dict(answers)
        # Whoever has too few holders would give up, and by that leave others with too few.
        while lonely := [name for name in dealt if len(self.session.within(name, dealt)) < self.session.threshold]:
            for name in lonely:
                del dealt[name]
        _check_number(self.session, len(dealt))
        return Submitting(
            self.session,
            dealt,
            encode_sharers(dealt),
            fixedpoint.zeros(self.session.open.length, self.session.open.modulus_bits),
        )


@final
@dataclass(frozen=True)
class Submitting:
    """Asks the sharers for their masked vectors.

    Attributes:
        dealt: by dealer, and then by holder.
        common: the sharers.
        total: the masked vectors that have come, summed.
    """

    session: Session
    dealt: Mapping[str, Mapping[str, Dealt]]
    common: bytes
    total: Words

    @property
    def step(self) -> Step:
        return Step.SUBMIT

    @property
    def clients(self) -> Sequence[str]:
        return list(self.dealt)

    def own(self, client: str) -> bytes:
        near = self.session.within(client, self.dealt)
        return encode_inbox({dealer: self.dealt[dealer][client].box for dealer in near if dealer != client})

    def read(self, client: str, answer: Answer) -> None:
        view = memoryview(answer)
        if view[:LABEL_BYTES] != input_label(self.session, self.common, client):
            raise SecAggError("a masked vector of another session, other masks or another client", where=client)
        fixedpoint.accumulate(self.total, view[LABEL_BYTES:], self.session.open.modulus_bits)

    def close(self, answers: Mapping[str, None]) -> Confirming:
        survivors = frozenset(answers)
        _check_number(self.session, len(survivors))
        _check_holders(self.session, self.dealt, survivors)
        return Confirming(
            self.session,
            self.dealt,
            survivors,
            encode_survivors(survivors, self.dealt.keys() - survivors),
            self.total,
        )


@final
@dataclass(frozen=True)
class Confirming:
    """Asks the survivors to sign who survived.

    Attributes:
        common: survivors and dropped.
    """

    session: Session
    dealt: Mapping[str, Mapping[str, Dealt]]
    survivors: frozenset[str]
    common: bytes
    total: Words

    @property
    def step(self) -> Step:
        return Step.CONFIRM

    @property
    def clients(self) -> Sequence[str]:
        return list(self.survivors)

    def own(self, client: str) -> bytes:
        return b""

    def read(self, client: str, answer: Answer) -> bytes:
        signature = decode_confirmation(bytes(answer))
        check_confirmation(self.session, self.common, client, signature)
        return signature

    def close(self, answers: Mapping[str, bytes]) -> Unmasking:
        _check_holders(self.session, self.dealt, answers)
        return Unmasking(self.session, self.dealt, self.survivors, answers, self.total)


@final
@dataclass(frozen=True)
class Unmasking:
    """Asks those who confirmed for shares: of the survivors' seeds and of the mask keys of those who dropped out.

    Attributes:
        signatures: by name of those who confirmed.
    """

    session: Session
    dealt: Mapping[str, Mapping[str, Dealt]]
    survivors: frozenset[str]
    signatures: Mapping[str, bytes]
    total: Words

    @property
    def step(self) -> Step:
        return Step.UNMASK

    @property
    def clients(self) -> Sequence[str]:
        return list(self.signatures)

    @property
    def common(self) -> bytes:
        return b""

    def own(self, client: str) -> bytes:
        near = self.session.within(client, self.signatures)
        return encode_confirmations({name: self.signatures[name] for name in near})

    def read(self, client: str, answer: Answer) -> Mapping[str, bytes]:
        dealers = self.session.within(client, self.dealt)
        shares = decode_revelation(bytes(answer), len(dealers))
        if tuple(shares) != dealers:
            raise SecAggError("the shares are not of the secrets that it holds shares of", where=client)
        return shares

    def close(self, answers: Mapping[str, Mapping[str, bytes]]) -> Sum:
        shares, disputed = self._sorted_out(answers)
        opened = dict(zip(shares, _combined(shares, self.session.threshold), strict=True))
        plus, minus = [], []
        for dealer, secret in opened.items():
            if dealer in self.survivors:
                minus.append(self._own_mask(dealer, secret))
            else:
                added, removed = self._left_over(dealer, secret)
                plus += added
                minus += removed
        masks.add(self.total, plus, minus)
        if self.session.open.modulus_bits == 24:
            np.bitwise_and(self.total, 0xFFFFFF, out=self.total)
        return Sum(self.total, tuple(sorted(self.survivors)), disputed)

    def _sorted_out(
        self, answers: Mapping[str, Mapping[str, bytes]]
    ) -> tuple[dict[str, dict[int, bytes]], tuple[tuple[str, str], ...]]:
        """By dealer, `threshold` shares that are those that it dealt, each by its holder's place; and the others."""
        shares: dict[str, dict[int, bytes]] = {}
        disputed = []
        for dealer, dealt in self.dealt.items():
            found = shares[dealer] = {}
            for place, (holder, promised) in enumerate(dealt.items(), start=1):
                share = answers.get(holder, {}).get(dealer)
                if share is None:
                    continue
                if not self._promised(promised, share, dealer, holder):
                    disputed.append((holder, dealer))
                elif len(found) < self.session.threshold:
                    found[place] = share
            if len(found) < self.session.threshold:
                raise SecAggError(
                    f"{len(found)} good shares of its secret, and {self.session.threshold} are needed", where=dealer
                )
        return shares, tuple(disputed)

    def _promised(self, promised: Dealt, share: bytes, dealer: str, holder: str) -> bool:
        digests = boxes.share_digests((share, share), self.session.digest, dealer, holder)
        return digests[0] == promised.seed_digest if dealer in self.survivors else digests[1] == promised.key_digest

    def _own_mask(self, name: str, seed: bytes) -> bytes:
        if boxes.commitment(SEED, seed) != self.session.members[name].advertisement.seed_digest:
            raise _false(name)
        return boxes.own_key(seed, self.session.digest, name)

    def _left_over(self, name: str, secret: bytes) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks that survivors put on for a client that dropped out: to be added, and to be taken off."""
        private = X25519PrivateKey.from_private_bytes(secret)
        if private.public_key().public_bytes_raw() != self.session.members[name].advertisement.mask_key:
            raise _false(name)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for other in self.session.within(name, self.survivors):
            agreed = boxes.agree(private, self.session.members[other].advertisement.mask_key)
            (minus if other < name else plus).append(boxes.pair_key(agreed, self.session.digest, name, other))
        return plus, minus


def _combined(shares: Mapping[str, Mapping[int, bytes]], threshold: int) -> list[bytes]:
    try:
        return shamir.combine_all(list(shares.values()), threshold)
    except SecAggError:
        for dealer, held in shares.items():
            try:
                shamir.combine(held, threshold)
            except SecAggError:
                raise _false(dealer) from None
        raise


def _false(dealer: str) -> SecAggError:
    return SecAggError(
        "the shares that this client dealt do not give the secret that it committed itself to",
        where=dealer,
        hint="Leave it out of the next session.",
    )


def _check_number(session: Session, clients: int) -> None:
    if clients < session.open.minimum:
        raise SecAggError(f"{clients} clients are left, too few for a sum of {session.open.minimum} or more")


def _check_holders(session: Session, dealers: Collection[str], alive: Collection[str]) -> None:
    for dealer in dealers:
        if (left := len(session.within(dealer, alive))) < session.threshold:
            raise SecAggError(
                f"{left} holders of its secrets are left, too few to open them: {session.threshold} are needed",
                where=dealer,
            )

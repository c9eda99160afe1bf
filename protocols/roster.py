"""The roster of a consortium: the nodes that belong to it, with their signing keys, signed by the consortium.

A coordinator certifies nodes itself, so it could invent some. In a secure sum it knows what those have added, and takes
that off again until one real client is left. A client whose owner named the consortium's key adds to sums of those
nodes alone that a roster of this key lists. See docs/security.md.

A signed roster is one line of canonical JSON, so it has one spelling and any change to a byte of it is found.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Final, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from . import identity
from .complaints import complaint
from .errors import EnrolmentError, TrustError

MOST_BYTES: Final = 1 << 18
"""Of a signed roster: about 2,000 nodes. It travels with every task, within the limit of a task's head."""

_DOMAIN: Final = "roster"
_COMPLAINT_CHARS: Final = 300


def _unhexed(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"([0-9a-f]{2})*", value):
        raise ValueError("not lower-case hexadecimal digits")
    return bytes.fromhex(value)


def _node(name: str) -> str:
    try:
        return identity.check_name(name)
    except EnrolmentError as error:
        raise ValueError(error.what) from None


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not one line of text")
    return text


_Hex = (BeforeValidator(_unhexed), PlainSerializer(bytes.hex))
_Key = Annotated[bytes, Field(min_length=32, max_length=32), *_Hex]
_Signature = Annotated[bytes, Field(min_length=64, max_length=64), *_Hex]
_Moment = Annotated[AwareDatetime, Field(strict=False)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def canonical(self) -> bytes:
        """Sorted, compact UTF-8 JSON with every default written out."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()


class Roster(_Document):
    """Who belongs to a consortium.

    Attributes:
        consortium: what it calls itself, for people.
        issued: when it was drawn up, for people: a later roster does not undo an earlier one, only `expires` does.
        expires: from when on it is worth nothing; None for never.
        members: raw Ed25519 key by node, no key twice.
    """

    version: Literal[1] = 1
    consortium: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
    issued: _Moment
    expires: _Moment | None = None
    members: Annotated[dict[Annotated[str, AfterValidator(_node)], _Key], Field(min_length=1)]

    @model_validator(mode="after")
    def _nobody_twice(self) -> Self:
        nodes: dict[bytes, str] = {}
        for name, key in self.members.items():
            if key in nodes:
                raise ValueError(f"{nodes[key]!r} and {name!r} have the same key, and one node would count twice")
            nodes[key] = name
        return self


class _Signed(_Document):
    roster: Roster
    key: _Key
    signature: _Signature


def draw_up(consortium: str, members: object, issued: datetime, expires: datetime | None) -> Roster:
    """The roster of these members: a mapping from names to keys, raw or hexadecimal, that may come from a file.

    Raises:
        TrustError: names the first thing that is wrong.
    """
    document = {"consortium": consortium, "members": members, "issued": issued, "expires": expires}
    try:
        return Roster.model_validate(document)
    except ValidationError as error:
        raise _malformed(error) from None


def sign(roster: Roster, key: Ed25519PrivateKey) -> bytes:
    """The signed roster.

    Raises:
        TrustError: it is too large for anyone to accept.
    """
    public = key.public_key().public_bytes_raw()
    signature = identity.sign(key, _DOMAIN, roster.canonical())
    raw = _Signed(roster=roster, key=public, signature=signature).canonical()
    _check_size(raw)
    return raw


def open_roster(raw: bytes, key: bytes, now: datetime) -> Roster:
    """The roster in `raw`, if it was signed with `key` (raw Ed25519 public key, 32 bytes) and has not expired at `now`.

    `now` has a time zone, and is best taken from a clock that no coordinator sets.

    Raises:
        TrustError: too large, malformed, signed with another key, altered, or expired.
    """
    signed = _read(raw)
    if signed.key != key:
        raise TrustError(
            f"signed with the key {signed.key.hex()}, and not with {key.hex()}, which is trusted",
            where=_WHERE,
            hint="It is another consortium's, or the consortium has a new key; ask its people, not the coordinator.",
        )
    try:
        identity.verify(Ed25519PublicKey.from_public_bytes(key), signed.signature, _DOMAIN, signed.roster.canonical())
    except TrustError:
        raise TrustError(
            "altered after it was signed, or never signed with the key that it names", where=_WHERE
        ) from None
    expires = signed.roster.expires
    if expires is not None and now >= expires:
        raise TrustError(
            f"expired at {expires:%Y-%m-%d %H:%M}, and this machine's clock says {now:%Y-%m-%d %H:%M}",
            where=_WHERE,
            hint="The consortium signs a new one, and the coordinator installs it with `coordinator roster install`.",
        )
    return signed.roster


def stated_key(raw: bytes) -> bytes:
    """The public key that a signed roster names as its own, which proves nothing yet.

    Raises:
        TrustError: too large or malformed.
    """
    return _read(raw).key


_WHERE: Final = "the consortium's roster"


def _read(raw: bytes) -> _Signed:
    _check_size(raw)
    try:
        signed = _Signed.model_validate(json.loads(raw))
        whole = signed.canonical() == raw
    except ValidationError as error:
        raise _malformed(error) from None
    except (ValueError, RecursionError):
        raise TrustError("malformed: not JSON", where=_WHERE) from None
    if not whole:
        raise TrustError("malformed: spelled differently than it was signed", where=_WHERE)
    return signed


def _check_size(raw: bytes) -> None:
    if len(raw) > MOST_BYTES:
        raise TrustError(f"too large: {len(raw):,} bytes, and {MOST_BYTES:,} are allowed", where=_WHERE)


def _malformed(error: ValidationError) -> TrustError:
    """The first complaint, as one short line: what it quotes may come from anywhere."""
    what, hint = complaint(error, lambda path: (Roster if path[:1] == ["roster"] else _Signed).model_fields)
    line = "".join(one if one.isprintable() else "?" for one in what)
    short = line if len(line) <= _COMPLAINT_CHARS else f"{line[:_COMPLAINT_CHARS]}…"
    return TrustError(f"malformed: {short}", where=_WHERE, hint=hint)

"""A roster is believed whole, from the right key, in time, or not at all."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols import identity
from farfield.protocols.errors import TrustError
from farfield.protocols.roster import MOST_BYTES, Roster, draw_up, open_roster, sign, stated_key

NOW = datetime(2031, 5, 6, 12, tzinfo=UTC)
KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC, OTHERS = (key.public_key().public_bytes_raw() for key in (KEY, OTHER))
MEMBERS = {"clinic-a": b"a" * 32, "clinic-b": b"b" * 32}
ROSTER = draw_up("Clinics of the north", MEMBERS, NOW - timedelta(days=1), NOW + timedelta(days=1))
SIGNED = sign(ROSTER, KEY)

zones = st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours)))
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=zones)
members = st.dictionaries(
    st.from_regex(identity.NAME, fullmatch=True), st.binary(min_size=32, max_size=32), min_size=1, max_size=5
).filter(lambda found: len(set(found.values())) == len(found))
texts = st.text(min_size=1, max_size=200).filter(str.isprintable)


def refusal(raw: bytes, key: bytes = PUBLIC, now: datetime = NOW) -> str:
    with pytest.raises(TrustError) as caught:
        open_roster(raw, key, now)
    assert str(caught.value).startswith("the consortium's roster: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    return str(caught.value)


def forged(**changes: Any) -> bytes:
    """The roster with other values, canonical, and signed by the right key over just these bytes."""
    document = json.loads(SIGNED)
    document["roster"] = {name: value for name, value in (document["roster"] | changes).items() if value is not ...}
    content = canonical(document["roster"])
    document["signature"] = KEY.sign(identity.statement("roster", content)).hex()
    return canonical(document)


def canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@given(texts, members, moments, st.one_of(st.none(), moments))
def test_what_was_signed_is_what_is_opened(
    consortium: str, found: dict[str, bytes], issued: datetime, expires: datetime | None
) -> None:
    drawn = draw_up(consortium, found, issued, expires)
    raw = sign(drawn, KEY)
    assert open_roster(raw, PUBLIC, datetime(1999, 1, 1, tzinfo=UTC)) == drawn
    assert (dict(drawn.members), drawn.issued, drawn.expires) == (found, issued, expires)
    assert stated_key(raw) == PUBLIC


def test_keys_may_be_spelled_as_a_file_spells_them() -> None:
    assert draw_up("c", {"a": "0f" * 32}, NOW, None).members == {"a": b"\x0f" * 32}
    assert forged() == SIGNED


def test_another_key_is_named() -> None:
    said = refusal(SIGNED, OTHERS)
    assert f"signed with the key {PUBLIC.hex()}, and not with {OTHERS.hex()}, which is trusted" in said
    assert "ask its people, not the coordinator" in said


def test_the_right_key_cannot_be_claimed() -> None:
    """As a coordinator would that adds a node of its own."""
    own = draw_up("Clinics of the north", MEMBERS | {"invented": b"i" * 32}, NOW, None)
    claimed = json.loads(sign(own, OTHER)) | {"key": PUBLIC.hex()}
    assert "altered after it was signed, or never signed with the key that it names" in refusal(canonical(claimed))


def test_a_signature_for_another_purpose_is_worth_nothing() -> None:
    document = json.loads(SIGNED)
    document["signature"] = identity.sign(KEY, "charter", ROSTER.canonical()).hex()
    assert "altered after it was signed" in refusal(canonical(document))


@settings(max_examples=200)
@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_no_byte_can_be_altered(position: int, change: int) -> None:
    refusal(SIGNED[:position] + bytes([SIGNED[position] ^ change]) + SIGNED[position + 1 :])


@given(st.integers(0, len(SIGNED) - 1), st.binary(max_size=3))
def test_nothing_can_be_cut_off_or_added(position: int, added: bytes) -> None:
    refusal(SIGNED[:position] + added)
    for around in (b" ", b"\n", b"\0", SIGNED):
        refusal(SIGNED + around)
        refusal(around + SIGNED)


@given(st.binary(max_size=200))
def test_what_is_no_roster_is_refused_and_nothing_else_happens(raw: bytes) -> None:
    assert "malformed" in refusal(raw)
    with pytest.raises(TrustError):
        stated_key(raw)


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"9" * 10_000, b"null", b"[]", b"1e999", b'"\\ud800"', b"{}"])
def test_json_that_parsers_stumble_over(raw: bytes) -> None:
    assert "malformed" in refusal(raw)


def test_size_is_looked_at_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farfield.protocols.roster.json.loads", lambda raw: pytest.fail("parsed"))
    assert f"too large: {MOST_BYTES + 1:,} bytes, and {MOST_BYTES:,} are allowed" in refusal(b"{" * (MOST_BYTES + 1))


def test_a_roster_that_nobody_would_accept_is_not_signed() -> None:
    def of(count: int) -> Roster:
        return draw_up("c", {f"{node:064}": node.to_bytes(32, "big") for node in range(count)}, NOW, None)

    assert len(open_roster(sign(of(1900), KEY), PUBLIC, NOW).members) == 1900
    with pytest.raises(TrustError, match="too large"):
        sign(of(2000), KEY)


def test_it_expires_at_the_moment_that_it_names() -> None:
    assert ROSTER.expires is not None
    assert open_roster(SIGNED, PUBLIC, ROSTER.expires - timedelta(microseconds=1)) == ROSTER
    said = refusal(SIGNED, now=ROSTER.expires)
    assert "expired at 2031-05-07 12:00, and this machine's clock says 2031-05-07 12:00" in said
    lasting = sign(draw_up("c", MEMBERS, NOW, None), KEY)
    assert open_roster(lasting, PUBLIC, datetime(9999, 1, 1, tzinfo=UTC)).members == MEMBERS


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "roster.version = 2 is not one of 1"),
    "unknown key": ({"expire": None}, "unknown key 'roster.expire'. Did you mean 'expires'?"),
    "missing": ({"issued": ...}, "'roster.issued' is missing"),
    "default left out": ({"expires": ...}, "spelled differently than it was signed"),
    "time as a number": ({"issued": 1_900_000_000}, "spelled differently than it was signed"),
    "no time zone": ({"issued": "2031-05-06T12:00:00"}, "roster.issued = '2031-05-06T12:00:00'"),
    "nobody": ({"members": {}}, "roster.members = {}"),
    "a list": ({"members": ["a"]}, "roster.members = ['a']"),
    "name": ({"members": {"a b\x1b[31m": "00" * 32}}, "is no name for a node"),
    "short key": ({"members": {"a": "00" * 31}}, "roster.members.a = "),
    "capitals": ({"members": {"a": "AB" * 32}}, "roster.members.a: not lower-case hexadecimal digits"),
    "no text": ({"members": {"a": 7}}, "roster.members.a = 7"),
    "long": ({"members": {"a": "x" * 100_000}}, "not lower-case hexadecimal digits"),
    "twice": ({"members": {"a": "00" * 32, "b": "00" * 32}}, "roster: 'a' and 'b' have the same key"),
    "lines": ({"consortium": "a\nb"}, "roster.consortium: not one line of text"),
    "no name": ({"consortium": ""}, "roster.consortium = ''"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_even_the_right_key_signs_no_nonsense(case: str) -> None:
    changes, said = MALFORMED[case]
    assert said in refusal(forged(**changes))


@pytest.mark.parametrize("members", [None, [], {}, {"a": "zz"}, {"a b": "00" * 32}, {"a": b"short"}, {1: "00" * 32}])
def test_what_is_no_list_of_members_is_not_drawn_up(members: object) -> None:
    with pytest.raises(TrustError, match="malformed: "):
        draw_up("c", members, NOW, None)

"""The messages of a secure aggregation come as they were sent, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_session import OPEN

from farfield.protocols import identity
from farfield.protocols import secagg_pb2 as pb
from farfield.protocols.errors import MalformedMessage, MessageTooLarge, UnknownVersion, WireError
from farfield.protocols.secagg import messages as m
from farfield.protocols.secagg.shamir import SHARE_BYTES

MOST = 5

names: st.SearchStrategy[str] = st.from_regex(identity.NAME.pattern, fullmatch=True)
sets = st.frozensets(names, max_size=MOST)
keys, signatures, shares = (st.binary(min_size=size, max_size=size) for size in (32, 64, SHARE_BYTES))
advertisements = st.builds(m.Advertisement, names, keys, keys, keys, keys, signatures)
opens = st.builds(
    m.Open,
    session=keys,
    run=st.text(max_size=20),
    round=st.integers(0, 2**32 - 1),
    context=keys,
    clients=st.integers(3, 2**16),
    modulus_bits=st.sampled_from((16, 24, 32)),
    length=st.integers(1, 2**30),
    minimum=st.integers(2, 3),
    corrupt=st.floats(0, 1, exclude_max=True),
    dropouts=st.floats(0, 1, exclude_max=True),
    adversary=st.sampled_from(("curious", "semi-malicious")),
)


def of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(names, values, max_size=MOST)


DECODERS: dict[str, Callable[[bytes], object]] = {
    "open": m.decode_open,
    "advertisement": m.decode_advertisement,
    "roster": lambda raw: m.decode_roster(raw, MOST),
    "reveal": m.decode_reveal,
    "reveals": lambda raw: m.decode_reveals(raw, MOST),
    "shares": lambda raw: m.decode_shares(raw, MOST),
    "sharers": lambda raw: m.decode_sharers(raw, MOST),
    "inbox": lambda raw: m.decode_inbox(raw, MOST),
    "survivors": lambda raw: m.decode_survivors(raw, MOST),
    "confirmation": m.decode_confirmation,
    "confirmations": lambda raw: m.decode_confirmations(raw, MOST),
    "revelation": lambda raw: m.decode_revelation(raw, MOST),
}


@given(opens, advertisements, keys, signatures)
def test_what_has_one_of_each_field_comes_as_it_was(
    opened: m.Open, one: m.Advertisement, reveal: bytes, signature: bytes
) -> None:
    assert m.decode_open(m.encode_open(opened)) == opened
    assert m.decode_advertisement(m.encode_advertisement(one)) == one
    assert m.decode_reveal(m.encode_reveal(reveal)) == reveal
    assert m.decode_confirmation(m.encode_confirmation(signature)) == signature


@given(of(keys), of(st.binary(max_size=200)), of(signatures), of(shares))
def test_values_by_name_come_as_they_were(
    reveals: dict[str, bytes], inbox: dict[str, bytes], confirmed: dict[str, bytes], revealed: dict[str, bytes]
) -> None:
    assert m.decode_reveals(m.encode_reveals(reveals), MOST) == reveals
    assert m.decode_inbox(m.encode_inbox(inbox), MOST) == inbox
    assert m.decode_confirmations(m.encode_confirmations(confirmed), MOST) == confirmed
    assert m.decode_revelation(m.encode_revelation(revealed), MOST) == revealed


@given(of(st.builds(m.Dealt, st.binary(max_size=200), keys, keys)), sets, sets, of(st.tuples(keys, advertisements)))
def test_rosters_shares_and_names_come_in_order(
    dealt: dict[str, m.Dealt],
    some: frozenset[str],
    others: frozenset[str],
    roster: dict[str, tuple[bytes, m.Advertisement]],
) -> None:
    assert m.decode_shares(m.encode_shares(dealt), MOST) == dealt
    assert m.decode_sharers(m.encode_sharers(some), MOST) == tuple(sorted(some))
    assert m.decode_survivors(m.encode_survivors(some, others), MOST) == (tuple(sorted(some)), tuple(sorted(others)))
    members = [(key, replace(one, name=name)) for name, (key, one) in sorted(roster.items())]
    assert m.decode_roster(m.encode_roster(members), MOST) == members


@pytest.mark.parametrize("kind", DECODERS)
@given(raw=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_wire_errors(kind: str, raw: bytes) -> None:
    try:
        DECODERS[kind](raw)
    except WireError:
        return
    assert raw[:2] == bytes([8, 1]), "only a message of this version may be read"


@pytest.mark.parametrize("kind", DECODERS)
def test_the_version_and_the_size_come_first(kind: str) -> None:
    with pytest.raises(UnknownVersion, match="wire version 2"):
        DECODERS[kind](bytes([8, 2]))
    with pytest.raises(MessageTooLarge):
        DECODERS[kind](bytes(100_000))


@pytest.mark.parametrize("kind", DECODERS)
def test_unknown_fields_are_refused(kind: str) -> None:
    with pytest.raises(MalformedMessage, match="unknown fields"):
        DECODERS[kind](bytes([8, 1, 0xA0, 6, 1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", b"short"),
        ("context", b""),
        ("clients", 2),
        ("clients", 2**16 + 1),
        ("modulus_bits", 20),
        ("length", 0),
        ("length", 2**30 + 1),
        ("minimum", 1),
        ("minimum", OPEN.clients + 1),
        ("corrupt", float("nan")),
        ("corrupt", 1.0),
        ("dropouts", -0.1),
        ("dropouts", float("inf")),
        ("adversary", "honest"),
    ],
)
def test_an_open_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    with pytest.raises(MalformedMessage):
        m.decode_open(m.encode_open(replace(OPEN, **{field: value})))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [["b", "a"], ["a", "a"], ["", "a"], ["a", "é"], ["a", "b/c"], ["a", "b" * 65]])
def test_names_out_of_order_twice_or_impossible_are_refused(wrong: list[str]) -> None:
    values = [pb.Named(name=name, value=bytes(32)) for name in wrong]
    for raw, decode in [
        (pb.Sharers(version=1, names=wrong), m.decode_sharers),
        (pb.Survivors(version=1, dropped=wrong), m.decode_survivors),
        (pb.Reveals(version=1, reveals=values), m.decode_reveals),
        (pb.Inbox(version=1, boxes=values), m.decode_inbox),
        (pb.Shares(version=1, dealt=[pb.Dealt(holder=name) for name in wrong]), m.decode_shares),
    ]:
        with pytest.raises(MalformedMessage, match="name"):
            decode(raw.SerializeToString(), MOST)


def test_more_names_than_there_are_clients_are_refused() -> None:
    raw = m.encode_sharers("abc")
    assert m.decode_sharers(raw, 3) == ("a", "b", "c")
    with pytest.raises(MalformedMessage, match="3 names"):
        m.decode_sharers(raw, 2)


def test_an_advertisement_on_a_roster_has_the_same_version() -> None:
    one = pb.Advertisement(version=2, name="a")
    raw = pb.Roster(version=1, members=[pb.Member(identity=bytes(32), advertisement=one)]).SerializeToString()
    with pytest.raises(MalformedMessage, match="version 2"):
        m.decode_roster(raw, 1)

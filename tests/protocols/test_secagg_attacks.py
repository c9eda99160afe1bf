"""A server that does not keep to the protocol: each time the client gives up, and has given nothing away.

Every test brings honest clients to a step, plays the server's part by hand, and looks at what a client does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_session import OPEN, TERMS, Federation, accept, federation, public_keys

from farfield.protocols import identity
from farfield.protocols.errors import SecAggError, WireError
from farfield.protocols.secagg import Open, Step, Terms, begin, boxes, encode_open, masks
from farfield.protocols.secagg.messages import (
    Advertisement,
    decode_advertisement,
    decode_confirmation,
    decode_inbox,
    decode_reveals,
    decode_roster,
    encode_confirmations,
    encode_inbox,
    encode_reveals,
    encode_roster,
    encode_sharers,
    encode_survivors,
)
from farfield.protocols.secagg.session import ADVERTISEMENT, advertisement_parts, read_session
from farfield.protocols.secagg.shamir import SHARE_BYTES

VICTIM = "client-0002"
OTHER = "client-0003"

Roster = Mapping[str, tuple[bytes, Advertisement]]


def at(step: Step, clients: int = 5, opened: Open = OPEN, terms: Terms = TERMS) -> Federation:
    run = federation(clients, opened, terms)
    run.until(step)
    return run


def refuses(run: Federation, match: str, common: bytes, own: bytes = b"", victim: str = VICTIM) -> None:
    """The victim refuses what it is told, has not touched its vector, and answers nothing any more."""
    state, vector = run.states[victim], run.vectors[victim]
    assert state is not None
    before = vector.copy()
    with pytest.raises(WireError, match=match):
        state.answer(common, own, vector)
    assert (vector == before).all()
    with pytest.raises(SecAggError, match="or given the session up"):
        state.answer(run.phase.common, run.phase.own(victim), vector)


def everyone(run: Federation, *without: str) -> list[str]:
    return [name for name in run.vectors if name not in without]


def opened_bytes(run: Federation) -> bytes:
    return encode_open(run.opened)


def roster_of(run: Federation) -> Roster:
    """What an honest server sends to everybody, by name."""
    return {one.name: (key, one) for key, one in decode_roster(run.phase.common, len(run.vectors))}


def encoded(roster: Roster) -> bytes:
    return encode_roster(entry for _, entry in sorted(roster.items()))


def advertised(opened: bytes, name: str, key: Ed25519PrivateKey) -> tuple[bytes, Advertisement]:
    """A roster's entry for a client of this name and identity, as it would come about in a session of its own."""
    _, answer = begin(name, key, TERMS, accept).answer(opened)
    return key.public_key().public_bytes_raw(), decode_advertisement(bytes(answer))


# --- who is alive -----------------------------------------------------------------------------------------------------


def test_one_peer_named_alive_and_dropped() -> None:
    run = at(Step.CONFIRM)
    refuses(run, "client-0003: said to be alive and said to have", encode_survivors(everyone(run), [OTHER]))


def test_a_sharer_named_neither_alive_nor_dropped() -> None:
    run = at(Step.CONFIRM)
    refuses(run, "client-0003: survivors and dropped are not the", encode_survivors(everyone(run, OTHER), []))


def test_a_survivor_who_never_shared() -> None:
    run = at(Step.CONFIRM)
    refuses(run, "zoe: survivors and dropped are not the", encode_survivors([*everyone(run, OTHER), "zoe"], [OTHER]))


def test_a_client_said_to_have_dropped_out_that_has_not() -> None:
    run = at(Step.CONFIRM)
    refuses(run, "said to have dropped out, and has not", encode_survivors(everyone(run, VICTIM), [VICTIM]))


def test_survivors_that_differ_between_clients() -> None:
    """Told that different ones survived, clients see no signatures that fit, and nobody reveals a share."""
    run = at(Step.CONFIRM)
    stories = encode_survivors(everyone(run), []), encode_survivors(everyone(run, "client-0000"), ["client-0000"])
    groups = ["client-0000", "client-0001"], ["client-0002", "client-0003", "client-0004"]
    signatures = {}
    for story, group in zip(stories, groups, strict=True):
        for name in group:
            state = run.states[name]
            assert state is not None
            run.states[name], answer = state.answer(story)
            signatures[name] = decode_confirmation(bytes(answer))
    agreeing = {name: signatures[name] for name in groups[1]}
    refuses(run, "3 of this client's holders are left, and 4 are needed", b"", encode_confirmations(agreeing))
    mixed = {name: signatures[name] for name in everyone(run, "client-0000")}
    refuses(run, "client-0001: the signature on this .* does not hold", b"", encode_confirmations(mixed), OTHER)
    refuses(run, "client-0002: the signature", b"", encode_confirmations(signatures), "client-0000")


def test_confirmations_of_strangers_and_of_the_dropped() -> None:
    run = at(Step.CONFIRM, 9)
    run.ask("client-0000")
    survivors = encode_survivors(everyone(run, OTHER), [OTHER])
    signatures = {}
    for name in everyone(run, OTHER, "client-0000"):
        state = run.states[name]
        assert state is not None
        run.states[name], answer = state.answer(survivors)
        signatures[name] = decode_confirmation(bytes(answer))
    for wrong in (OTHER, "zoe"):
        forged = encode_confirmations(signatures | {wrong: signatures[VICTIM]})
        victim = {OTHER: VICTIM, "zoe": "client-0001"}[wrong]
        refuses(run, f"{wrong}: a confirmation by nobody who", b"", forged, victim)


@pytest.mark.parametrize("survivors", [1, 2, 3])
def test_too_few_survivors(survivors: int) -> None:
    run = at(Step.CONFIRM, opened=replace(OPEN, minimum=3))
    alive = [VICTIM, *everyone(run, VICTIM)][:survivors]
    match = "3 of this client's holders are left" if survivors == 3 else "no sum of fewer than 3 may be opened"
    refuses(run, match, encode_survivors(alive, everyone(run, *alive)))


def test_too_few_sharers() -> None:
    run = at(Step.SUBMIT, opened=replace(OPEN, minimum=4))
    refuses(run, "3 clients shared, too few for a sum of 4", encode_sharers(everyone(run)[:3]))
    refuses(run, "the shares of this client were left out", encode_sharers(everyone(run)[:4]), victim="client-0004")
    refuses(run, "zoe: said to have shared", encode_sharers([*everyone(run, VICTIM), "zoe"]), victim=OTHER)


def test_too_few_sharers_among_those_who_hold_its_shares() -> None:
    run = at(Step.SUBMIT)
    refuses(run, "3 of this client's holders are left, and 4 are needed", encode_sharers(everyone(run)[:3]))


# --- asking twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE, Step.SUBMIT, Step.CONFIRM, Step.UNMASK])
def test_a_second_request_of_the_same_step(step: Step) -> None:
    run = at(step)
    state = run.states[VICTIM]
    assert state is not None
    run.ask(VICTIM)
    with pytest.raises(SecAggError, match=f"has answered this {step.value} step"):
        state.answer(run.phase.common, run.phase.own(VICTIM), run.vectors[VICTIM])


def test_after_the_shares_nothing_is_left_to_ask() -> None:
    run = at(Step.UNMASK)
    run.ask(VICTIM)
    assert run.states[VICTIM] is None


# --- the roster -------------------------------------------------------------------------------------------------------


def test_keys_replayed_from_another_session() -> None:
    before, run = at(Step.SHARE), federation(opened=replace(OPEN, session=bytes(32)))
    run.identities = before.identities
    run.states = {name: begin(name, key, TERMS, accept) for name, key in before.identities.items()}
    opened = opened_bytes(run)
    state = run.states[VICTIM]
    assert state is not None
    run.states[VICTIM], answer = state.answer(opened)
    mine = before.identities[VICTIM].public_key().public_bytes_raw(), decode_advertisement(bytes(answer))
    replayed = {**roster_of(before), VICTIM: mine}
    refuses(run, "client-0000: the signature on this secagg advertisement", encoded(replayed))


@pytest.mark.parametrize("part", ["box_key", "mask_key", "seed_digest", "reveal_digest"])
def test_keys_swapped_under_a_signature(part: str) -> None:
    run = at(Step.SHARE)
    roster = dict(roster_of(run))
    key, one = roster[OTHER]
    swapped = X25519PrivateKey.generate().public_key().public_bytes_raw()
    roster[OTHER] = key, replace(one, **{part: swapped})  # type: ignore[arg-type]
    refuses(run, "client-0003: the signature", encoded(roster))


def test_keys_signed_again_by_somebody_else() -> None:
    """The server's own keys, signed by an identity of its own, under the name of a client that the consortium knows."""
    run = at(Step.ADVERTISE)
    terms = replace(TERMS, peers=public_keys(run.identities))
    run.states = {name: begin(name, key, terms, accept) for name, key in run.identities.items()}
    run.until(Step.SHARE)
    roster = {**roster_of(run), OTHER: advertised(opened_bytes(run), OTHER, Ed25519PrivateKey.generate())}
    refuses(run, "client-0003: on the coordinator's roster, but not on the consortium's", encoded(roster))


def test_a_client_that_the_consortium_does_not_know() -> None:
    run = at(Step.ADVERTISE)
    peers = public_keys(run.identities)
    stranger = peers.pop("client-0004")
    run.states = {name: begin(name, key, replace(TERMS, peers=peers), accept) for name, key in run.identities.items()}
    run.until(Step.SHARE)
    assert stranger in {key for key, _ in roster_of(run).values()}
    refuses(run, "client-0004: on the coordinator's roster, but not on the consortium's", run.phase.common)


def test_its_own_keys_signed_again() -> None:
    """Even with a signature that holds: it has sent others."""
    run = at(Step.SHARE)
    opened, key = opened_bytes(run), run.identities[VICTIM]
    refuses(run, "as it advertised itself", encoded({**roster_of(run), VICTIM: advertised(opened, VICTIM, key)}))


def test_its_own_name_with_another_identity() -> None:
    run = at(Step.SHARE)
    forged = advertised(opened_bytes(run), VICTIM, Ed25519PrivateKey.generate())
    refuses(run, "as it advertised itself", encoded({**roster_of(run), VICTIM: forged}))


def test_a_roster_without_it() -> None:
    run = at(Step.SHARE)
    refuses(
        run, "as it advertised itself", encoded({name: one for name, one in roster_of(run).items() if name != VICTIM})
    )


def test_one_client_under_two_names() -> None:
    run = at(Step.SHARE)
    roster = dict(roster_of(run))
    del roster["client-0004"]
    twin = advertised(opened_bytes(run), "client-0009", run.identities[OTHER])
    refuses(run, "identity key twice", encoded({**roster, "client-0009": twin}))


@pytest.mark.parametrize(
    ("taken", "given"), [("box_key", "box_key"), ("mask_key", "mask_key"), ("box_key", "mask_key")]
)
def test_one_key_for_two_clients(taken: str, given: str) -> None:
    run = at(Step.SHARE)
    opened, roster = opened_bytes(run), dict(roster_of(run))
    key, one = roster[OTHER]
    copied = replace(one, **{given: getattr(roster["client-0001"][1], taken)})
    signature = identity.sign(run.identities[OTHER], ADVERTISEMENT, *advertisement_parts(opened, copied))
    roster[OTHER] = key, replace(copied, signature=signature)
    refuses(run, "X25519 key twice", encoded(roster))


def test_a_key_that_makes_every_secret_the_same() -> None:
    """The point of order one: whatever is agreed on with it is zero."""
    run = at(Step.SHARE)
    opened, roster = opened_bytes(run), dict(roster_of(run))
    key, one = roster[OTHER]
    weak = replace(one, box_key=bytes(32))
    signature = identity.sign(run.identities[OTHER], ADVERTISEMENT, *advertisement_parts(opened, weak))
    roster[OTHER] = key, replace(weak, signature=signature)
    refuses(run, "with which nothing can be agreed on", encoded(roster))


def test_more_clients_than_the_modulus_was_chosen_for() -> None:
    """`clients` is what the levels were computed from, so that the sum cannot overflow."""
    run = at(Step.SHARE)
    sixth = advertised(opened_bytes(run), "client-0005", Ed25519PrivateKey.generate())
    refuses(run, "6 names. At most 5", encoded({**roster_of(run), "client-0005": sixth}))


def test_a_smaller_roster_than_its_owner_asks_for() -> None:
    run = at(Step.SHARE, terms=Terms(5, 2))
    smaller = {name: one for name, one in roster_of(run).items() if name != OTHER}
    refuses(run, "4 clients take part, and this one asks for 5", encoded(smaller))


def test_a_smaller_roster_than_its_owner_asks_for_before_it_reveals_anything() -> None:
    run = at(Step.REVEAL, 60, terms=Terms(60, 2))
    smaller = {name: one for name, one in roster_of(run).items() if name != OTHER}
    refuses(run, "59 clients take part, and this one asks for 60", encoded(smaller))


def test_a_roster_too_small_for_the_minimum() -> None:
    run = at(Step.SHARE, opened=replace(OPEN, minimum=5))
    smaller = {name: one for name, one in roster_of(run).items() if name != OTHER}
    refuses(run, "a roster of 4 clients, too few for a sum of 5", encoded(smaller))


def test_a_roster_of_two() -> None:
    run = at(Step.SHARE, terms=Terms(2, 2))
    two = {name: one for name, one in roster_of(run).items() if name in (VICTIM, OTHER)}
    refuses(run, "2 clients cannot hide from one another", encoded(two))


def test_rosters_that_differ_between_clients() -> None:
    """Both are signed by all who are on them; yet nothing that one group makes is good for the other."""
    run = at(Step.SHARE)
    whole, smaller = run.phase.common, {name: one for name, one in roster_of(run).items() if name != "client-0004"}
    run.tamper = lambda step, client, common, own: (encoded(smaller), own) if client == VICTIM else (common, own)
    for name in everyone(run, VICTIM):
        run.phase.receive(name, run.ask(name))
    answer = run.states[VICTIM]
    assert answer is not None
    run.states[VICTIM], _ = answer.answer(encoded(smaller))
    dealt = run.phase._answers
    inbox = {name: dealt[name][VICTIM].box for name in everyone(run, VICTIM, "client-0004")}
    sharers = encode_sharers(everyone(run, "client-0004"))
    refuses(run, "client-0000: the box does not open", sharers, encode_inbox(inbox))
    opened = opened_bytes(run)
    digests = {read_session(opened, roster, b"").digest for roster in (whole, encoded(smaller))}
    assert len(digests) == 2


# --- what is summed ---------------------------------------------------------------------------------------------------


def test_masks_for_different_models_do_not_cancel() -> None:
    """Two clients that masked for Opens that differ, here in the digest of model and Plan, leave their masks behind."""
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    secret = boxes.agree(one, two.public_key().public_bytes_raw())
    opens = [encode_open(replace(OPEN, context=bytes([model]) * 32)) for model in (1, 2)]
    run = federation()
    rosters = [
        encoded({name: advertised(opened, name, key) for name, key in run.identities.items()}) for opened in opens
    ]
    digests = [read_session(opened, roster, b"").digest for opened, roster in zip(opens, rosters, strict=True)]

    def left_over(first: bytes, second: bytes) -> int:
        total = np.zeros(1000, np.uint32)
        masks.add(total, [boxes.pair_key(secret, first, "ann", "bob")], [boxes.pair_key(secret, second, "bob", "ann")])
        return int(np.count_nonzero(total))

    assert left_over(digests[0], digests[0]) == 0
    assert left_over(digests[0], digests[1]) > 990


def test_different_models_to_different_clients() -> None:
    """Told of another model than the others, a client finds that none of them signed for its session."""
    run = federation()
    other = encode_open(replace(run.opened, context=b"m" * 32))
    roster = {}
    for name, state in run.states.items():
        assert state is not None
        run.states[name], answer = state.answer(other if name == VICTIM else opened_bytes(run))
        roster[name] = run.identities[name].public_key().public_bytes_raw(), decode_advertisement(bytes(answer))
    refuses(run, "client-0000: the signature on this secagg advertisement", encoded(roster))
    refuses(run, "client-0002: the signature on this secagg advertisement", encoded(roster), victim=OTHER)


def test_an_open_that_is_not_about_what_the_client_knows() -> None:
    def expected(opened: Open) -> None:
        if opened.context != OPEN.context:
            raise SecAggError("another Plan")

    run = federation()
    run.states[VICTIM] = begin(VICTIM, run.identities[VICTIM], TERMS, expected)
    refuses(run, "another Plan", encode_open(replace(run.opened, context=b"p" * 32)))


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        (Terms(6, 2), "5 clients are asked, and this one takes part from 6 on"),
        (Terms(5, 3), "a sum of 2 may be opened, and this client asks for 3"),
    ],
)
def test_an_open_below_its_owners_terms(terms: Terms, match: str) -> None:
    run = federation(terms=terms)
    refuses(run, match, opened_bytes(run))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_share_from_another_session() -> None:
    """Of the same clients and the same Open but for the session's number."""
    before = at(Step.SUBMIT)
    run = at(Step.SUBMIT, opened=replace(OPEN, session=bytes(32)))
    stale = decode_inbox(before.phase.own(VICTIM), 5)
    fresh = decode_inbox(run.phase.own(VICTIM), 5)
    refuses(run, "client-0003: the box does not open", run.phase.common, encode_inbox({**fresh, OTHER: stale[OTHER]}))


def test_a_share_for_another_client() -> None:
    run = at(Step.SUBMIT)
    mine, others = (decode_inbox(run.phase.own(name), 5) for name in (VICTIM, OTHER))
    swapped = {**mine, "client-0000": others["client-0000"]}
    refuses(run, "client-0000: the box does not open", run.phase.common, encode_inbox(swapped))


def test_a_share_of_another_client() -> None:
    run = at(Step.SUBMIT)
    mine = decode_inbox(run.phase.own(VICTIM), 5)
    swapped = {**mine, "client-0000": mine["client-0001"], "client-0001": mine["client-0000"]}
    refuses(run, "client-0000: the box does not open", run.phase.common, encode_inbox(swapped))


def test_its_own_box_sent_back() -> None:
    run = at(Step.SHARE)
    for name in run.phase.clients:
        run.phase.receive(name, run.ask(name))
    mine = run.phase._answers[VICTIM][OTHER].box
    run.phase = run.phase.close()  # type: ignore[assignment]
    inbox = decode_inbox(run.phase.own(VICTIM), 5)
    refuses(run, "client-0003: the box does not open", run.phase.common, encode_inbox({**inbox, OTHER: mine}))


@pytest.mark.parametrize("size", [0, SHARE_BYTES, 2 * SHARE_BYTES + 1])
def test_a_box_with_something_else_in_it(size: int) -> None:
    key, session = bytes(32), bytes(32)
    box = boxes.close_box(key, (bytes(size), b""), session, OTHER, VICTIM)
    with pytest.raises(SecAggError, match=f"client-0003: a box with {size} bytes in it"):
        boxes.open_box(key, box, session, OTHER, VICTIM)


def test_boxes_that_are_missing_or_too_many() -> None:
    run = at(Step.SUBMIT)
    inbox = decode_inbox(run.phase.own(VICTIM), 5)
    fewer = {name: box for name, box in inbox.items() if name != OTHER}
    refuses(run, "client-0003: the boxes are not those", run.phase.common, encode_inbox(fewer))
    sharers = encode_sharers(everyone(run, VICTIM))
    inbox = decode_inbox(run.phase.own(OTHER), 5)
    refuses(run, "client-0002: the boxes are not those", sharers, encode_inbox(inbox), victim=OTHER)


# --- the graph --------------------------------------------------------------------------------------------------------


def test_randomness_that_was_not_committed_to() -> None:
    run = at(Step.SHARE, 60)
    reveals = decode_reveals(run.phase.common, 60)
    forged = encode_reveals({**reveals, OTHER: bytes(32)})
    refuses(run, "client-0003: what was revealed for the graph is not what was committed to", forged)
    del reveals[OTHER]
    refuses(run, "zoe: what was revealed", encode_reveals({**reveals, "zoe": bytes(32)}), victim="client-0004")


def test_a_graph_without_what_it_revealed() -> None:
    run = at(Step.SHARE, 60)
    reveals = decode_reveals(run.phase.common, 60)
    del reveals[VICTIM]
    refuses(run, "what this client revealed was left out", encode_reveals(reveals))


def test_a_graph_too_small_for_the_minimum() -> None:
    run = at(Step.SHARE, 60, replace(OPEN, minimum=60))
    reveals = decode_reveals(run.phase.common, 60)
    del reveals[OTHER]
    refuses(run, "59 clients are left, too few for a sum of 60", encode_reveals(reveals))


def test_a_graph_of_fewer_clients_than_its_owner_asks_for() -> None:
    run = at(Step.SHARE, 60, terms=Terms(60, 2))
    reveals = decode_reveals(run.phase.common, 60)
    del reveals[OTHER]
    refuses(run, "59 clients take part, and this one asks for 60", encode_reveals(reveals))


def test_bytes_that_belong_to_no_part_of_a_step() -> None:
    for step, clients in (
        (Step.ADVERTISE, 5),
        (Step.SHARE, 5),
        (Step.CONFIRM, 5),
        (Step.REVEAL, 60),
        (Step.SHARE, 60),
    ):
        run = at(step, clients)
        refuses(run, "belong to no part of this step", run.phase.common, b"more")
    run = at(Step.UNMASK)
    refuses(run, "belong to no part of this step", b"more", run.phase.own(VICTIM))

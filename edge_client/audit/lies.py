"""What a server asks that does not keep to secure aggregation. Clients must refuse each of these, and say no more.

Each lie is prepared with clients of its own, which are brought to a step by an honest server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.protocols import identity
from farfield.protocols.errors import SecAggError
from farfield.protocols.messages import Evaluate, Secure, Train
from farfield.protocols.secagg import Step, Sum, encode_open
from farfield.protocols.secagg.messages import (
    Advertisement,
    decode_advertisement,
    decode_confirmation,
    decode_inbox,
    decode_reveals,
    decode_revelation,
    decode_roster,
    decode_shares,
    encode_confirmations,
    encode_inbox,
    encode_reveals,
    encode_revelation,
    encode_roster,
    encode_sharers,
    encode_survivors,
)
from farfield.protocols.secagg.session import ADVERTISEMENT, advertisement_parts, sparse
from farfield.protocols.summing import Subject
from farfield.protocols.tensors import pack_state

from .staged import Aggregation, Company, Setting
from .trial import Attempt

Lie: TypeAlias = Callable[[Setting], Attempt | None]

LIES: Final[dict[str, Lie]] = {}
"""By what is done, for a person."""


def _lie(what: str) -> Callable[[Lie], Lie]:
    def known(lie: Lie) -> Lie:
        LIES[what] = lie
        return lie

    return known


def _at(setting: Setting, step: Step, *, consortium: bool = False) -> Aggregation:
    return Aggregation(Company(setting, consortium=consortium)).until(step)


def _told(run: Aggregation, secure: Secure, name: str | None = None) -> Attempt:
    """One client is told this, and then what an honest server would have said."""
    victim = name or _victim(run)
    return Attempt(lambda: run.ask(victim, secure), lambda: run.ask(victim))


def _victim(run: Aggregation) -> str:
    return run.company.setting.names[1]


def _peer(run: Aggregation) -> str:
    return run.company.setting.names[2]


def _common(run: Aggregation, common: bytes) -> Attempt:
    victim = _victim(run)
    return _told(run, run.secure(victim, common=common))


# --- how a sum is opened ----------------------------------------------------------------------------------------------


def _opened(setting: Setting, **fields: object) -> Attempt:
    run = Aggregation(Company(setting))
    victim, other = _victim(run), replace(run.opened, **fields)  # type: ignore[arg-type]
    return Attempt(lambda: run.ask(victim, run.secure(victim, common=encode_open(other))))


@_lie("A sum is opened that withstands fewer corrupt clients than the Plan says")
def _fewer_corrupt(setting: Setting) -> Attempt | None:
    return _opened(setting, corrupt=0.0) if setting.plan.protection.corrupt else None


@_lie("A sum is opened for another adversary than the Plan's")
def _other_adversary(setting: Setting) -> Attempt:
    curious = setting.plan.protection.adversary == "curious"
    return _opened(setting, adversary="semi-malicious" if curious else "curious")


@_lie("A sum is opened that may be made of fewer clients than the Plan allows")
def _smaller_sum(setting: Setting) -> Attempt:
    return _opened(setting, minimum=2)


@_lie("A cohort is asked that is below the smallest")
def _small_cohort(setting: Setting) -> Attempt:
    return _opened(setting, clients=setting.terms.smallest_cohort - 1, minimum=2)


@_lie("A sum is opened for another round than its task is of")
def _other_round(setting: Setting) -> Attempt:
    return _opened(setting, round=2)


@_lie("A session that goes on is begun a second time")
def _begun_twice(setting: Setting) -> Attempt:
    run = Aggregation(Company(setting))
    victim = _victim(run)
    opening = run.secure(victim)
    run.advance()
    return Attempt(lambda: run.ask(victim, opening))


@_lie("A step is asked for before its turn")
def _out_of_turn(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    return _told(run, run.secure(_victim(run), step=Step.UNMASK.value, subject=b"", work=None))


# --- who is on the roster ---------------------------------------------------------------------------------------------

_Roster: TypeAlias = Mapping[str, tuple[bytes, Advertisement]]


def _listed(setting: Setting, *, consortium: bool = False) -> Aggregation:
    """Where the roster is told."""
    run = Aggregation(Company(setting, consortium=consortium))
    return run.until(Step.REVEAL if sparse(run.opened) else Step.SHARE)


def _roster(run: Aggregation) -> dict[str, tuple[bytes, Advertisement]]:
    return {one.name: (key, one) for key, one in decode_roster(run.phase.common, run.opened.clients)}


def _encoded(roster: _Roster) -> bytes:
    return encode_roster(entry for _, entry in sorted(roster.items()))


def _entry(run: Aggregation, like: Advertisement, key: Ed25519PrivateKey) -> tuple[bytes, Advertisement]:
    """A roster's entry, with a signature of `key` that holds."""
    signature = identity.sign(key, ADVERTISEMENT, *advertisement_parts(run.raw, like))
    return key.public_key().public_bytes_raw(), replace(like, signature=signature)


def _own_keys(like: Advertisement, name: str) -> Advertisement:
    """Keys that the server has made, in the name of a client."""
    box, mask = (X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2))
    return replace(like, name=name, box_key=box, mask_key=mask)


@_lie("One client is on the roster under two names")
def _sybil(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster = _roster(run)
    twin = _own_keys(roster.pop(setting.names[-1])[1], "zoe")
    key = run.company.identities[setting.names[0]]
    return _common(run, _encoded({**roster, "zoe": _entry(run, twin, key)}))


@_lie("The server puts its own keys on the roster in the name of a client of the consortium")
def _impostor(setting: Setting) -> Attempt:
    run = _listed(setting, consortium=True)
    roster, name = _roster(run), _peer(run)
    forged = _entry(run, _own_keys(roster[name][1], name), Ed25519PrivateKey.generate())
    return _common(run, _encoded({**roster, name: forged}))


@_lie("A client is on the roster that the consortium does not know")
def _stranger(setting: Setting) -> Attempt:
    run = _listed(setting, consortium=True)
    roster = _roster(run)
    like = roster.pop(setting.names[-1])[1]
    invented = _entry(run, _own_keys(like, "zoe"), Ed25519PrivateKey.generate())
    return _common(run, _encoded({**roster, "zoe": invented}))


@_lie("A client's keys are exchanged under its signature")
def _exchanged(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster, name = _roster(run), _peer(run)
    key, one = roster[name]
    return _common(run, _encoded({**roster, name: (key, _own_keys(one, name))}))


@_lie("A client finds other keys than its own under its name")
def _not_mine(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster, name = _roster(run), _victim(run)
    other = _entry(run, _own_keys(roster[name][1], name), run.company.identities[name])
    return _common(run, _encoded({**roster, name: other}))


@_lie("A client is asked for its shares, and is not on the roster")
def _left_out(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster = _roster(run)
    del roster[_victim(run)]
    return _common(run, _encoded(roster))


@_lie("Two clients are given one key")
def _one_key(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster, name, first = _roster(run), _peer(run), setting.names[0]
    copied = replace(roster[name][1], mask_key=roster[first][1].mask_key)
    return _common(run, _encoded({**roster, name: _entry(run, copied, run.company.identities[name])}))


@_lie("A client's key is one with which every secret is the same")
def _weak_key(setting: Setting) -> Attempt | None:
    run = _listed(setting)
    if sparse(run.opened):
        return None  # nobody agrees on anything before the graph is drawn, and then with neighbours only
    roster, name = _roster(run), _peer(run)
    weak = replace(roster[name][1], box_key=bytes(32))
    return _common(run, _encoded({**roster, name: _entry(run, weak, run.company.identities[name])}))


@_lie("More clients are on the roster than the numbers were chosen for")
def _overfull(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster = _roster(run)
    one_more = _entry(run, _own_keys(roster[setting.names[0]][1], "zoe"), Ed25519PrivateKey.generate())
    return _common(run, _encoded({**roster, "zoe": one_more}))


@_lie("The roster is cut down below the smallest sum")
def _cut_down(setting: Setting) -> Attempt:
    run = _listed(setting)
    roster = _roster(run)
    kept = [_victim(run), *run.others(_victim(run))][: run.opened.minimum - 1]
    return _common(run, _encoded({name: roster[name] for name in kept}))


# --- different stories to different clients ---------------------------------------------------------------------------


@_lie("Different clients are told of different models or Plans")
def _two_models(setting: Setting) -> Attempt:
    """One is told of another subject than the others, and then finds that nobody signed for its session."""
    run = Aggregation(Company(setting))
    victim, keys = _victim(run), run.company.keys
    other = run.secure(victim, common=encode_open(replace(run.opened, context=bytes(32))))
    answers = {name: run.ask(name, other if name == victim else None) for name in setting.names}
    roster = _encoded({name: (keys[name], decode_advertisement(answer)) for name, answer in answers.items()})
    step = Step.REVEAL if sparse(run.opened) else Step.SHARE
    asked = Secure(step.value, run.opened.session, roster, b"")
    return Attempt(lambda: run.ask(victim, asked), lambda: run.ask(_peer(run), asked))


@_lie("Different clients are told of different rosters")
def _two_rosters(setting: Setting) -> Attempt | None:
    """Both are signed by all who are on them; yet what is dealt under one does not open under the other."""
    run = _listed(setting)
    if sparse(run.opened) or run.opened.minimum == len(setting.names):
        return None  # by its reveals or its size a smaller roster is refused at once
    smaller, victim, left_out = _roster(run), _victim(run), setting.names[-1]
    del smaller[left_out]
    dealt = {name: decode_shares(run.ask(name), len(setting.names)) for name in run.others(victim, left_out)}
    run.ask(victim, run.secure(victim, common=_encoded(smaller)))
    asked = Secure(
        Step.SUBMIT.value,
        run.opened.session,
        encode_sharers([*dealt, victim]),
        encode_inbox({name: shares[victim].box for name, shares in dealt.items()}),
        run.subject.encode(),
        run.work,
    )
    return Attempt(lambda: run.ask(victim, asked))


@_lie("Different clients are told that different ones survived")
def _two_stories(setting: Setting) -> Attempt:
    """One hears that the first dropped out, so that it would open what that one's masks hide; the others do not."""
    run = _at(setting, Step.CONFIRM)
    victim, first = _victim(run), setting.names[0]

    def asked() -> None:
        truth = encode_survivors(run.others(), [])
        untrue = encode_survivors(run.others(first), [first])
        signatures = {
            name: decode_confirmation(run.ask(name, run.secure(name, common=untrue if name == victim else truth)))
            for name in run.others(first)
        }
        _unmask(run, victim, signatures)

    return Attempt(asked)


# --- what is added up -------------------------------------------------------------------------------------------------


def _submitted(setting: Setting, **changed: object) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    return _told(run, run.secure(_victim(run), **changed))


def _about(setting: Setting, **fields: object) -> Attempt:
    """The session itself is opened about something that is not this run's, and everybody is told the same."""
    company = Company(setting)
    honest = Subject.decode(Aggregation(company).subject.encode())
    other = replace(honest, **fields)  # type: ignore[arg-type]
    run = Aggregation(company, context=other.digest).until(Step.SUBMIT)
    return _told(run, run.secure(_victim(run), subject=other.encode()))


@_lie("The vector is asked for with another subject than the session was opened for")
def _other_subject(setting: Setting) -> Attempt:
    run = Aggregation(Company(setting))
    return _submitted(setting, subject=replace(run.subject, adapter=bytes(32)).encode())


@_lie("The sum is one over another Plan")
def _other_plan(setting: Setting) -> Attempt:
    return _about(setting, plan=bytes(32))


@_lie("The sum is one over another backbone")
def _other_backbone(setting: Setting) -> Attempt:
    return _about(setting, backbone=bytes(32))


@_lie("The sum is one over other frozen weights")
def _other_frozen(setting: Setting) -> Attempt:
    return _about(setting, frozen=b"\1" * 32)


@_lie("The task's adapter is another than the one that all agreed on")
def _other_adapter(setting: Setting) -> Attempt:
    other = {name: values + 1 for name, values in setting.adapter.items()}
    return _submitted(setting, work=Train(pack_state(other, "float32"), setting.norm))


@_lie("The task's clipping norm is another than the one that all agreed on")
def _other_norm(setting: Setting) -> Attempt:
    run = Aggregation(Company(setting))
    return _submitted(setting, work=replace(run.work, clipping_norm=1e6))


@_lie("An evaluation is asked for in a sum that was opened for training")
def _other_work(setting: Setting) -> Attempt:
    return _submitted(setting, work=Evaluate(Aggregation(Company(setting)).work.adapter))


@_lie("The vector is to be longer than what the Plan trains")
def _longer(setting: Setting) -> Attempt:
    company = Company(setting)
    run = Aggregation(company, length=Aggregation(company).opened.length + 1).until(Step.SUBMIT)
    return _told(run, run.secure(_victim(run)))


@_lie("The sum is to have another modulus than the Plan's")
def _other_modulus(setting: Setting) -> Attempt:
    company = Company(setting)
    bits = {16: 24, 24: 32, 32: 24}[Aggregation(company).opened.modulus_bits]
    run = Aggregation(company, modulus_bits=bits).until(Step.SUBMIT)
    return _told(run, run.secure(_victim(run)))


# --- shares and boxes -------------------------------------------------------------------------------------------------


@_lie("A client is sent shares that were meant for another")
def _misdirected(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    mine, others = (decode_inbox(run.phase.own(name), run.opened.clients) for name in (_victim(run), _peer(run)))
    dealer = next(name for name in mine if name != _peer(run))
    foreign = others[dealer] if dealer in others else next(iter(others.values()))
    return _told(run, run.secure(_victim(run), own=encode_inbox({**mine, dealer: foreign})))


@_lie("A share is altered on its way")
def _altered_share(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    mine = decode_inbox(run.phase.own(_victim(run)), run.opened.clients)
    dealer, box = next(iter(mine.items()))
    return _told(run, run.secure(_victim(run), own=encode_inbox({**mine, dealer: box[:-1] + bytes([box[-1] ^ 1])})))


@_lie("A client is sent a share of another session")
def _stale_share(setting: Setting) -> Attempt:
    before, run = _at(setting, Step.SUBMIT), _at(setting, Step.SUBMIT)
    stale = decode_inbox(before.phase.own(_victim(run)), run.opened.clients)
    mine = decode_inbox(run.phase.own(_victim(run)), run.opened.clients)
    dealer = next(iter(mine))
    box = stale[dealer] if dealer in stale else next(iter(stale.values()))
    return _told(run, run.secure(_victim(run), own=encode_inbox({**mine, dealer: box})))


@_lie("A neighbour's shares are held back")
def _held_back(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    mine = decode_inbox(run.phase.own(_victim(run)), run.opened.clients)
    del mine[next(iter(mine))]
    return _told(run, run.secure(_victim(run), own=encode_inbox(mine)))


@_lie("Too few are said to have shared their secrets")
def _few_sharers(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    kept = [_victim(run), *run.others(_victim(run))][: run.opened.minimum - 1]
    mine = decode_inbox(run.phase.own(_victim(run)), run.opened.clients)
    inbox = encode_inbox({name: box for name, box in mine.items() if name in kept})
    return _told(run, run.secure(_victim(run), common=encode_sharers(kept), own=inbox))


@_lie("The randomness of the graph is not what a client committed itself to")
def _chosen_graph(setting: Setting) -> Attempt | None:
    run = Aggregation(Company(setting))
    if not sparse(run.opened):
        return None
    run.until(Step.SHARE)
    reveals = decode_reveals(run.phase.common, run.opened.clients)
    return _common(run, encode_reveals({**reveals, _peer(run): bytes(32)}))


# --- who is alive -----------------------------------------------------------------------------------------------------


def _unmask(run: Aggregation, victim: str, signatures: Mapping[str, bytes]) -> bytes:
    near = {name: signature for name, signature in signatures.items() if name in run.session.holders[victim]}
    return run.ask(victim, Secure(Step.UNMASK.value, run.opened.session, b"", encode_confirmations(near)))


def _survived(setting: Setting, survivors: Callable[[Aggregation], tuple[list[str], list[str]]]) -> Attempt:
    run = _at(setting, Step.CONFIRM)
    return _common(run, encode_survivors(*survivors(run)))


@_lie("One client is said to be both alive and dropped out")
def _dead_and_alive(setting: Setting) -> Attempt:
    return _survived(setting, lambda run: (run.others(), [_peer(run)]))


@_lie("One client is said to be neither alive nor dropped out")
def _neither(setting: Setting) -> Attempt:
    return _survived(setting, lambda run: (run.others(_peer(run)), []))


@_lie("Somebody is said to have survived who never shared anything")
def _ghost(setting: Setting) -> Attempt:
    return _survived(setting, lambda run: ([*run.others(_peer(run)), "zoe"], [_peer(run)]))


@_lie("A client is said to have dropped out, and has not")
def _said_dead(setting: Setting) -> Attempt:
    return _survived(setting, lambda run: (run.others(_victim(run)), [_victim(run)]))


@_lie("Fewer are said to have survived than the smallest sum has")
def _few_survivors(setting: Setting) -> Attempt:
    def cut(run: Aggregation) -> tuple[list[str], list[str]]:
        kept = [_victim(run), *run.others(_victim(run))][: run.opened.minimum - 1]
        return kept, run.others(*kept)

    return _survived(setting, cut)


@_lie("A confirmation is forged")
def _forged(setting: Setting) -> Attempt:
    run = _at(setting, Step.UNMASK)
    victim = _victim(run)
    holder = next(name for name in run.session.holders[victim] if name != victim)
    key = Ed25519PrivateKey.generate()
    signatures = {holder: identity.sign(key, "secagg confirmation", run.session.digest, b"")}
    return _told(run, run.secure(victim, own=encode_confirmations(signatures)))


@_lie("A client is asked to unmask twice")
def _twice(setting: Setting) -> Attempt:
    run = _at(setting, Step.UNMASK)
    victim = _victim(run)
    run.ask(victim)
    return Attempt(lambda: run.ask(victim))


@_lie("The same parts are added up again without one client, so that it is the difference")
def _differencing(setting: Setting) -> Attempt:
    company = Company(setting)
    Aggregation(company).finish()
    run = Aggregation(company).until(Step.CONFIRM)
    peer = _peer(run)

    def asked() -> None:
        told = encode_survivors(run.others(peer), [peer])
        signatures = {
            name: decode_confirmation(run.ask(name, run.secure(name, common=told))) for name in run.others(peer)
        }
        _unmask(run, _victim(run), signatures)

    return Attempt(asked)


# --- forged answers, which the coordinator must refuse ----------------------------------------------------------------


@_lie("A client's keys are advertised by somebody else")
def _advertised_by_another(setting: Setting) -> Attempt:
    run, other = Aggregation(Company(setting)), Aggregation(Company(setting))
    forged = other.ask(_victim(run))
    return Attempt(lambda: run.phase.receive(_victim(run), forged))


@_lie("A masked vector is handed in for another client")
def _vector_of_another(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    answer = run.ask(_peer(run))
    return Attempt(lambda: run.phase.receive(_victim(run), answer))


@_lie("A masked vector has another size")
def _cut_vector(setting: Setting) -> Attempt:
    run = _at(setting, Step.SUBMIT)
    answer = run.ask(_victim(run))
    return Attempt(lambda: run.phase.receive(_victim(run), answer[:-1]))


@_lie("A holder gives another share than the one that was dealt to it")
def _wrong_share(setting: Setting) -> Attempt:
    """It must be left out and its holder named, and the sum be right; or nothing be opened."""
    run = _at(setting, Step.UNMASK)
    victim = _victim(run)

    def asked() -> None:
        wrong = ("", "")
        for name in run.phase.clients:
            answer = run.ask(name)
            if name == victim:
                shares = decode_revelation(answer, run.opened.clients)
                first, second = list(shares)[:2]
                answer = encode_revelation({**shares, first: shares[second]})
                wrong = (victim, first)
            run.phase.receive(name, answer)
        total = run.phase.close()
        assert isinstance(total, Sum)
        if total.disputed == (wrong,) and (total.total == run.plain(total.clients)).all():
            raise SecAggError("the share is left out, its holder named, and the sum is right")

    return Attempt(asked)

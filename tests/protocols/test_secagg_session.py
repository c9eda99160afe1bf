"""The sum comes out exactly, whoever drops out when, as long as enough are left; otherwise nothing comes out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_session import OPEN, TERMS, Federation, accept, federation, names_of, public_keys

from farfield.protocols.errors import SecAggError, WireError
from farfield.protocols.secagg import Phase, Step, Sum, dump, open_session, restore
from farfield.protocols.secagg.messages import decode_revelation, decode_shares, encode_revelation, encode_shares
from farfield.protocols.secagg.parameters import FEWEST, SMALL, choose
from farfield.protocols.secagg.phases import Sharing, Submitting

FULL = [Step.ADVERTISE, Step.SHARE, Step.SUBMIT, Step.CONFIRM, Step.UNMASK]
SPARSE = [Step.ADVERTISE, Step.REVEAL, *FULL[1:]]


def most_dropouts(clients: int, step: Step) -> int:
    """How many of so many clients may fall silent at `step` and all later ones, if nobody did before."""
    if step is Step.ADVERTISE:
        return clients - FEWEST
    if step is Step.REVEAL:
        return clients - SMALL
    if clients > SMALL:
        return int(OPEN.dropouts * clients)
    return clients - choose(clients, OPEN.corrupt, OPEN.dropouts, OPEN.adversary).threshold


def check(clients: int, bits: int, silent: dict[Step, frozenset[str]], seed: int) -> None:
    """The sum is that of all who submitted, bit for bit."""
    run = federation(clients, replace(OPEN, modulus_bits=bits), seed=seed)
    total = run.finish(silent)
    lost: set[str] = set()
    for step in (Step.ADVERTISE, Step.REVEAL, Step.SHARE, Step.SUBMIT):
        lost |= silent.get(step, frozenset())
    assert set(total.clients) == run.vectors.keys() - lost
    assert total.total.tolist() == run.plain_sum(total.clients)
    assert total.disputed == ()


def drawn_check(data: st.DataObject, clients: int) -> None:
    bits = data.draw(st.sampled_from((16, 24, 32)))
    step = data.draw(st.sampled_from(SPARSE if clients > SMALL else FULL))
    most = most_dropouts(clients, step)
    count = data.draw(st.sampled_from(sorted({0, min(1, most), most})))
    lost = data.draw(st.permutations(names_of(clients)))[:count]
    check(clients, bits, {step: frozenset(lost)}, data.draw(st.integers(0, 2**32)))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(3, 16))
def test_the_sum_is_exact_with_dropouts_at_any_step(data: st.DataObject, clients: int) -> None:
    drawn_check(data, clients)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 200))
def test_the_sum_is_exact_for_up_to_two_hundred(data: st.DataObject, clients: int) -> None:
    drawn_check(data, clients)


@pytest.mark.parametrize("step", SPARSE)
def test_the_sum_is_exact_on_a_sparse_graph(step: Step) -> None:
    lost = frozenset(names_of(60)[7 : 7 + most_dropouts(60, step)])
    check(60, 24, {step: lost}, 1)


def test_clients_may_drop_out_at_every_step() -> None:
    lost = [frozenset({name}) for name in names_of(16)]
    check(16, 32, dict(zip(FULL, lost, strict=False)), 2)


@pytest.mark.slow
def test_a_thousand_clients_on_a_regular_graph() -> None:
    names = names_of(1000)
    silent = {
        Step.ADVERTISE: frozenset(names[:5]),
        Step.REVEAL: frozenset(names[5:10]),
        Step.SHARE: frozenset(names[10:20]),
        Step.SUBMIT: frozenset(names[300:360]),
        Step.CONFIRM: frozenset(names[500:510]),
        Step.UNMASK: frozenset(names[800:810]),
    }
    check(1000, 24, silent, 3)


def test_every_step_is_there_once() -> None:
    small, large = federation(5), federation(SMALL + 1)
    small.finish()
    large.finish()
    assert (small.steps, large.steps) == (FULL, SPARSE)


def test_the_graph_is_full_when_few_of_many_answer() -> None:
    run = federation(60)
    run.until(Step.SUBMIT, {Step.ADVERTISE: frozenset(names_of(60)[40:])})
    assert isinstance(run.phase._record, Submitting)
    session = run.phase._record.session
    assert all(holders == tuple(session.members) for holders in session.holders.values())


@pytest.mark.parametrize("step", FULL)
def test_with_one_dropout_too_many_nothing_is_opened(step: Step) -> None:
    run = federation(9)
    run.until(step)
    lost = names_of(9)[: most_dropouts(9, step) + 1]
    with pytest.raises(SecAggError):
        run.advance(frozenset(lost))
    with pytest.raises(SecAggError, match="closed before"):
        run.phase.close()


def test_no_sum_of_fewer_than_the_minimum_is_opened() -> None:
    run = federation(9, replace(OPEN, minimum=9))
    run.until(Step.SUBMIT)
    with pytest.raises(SecAggError, match="8 clients are left, too few for a sum of 9"):
        run.advance(frozenset({"client-0000"}))


def test_a_client_with_too_few_neighbours_is_left_out_and_the_others_go_on() -> None:
    run = federation(60, replace(OPEN, corrupt=0.0, dropouts=0.3, adversary="curious"))
    run.until(Step.SHARE)
    assert isinstance(run.phase._record, Sharing)
    session = run.phase._record.session
    holders = session.holders["client-0007"]
    assert len(holders) < 59, "a sparse graph"
    run.advance(frozenset(holders[session.threshold - 1 :]))
    assert "client-0007" not in run.phase.clients
    total = run.finish()
    assert "client-0007" not in total.clients
    assert total.total.tolist() == run.plain_sum(total.clients)


# --- what the server refuses ------------------------------------------------------------------------------------------


def test_only_those_who_are_asked_are_heard_and_only_once() -> None:
    run = federation(4)
    answer = run.ask("client-0000")
    with pytest.raises(SecAggError, match="not asked"):
        run.phase.receive("client-0009", answer)
    with pytest.raises(SecAggError, match="keys of 'client-0000'"):
        run.phase.receive("client-0001", answer)
    run.phase.receive("client-0000", answer)
    with pytest.raises(SecAggError, match="answered already"):
        run.phase.receive("client-0000", answer)
    assert run.phase.missing == {"client-0001", "client-0002", "client-0003"}


@pytest.mark.parametrize("step", FULL[:-1])
def test_an_answer_of_another_client_is_refused_and_changes_nothing(step: Step) -> None:
    run = federation(5)
    phase = run.until(step)
    answers = {name: run.ask(name) for name in phase.clients}
    with pytest.raises(WireError):
        phase.receive("client-0000", answers["client-0001"])
    assert phase.missing == set(answers)
    for name, answer in answers.items():
        phase.receive(name, answer)
    after = phase.close()
    assert isinstance(after, Phase)
    run.phase = after
    total = run.finish()
    assert total.total.tolist() == run.plain_sum(total.clients)


def test_as_many_are_asked_as_the_session_is_opened_for() -> None:
    run = federation(4)
    with pytest.raises(SecAggError, match="4 clients to be asked"):
        open_session(replace(run.opened, clients=5), public_keys(run.identities))


def with_a_wrong_share(run: Federation, answering: int) -> Phase | Sum:
    """So many of nine reveal their shares, and client 2 says of client 5 what is true of client 4."""
    phase = run.until(Step.UNMASK)
    for name in phase.clients[:answering]:
        answer = run.ask(name)
        if name == "client-0002":
            shares = decode_revelation(answer, 9)
            answer = encode_revelation(shares | {"client-0005": shares["client-0004"]})
        phase.receive(name, answer)
    return phase.close()


def test_a_wrong_share_is_left_out_and_named() -> None:
    run = federation(9)
    total = with_a_wrong_share(run, 9)
    assert isinstance(total, Sum)
    assert total.disputed == (("client-0002", "client-0005"),)
    assert total.total.tolist() == run.plain_sum(total.clients)


def test_where_no_share_is_to_spare_a_wrong_one_opens_nothing() -> None:
    with pytest.raises(SecAggError, match="client-0005: 5 good shares of its secret, and 6 are needed"):
        with_a_wrong_share(federation(9), 6)


@pytest.mark.parametrize("lost", [False, True])
def test_a_dealer_whose_shares_give_another_secret_is_named(lost: bool) -> None:
    """It shares another seed or key than it committed itself to, whose mask would be left in the sum."""
    run = federation(5)
    run.until(Step.SHARE)
    state = run.states["client-0003"]
    assert state is not None
    kind, values = json.loads(dump(state))
    values["mask" if lost else "seed"] = X25519PrivateKey.generate().private_bytes_raw().hex()
    liar = json.dumps([kind, values]).encode()
    run.states["client-0003"] = restore(liar, "client-0003", run.identities["client-0003"], TERMS, accept)
    silent = {Step.SUBMIT: frozenset({"client-0003"} if lost else {})}
    with pytest.raises(SecAggError, match="client-0003: the shares that this client dealt do not give the secret"):
        run.finish(silent)


@pytest.mark.parametrize("wrong", ["holder", "box", "own box"])
def test_shares_for_others_than_the_holders_are_refused(wrong: str) -> None:
    run = federation(5)
    phase = run.until(Step.SHARE)
    dealt = decode_shares(run.ask("client-0003"), 5)
    if wrong == "holder":
        del dealt["client-0001"]
    else:
        name = "client-0003" if wrong == "own box" else "client-0001"
        dealt[name] = replace(dealt[name], box=b"box")
    with pytest.raises(SecAggError, match=r"client-0003: (the shares are not for|a box of 3 bytes)"):
        phase.receive("client-0003", encode_shares(dealt))


def test_a_masked_vector_of_another_length_is_refused() -> None:
    run = federation(5)
    phase = run.until(Step.SUBMIT)
    answer = run.ask("client-0003")
    for wrong in (answer[:-1], answer + b"1", answer[:32], answer[:31], b""):
        with pytest.raises(SecAggError):
            phase.receive("client-0003", wrong)
    phase.receive("client-0003", memoryview(answer))


def test_a_masked_vector_from_another_session_is_refused() -> None:
    before, run = federation(5), federation(5, replace(OPEN, session=bytes(32)))
    before.until(Step.SUBMIT)
    run.until(Step.SUBMIT)
    with pytest.raises(SecAggError, match="a masked vector of another session"):
        run.phase.receive("client-0003", before.ask("client-0003"))


def test_keys_that_another_identity_signed_are_refused() -> None:
    run, other = federation(5), federation(5)
    with pytest.raises(SecAggError, match="client-0003: the signature on this secagg advertisement does not hold"):
        run.phase.receive("client-0003", other.ask("client-0003"))
    assert "client-0003" in run.phase.missing


def test_a_reveal_that_was_not_committed_to_is_refused() -> None:
    run = federation(60)
    phase = run.until(Step.REVEAL)
    with pytest.raises(SecAggError, match="client-0003: what was revealed"):
        phase.receive("client-0003", run.ask("client-0004"))


def test_a_revelation_of_other_secrets_is_refused() -> None:
    run = federation(5)
    phase = run.until(Step.UNMASK)
    shares = decode_revelation(run.ask("client-0003"), 5)
    del shares["client-0001"]
    with pytest.raises(SecAggError, match="client-0003: the shares are not of the secrets"):
        phase.receive("client-0003", encode_revelation(shares))

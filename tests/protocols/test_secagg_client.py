"""What a client's state holds, how it is carried, and what it asks of its own side."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from secagg_session import OPEN, TERMS, Federation, accept, federation

from farfield.protocols.errors import FarfieldError, PlanError, SecAggError
from farfield.protocols.secagg import Open, Step, begin, dump, encode_open, restore
from farfield.protocols.secagg.masks import Words

NAME = "client-0001"
STEPS = [Step.ADVERTISE, Step.SHARE, Step.SUBMIT, Step.CONFIRM, Step.UNMASK]


def carried(run: Federation) -> None:
    """Every client goes through another process."""
    for name, state in run.states.items():
        if state is not None:
            run.states[name] = restore(dump(state), name, run.identities[name], TERMS, accept)


@pytest.mark.parametrize("clients", [5, 60])
def test_a_session_carried_between_processes_at_every_step(clients: int) -> None:
    run = federation(clients)
    while True:
        carried(run)
        assert {state.step for state in run.states.values() if state is not None} == {run.phase.step}
        after = run.advance()
        if run.phase is not after:
            break
    assert after.total.tolist() == run.plain_sum(tuple(run.vectors))  # type: ignore[union-attr]


def test_a_state_that_was_carried_away_is_used_up() -> None:
    run = federation()
    run.until(Step.SHARE)
    state = run.states[NAME]
    assert state is not None
    dump(state)
    with pytest.raises(SecAggError, match="given the session up"):
        state.answer(run.phase.common)
    with pytest.raises(SecAggError, match="used before"):
        dump(state)


@pytest.mark.parametrize("step", STEPS)
def test_no_secret_is_shown(step: Step) -> None:
    run = federation()
    run.until(step)
    state = run.states[NAME]
    assert state is not None
    assert repr(state) == f"State({NAME!r}, {step}, waiting)"
    shown = f"{state!r} {state._record!r} {state._owner!r}"
    run.states[NAME] = restore(dump(state), NAME, run.identities[NAME], TERMS, accept)
    for secret in strings(json.loads(dump_of(run))[1]):
        assert secret[:16] not in shown
        assert repr(bytes.fromhex(secret))[2:18] not in shown
    state = run.states[NAME]
    assert state is not None
    run.ask(NAME)
    assert repr(state) == f"State({NAME!r}, {step}, over)"


def strings(values: dict[str, str | dict[str, str]]) -> list[str]:
    nested = [[value] if isinstance(value, str) else list(value.values()) for value in values.values()]
    return [one for part in nested for one in part if one]


def test_once_masked_a_vector_s_secrets_are_gone() -> None:
    """What is left after SUBMIT is shares of others' secrets, and its own shares of its own: no seed and no key."""
    run = federation()
    run.until(Step.SUBMIT)
    secrets = json.loads(dump_of(run))[1]
    run.states[NAME] = restore(dump_of(run), NAME, run.identities[NAME], TERMS, accept)
    run.ask(NAME)
    left = dump_of(run).decode()
    for kind in ("seed", "mask"):
        assert len(secrets[kind]) == 64
        assert secrets[kind] not in left


def dump_of(run: Federation) -> bytes:
    """What the client knows. The state goes on."""
    state = run.states[NAME]
    assert state is not None
    raw = dump(state)
    run.states[NAME] = restore(raw, NAME, run.identities[NAME], TERMS, accept)
    return raw


def test_a_vector_is_masked_and_two_of_the_same_look_different() -> None:
    run = federation(opened=replace(OPEN, length=1000))
    run.until(Step.SUBMIT)
    for vector in run.vectors.values():
        vector[:] = 1
    sent = [np.frombuffer(run.ask(name)[32:], np.uint8) for name in run.phase.clients]
    for one, other in pairwise(sent):
        assert np.count_nonzero(one == other) < 40, "3000 uniform bytes agree in 12 places"


@pytest.mark.parametrize(
    "vector",
    [
        None,
        np.zeros(6, np.uint32),
        np.zeros(7, np.uint16),
        np.zeros(7, np.int32),
        np.zeros((7, 1), np.uint32),
    ],
)
def test_another_vector_than_the_session_is_about(vector: Words | None) -> None:
    run = federation()
    run.until(Step.SUBMIT)
    state = run.states[NAME]
    assert state is not None
    with pytest.raises(SecAggError, match="where 7 values of uint32 are asked for"):
        state.answer(run.phase.common, run.phase.own(NAME), vector)


def test_whatever_the_layer_above_says_ends_the_session() -> None:
    def expected(opened: Open) -> None:
        raise PlanError("another round")

    run = federation()
    state = begin(NAME, run.identities[NAME], TERMS, expected)
    with pytest.raises(PlanError, match="another round"):
        state.answer(encode_open(run.opened))
    with pytest.raises(FarfieldError, match="given the session up"):
        state.answer(encode_open(run.opened))

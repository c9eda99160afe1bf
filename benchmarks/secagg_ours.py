"""Our side of the benchmark of secure aggregation: one client's work, and the server's, every client run for real."""

from __future__ import annotations

import secrets
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from secagg_case import BITS, DEFAULTS, EVERYBODY, LIMIT, Client, Values, draw, graph
from stopwatch import Stopwatch, Took

from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import Open, Phase, State, Step, Terms, begin, fixedpoint, masks, open_session, session
from farfield.protocols.secagg.masks import Words
from farfield.protocols.secagg.parameters import SMALL


class Ours:
    """A session about to begin, and all of its clients."""

    def __init__(self, clients: int, values: int, stated: tuple[float, float]) -> None:
        self.modulus_bits, self.levels = fixedpoint.choose_modulus(clients, BITS)
        corrupt, dropouts = stated
        self.identities = {f"client-{number:04}": Ed25519PrivateKey.generate() for number in range(clients)}
        self.states: dict[str, State | None] = {
            name: begin(name, key, Terms(3, 2), lambda _: None) for name, key in self.identities.items()
        }
        self.opened = Open(
            session=secrets.token_bytes(32),
            run="benchmark",
            round=1,
            context=bytes(32),
            clients=clients,
            modulus_bits=self.modulus_bits,
            length=values,
            minimum=2,
            corrupt=corrupt,
            dropouts=dropouts,
            adversary="semi-malicious",
        )

    def open(self) -> Phase:
        return open_session(
            self.opened, {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        )

    def encode(self, update: Values) -> Words:
        words = fixedpoint.zeros(len(update), self.modulus_bits)
        fixedpoint.encode(update * np.float32(1), LIMIT, self.levels, words, Randomness())
        return words

    def answer(self, name: str, common: bytes, own: bytes, words: Words | None) -> bytes | memoryview:
        state = self.states[name]
        assert state is not None
        self.states[name], answer = state.answer(common, own, words)
        return answer


def our_client(update: Values, neighbours: int) -> Client:
    """The first of `neighbours` + 1 clients, from the first step to the last."""
    ours = Ours(neighbours + 1, len(update), EVERYBODY)
    assert graph(neighbours + 1, EVERYBODY).degree == neighbours
    phase, watch, sent = ours.open(), Stopwatch(), dict[Step, int]()
    nothing = fixedpoint.zeros(len(update), ours.modulus_bits)
    while True:
        for name in phase.clients:
            step, common, own = phase.step, phase.common, phase.own(name)
            if sent.get(step) is None:  # the first in line
                _forget(step, neighbours + 1 > SMALL)
                with watch:
                    words = ours.encode(update) if step is Step.SUBMIT else None
                    answer = ours.answer(name, common, own, words)
                sent[step] = len(answer)
                if step is Step.UNMASK:
                    vector = sent.pop(Step.SUBMIT)
                    return Client(watch.took, vector, sum(sent.values()))
            else:
                with patch.object(masks, "add", lambda *_: None):
                    answer = ours.answer(name, common, own, nothing if step is Step.SUBMIT else None)
            phase.receive(name, answer)
        after = phase.close()
        assert isinstance(after, Phase)
        phase = after


def _forget(step: Step, sparse: bool) -> None:
    """What the server's side has read before this client did, in the same process."""
    if step is (Step.REVEAL if sparse else Step.SHARE):
        session.read_roster.cache_clear()
    if step is Step.SHARE:
        session.read_session.cache_clear()


def our_server(values: int, clients: int, dropped: int) -> Took:
    """With all clients run for real. The sum must be exact."""
    ours, watch = Ours(clients, values, DEFAULTS), Stopwatch()
    plain, silent = np.zeros(values, np.int64), set(list(ours.identities)[:dropped])
    with watch:
        phase = ours.open()
    while True:
        for number, name in enumerate(phase.clients):
            words = None
            if phase.step is Step.SUBMIT:
                if name in silent:
                    continue
                words = ours.encode(draw(values, number))
                plain += words.view(np.int32)
            with watch:
                common, own = phase.common, phase.own(name)
            answer = ours.answer(name, common, own, words)
            with watch:
                phase.receive(name, answer)
        with watch:
            after = phase.close()
        if not isinstance(after, Phase):
            break
        phase = after
    with watch:
        decoded = fixedpoint.decode(after.total, ours.modulus_bits, LIMIT, ours.levels)
    assert after.clients == tuple(sorted(ours.identities.keys() - silent))
    assert np.array_equal(decoded, plain * (LIMIT / ours.levels)), "the sum is not that of the fixed-point values"
    return watch.took

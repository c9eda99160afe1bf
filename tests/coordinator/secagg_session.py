"""A secure aggregation within one process: what the server says goes to the clients, and back, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.protocols.secagg import Open, Phase, State, Step, Sum, Terms, begin, fixedpoint, open_session
from farfield.protocols.secagg.masks import Words

OPEN = Open(
    session=bytes(range(32)),
    run="run",
    round=3,
    context=bytes(32),
    clients=5,
    modulus_bits=24,
    length=7,
    minimum=2,
    corrupt=0.1,
    dropouts=0.1,
    adversary="semi-malicious",
)
TERMS = Terms(smallest_cohort=3, smallest_survivors=2)

Tamper = Callable[[Step, str, bytes, bytes], tuple[bytes, bytes]]
"""Step, client, and what the server tells it, as it comes out of the server; gives what the client hears."""


def accept(opened: Open) -> None:
    """The `expected` of a client that knows of nothing in particular."""


@dataclass
class Federation:
    """Clients with their keys and vectors.

    Attributes:
        opened: with as many clients as there are.
        states: what each client waits for next; None after its last step.
        phase: where the server is.
        steps: those that were gone through.
    """

    opened: Open
    identities: dict[str, Ed25519PrivateKey]
    vectors: dict[str, Words]
    states: dict[str, State | None]
    phase: Phase
    tamper: Tamper = lambda step, client, common, own: (common, own)
    steps: list[Step] = field(default_factory=list)

    def ask(self, client: str) -> bytes:
        """What the client answers to the step that the server is at."""
        phase = self.phase
        common, own = self.tamper(phase.step, client, phase.common, phase.own(client))
        state = self.states[client]
        assert state is not None, f"{client} is done"
        vector = self.vectors[client].copy() if phase.step is Step.SUBMIT else None
        self.states[client], answer = state.answer(common, own, vector)
        return bytes(answer)

    def advance(self, silent: frozenset[str] = frozenset()) -> Phase | Sum:
        """Ask all but the silent, and close the phase."""
        for client in self.phase.clients:
            if client not in silent:
                self.phase.receive(client, self.ask(client))
        self.steps.append(self.phase.step)
        after = self.phase.close()
        if isinstance(after, Phase):
            self.phase = after
        return after

    def until(self, step: Step, silent: Mapping[Step, frozenset[str]] | None = None) -> Phase:
        """Go on to where the server asks for `step`; the silent of each step have dropped out for good."""
        while self.phase.step is not step:
            self.advance((silent or {}).get(self.phase.step, frozenset()))
        return self.phase

    def finish(self, silent: Mapping[Step, frozenset[str]] | None = None) -> Sum:
        """Go on to the sum."""
        while True:
            after = self.advance((silent or {}).get(self.phase.step, frozenset()))
            if isinstance(after, Sum):
                return after

    def plain_sum(self, clients: tuple[str, ...]) -> list[int]:
        """What the sum of these clients' vectors has to be."""
        total = np.zeros(self.opened.length, np.uint64)
        for client in clients:
            total += self.vectors[client]
        return [int(value) % 2**self.opened.modulus_bits for value in total]


def names_of(clients: int) -> list[str]:
    return [f"client-{number:04}" for number in range(clients)]


def federation(
    clients: int = OPEN.clients, opened: Open = OPEN, terms: Terms = TERMS, tamper: Tamper | None = None, seed: int = 0
) -> Federation:
    """So many clients with vectors drawn from `seed`, whom the server is about to ask for their keys."""
    opened = replace(opened, clients=clients)
    random = np.random.default_rng(seed)
    identities = {name: Ed25519PrivateKey.generate() for name in names_of(clients)}
    vectors = {}
    for name in identities:
        vector = fixedpoint.zeros(opened.length, opened.modulus_bits)
        vector[:] = random.integers(0, 2**opened.modulus_bits, opened.length)
        vectors[name] = vector
    return Federation(
        opened,
        identities,
        vectors,
        {name: begin(name, key, terms, accept) for name, key in identities.items()},
        open_session(opened, public_keys(identities)),
        tamper or (lambda step, client, common, own: (common, own)),
    )


def public_keys(identities: Mapping[str, Ed25519PrivateKey]) -> dict[str, bytes]:
    return {name: key.public_key().public_bytes_raw() for name, key in identities.items()}

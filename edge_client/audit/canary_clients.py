"""Canary clients: members of a federation whose updates a coin decides on (Andrew et al. 2023, arXiv 2302.03098).

Each has a direction of its own, drawn at random in the space of all updates, and sends either the longest update in
this direction that the Plan allows, or nothing but zeros. These are the very neighbours that privacy by client speaks
of: one client's contribution replaced by zero, with a public count. Random directions in so many dimensions are nearly
at right angles to each other and to what honest clients send, so many canaries fit into one run.

It is a federation of its own, for so many canaries in the audited run would leave nothing to learn in it. Everybody is
asked in every round in which the Plan lets a client take part: cohorts are drawn in public, nothing keeps a coordinator
from asking one client each time, and ε reckons with it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from farfield.protocols.audit.canaries import ceiling
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State

from .subject import Act, Member, Subject

COUNTS: Final = (64, 128, 256)
"""How many there are: as few as can put the Plan's promise to a test, if any of these can."""

HONEST: Final = 4
ROUNDS: Final = 8
STEPS: Final = 10
"""How many clients are there beside them, and how much of the Plan's training is done."""

_MARGIN: Final = 1.25


@dataclass(frozen=True, slots=True)
class ClientCanaries:
    """What came of it.

    Attributes:
        scores: of each, how far the aggregates of all rounds reach in its direction, in units of the clipping norm.
        included: whether it sent its update.
    """

    scores: tuple[float, ...]
    included: tuple[bool, ...]
    rounds: int
    honest: int


def measure(subject: Subject, claimed: float, confidence: float) -> ClientCanaries:
    """Run the federation, and look at what it lets out in the direction of each canary.

    Args:
        claimed: the ε that is to be tested, and `confidence` that of the bound which does so.
    """
    count = _count(subject.plan, claimed, confidence)
    coins = random.Random(derive(subject.seed, "canaries", "client coins"))
    included = tuple(coins.random() < 0.5 for _ in range(count))
    honest = sorted(subject.clients)[:HONEST]
    plan = _plan(subject, count + len(honest))
    norm = plan.privacy.clipping_norm

    def make() -> list[float]:
        assert subject.federation is not None
        members = {name: Member(subject.clients[name]) for name in honest}
        for number, put_in in enumerate(included):
            act = _sends(subject, number, norm if put_in else 0.0)
            members[f"canary-{number:03}"] = Member(subject.clients[honest[0]], act)
        course = subject.federation.run("canary-clients", plan, members, subject.say)
        aggregates = [course.aggregate(number) for number in range(1, course.rounds + 1)]
        total: dict[str, Any] = {name: np.zeros(value.shape) for name, value in subject.initial.items()}
        for aggregate in filter(None, aggregates):
            for name in total:
                total[name] += aggregate[name]
        return [round(len(members) * _along(total, direction(subject, number)) / norm, 6) for number in range(count)]

    scores = subject.notes.values("canaries/clients", make)
    return ClientCanaries(tuple(scores), included, plan.training.rounds, len(honest))


def _count(plan: Plan, claimed: float, confidence: float) -> int:
    for count in COUNTS:
        most = ceiling(count, delta=plan.privacy.delta, claim="Gaussian DP", confidence=confidence)
        if most > _MARGIN * claimed:
            return count
    return COUNTS[-1]


def direction(subject: Subject, number: int) -> State:
    """A unit vector over all tensors together, even in all directions, the same for a subject each time."""
    generator = np.random.default_rng(derive(subject.seed, "canaries", "direction", number))
    drawn = {name: generator.standard_normal(value.shape) for name, value in sorted(subject.initial.items())}
    length = math.sqrt(_along(drawn, drawn))
    return {name: (value / length).astype(np.float32) for name, value in drawn.items()}


def _sends(subject: Subject, number: int, norm: float) -> Act:
    """An update of this norm in the canary's direction; a little less, so that rounding cannot lift it over."""

    def act(_: int, adapter: State, honest: object) -> Part:
        mine = direction(subject, number)
        return Part({name: np.float32(norm * (1 - 2.0**-20)) * mine[name] for name in adapter})

    return act


def _along(total: Mapping[str, Any], unit: Mapping[str, Any]) -> float:
    return float(sum(np.vdot(total[name].astype(np.float64), unit[name].astype(np.float64)) for name in unit))


def _plan(subject: Subject, clients: int) -> Plan:
    """The Plan with this many clients in each round, its noise as it is, and no more rounds than are needed."""
    plan, made = subject.plan, mechanism(subject.plan)
    assert isinstance(made, ClientMechanism)
    rounds = min(ROUNDS, plan.participations)
    return subject.variant(
        training={"rounds": rounds, "steps": min(STEPS, plan.training.steps or STEPS), "epochs": None},
        # Shares of distributed noise are for the fewest clients a round may end with, and come to more with others.
        cohort={"size": None, "fraction": None, "minimum": clients, "over_selection": 0.0},
        evaluation={"every": rounds, "clients": clients, "examples": 1},
        privacy={
            "target_epsilon": None,
            "noise_multiplier": made.noise_multiplier,
            "clipping": "fixed",
            "participations": None,
        },
    )

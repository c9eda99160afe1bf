"""Whose turn a round is, where a client takes part in some of a run's rounds only.

With `privacy.participations` = P in a run of T rounds, the clients take turns of ⌈T / P⌉ rounds: each has its place in
them by its name and the Plan's seed, and is asked in that round of every turn and in no other. That is P rounds at
most. Nobody has to be believed for it: a client looks up its own turn, and refuses a round that is not.
"""

from __future__ import annotations

from .plan import Plan
from .seeds import derive


def turn(plan: Plan, number: int) -> int:
    """The place in its turn of round `number`, from 0. Rounds of the same place have the same clients."""
    return (number - 1) % _length(plan)


def takes_part(plan: Plan, node: str, number: int) -> bool:
    """Whether `node` may be asked to train in round `number`."""
    return turn(plan, number) == derive(plan.training.seed, "turn", node) % _length(plan)


def _length(plan: Plan) -> int:
    return -(-plan.training.rounds // plan.participations)

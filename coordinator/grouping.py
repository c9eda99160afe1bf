"""The groups of a round's cohort, where the aggregation rule takes the middle of several sums instead of one.

Each group adds up in a secure aggregation of its own, so of a client nobody learns more than its group's sum.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Sum
from farfield.protocols.tensors import State

from .aggregation import GroupRule
from .releasing import Aggregate


@dataclass(frozen=True, slots=True)
class GroupSum:
    """What a group came to: the sum, of weight above 0, and whose parts are in it."""

    total: Sum
    clients: tuple[str, ...]

    @property
    def mean(self) -> State:
        """Σ wₖ Δₖ / Σ wₖ, float32."""
        total = self.total
        return {name: (values / total.weight).astype(np.float32) for name, values in total.update.items()}


def split(plan: Plan, number: int, cohort: Sequence[str]) -> list[list[str]]:
    """The groups of round `number`, as many as the Plan wants: each client is in one of them, and they are equally
    large, or differ by one.

    Who is with whom follows from the Plan's seed, the round and the names, as a uniform draw, anew in each round.
    """
    assert plan.aggregation.groups is not None
    nodes = sorted(cohort)
    random.Random(derive(plan.training.seed, "groups", number)).shuffle(nodes)
    return [sorted(nodes[place :: plan.aggregation.groups]) for place in range(plan.aggregation.groups)]


def fewest(groups: int) -> int:
    """How many of so many groups must be left: three, for a middle, and more than half, so that drop-outs do not make
    a few hostile groups the majority.
    """
    return max(3, groups // 2 + 1)


def combined(rule: GroupRule, sums: Sequence[GroupSum]) -> Aggregate:
    """The aggregate of a round whose groups came to `sums`."""
    totals = [one.total for one in sums]
    targets = sum(total.targets for total in totals)
    made = rule.combine([one.mean for one in sums])
    return Aggregate(
        update=made.update,
        loss=sum(total.loss for total in totals) / targets if targets else None,
        clients=tuple(sorted(client for one in sums for client in one.clients)),
        examples=sum(total.examples for total in totals),
        targets=targets,
        steps=sum(total.steps for total in totals),
        lost=made.lost,
    )

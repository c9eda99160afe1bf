"""What a Plan must know of an aggregation rule, and whether it gives the rule what that asks for.

The rules themselves are of `farfield.coordinator.aggregation`; here are only their names, and what follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .sections import SMALLEST_SUM, Aggregation, Cohort


@dataclass(frozen=True, slots=True)
class Asks:
    """What a rule asks of the Plan.

    Attributes:
        keys: those of `[aggregation]` that mean something to it, besides those that every rule has.
        needed: those of them that must be given.
        alike: whether it counts every client alike, so that no weight may be promised.
        fewest: how many updates it takes at least, or it would do nothing that it is chosen for.
    """

    keys: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    alike: bool = False
    fewest: Callable[[Aggregation], int] = lambda _: 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a Plan must know of an aggregation rule.

    Attributes:
        views: whether it must see every update for itself.
        groups: whether it works on the sums of several groups of clients.
        factors: whether it combines LoRA's two factors by what they are, and takes them at any rank.
    """

    views: bool = False
    groups: bool = False
    factors: bool = False
    asks: Asks = Asks()


Rules: TypeAlias = Mapping[str, Rule]
"""Aggregation rules by name."""


def check(aggregation: Aggregation, cohort: Cohort, rules: Rules) -> None:
    """Raises ValueError where a rule could not do its work by these sections, or they say more than it heeds."""
    name = aggregation.rule
    rule = rules.get(name, Rule())
    asks = rule.asks
    for key in sorted(set[str]().union(*(one.asks.keys for one in rules.values())) - asks.keys):
        if getattr(aggregation, key) is not None:
            takers = " or ".join(repr(other) for other, one in sorted(rules.items()) if key in one.asks.keys)
            raise ValueError(
                f"aggregation.{key} goes with rule = {takers}, and here the rule is {name!r}; leave it out"
            )
    for key in sorted(asks.needed):
        if getattr(aggregation, key) is None:
            raise ValueError(f"aggregation.rule = {name!r} needs aggregation.{key}; docs/plan.md says what that is")
    if asks.alike and aggregation.weighting != "uniform":
        raise ValueError(
            f"aggregation.rule = {name!r} counts every client alike, whatever it says of its examples: use "
            'aggregation.weighting = "uniform"'
        )
    if (fewest := asks.fewest(aggregation)) > cohort.minimum:
        raise ValueError(
            f"aggregation.rule = {name!r} takes {fewest} updates or more as this Plan has it, and cohort.minimum is "
            f"{cohort.minimum}: set it to {fewest} or more"
        )
    least = max(cohort.minimum, SMALLEST_SUM)
    if rule.groups and aggregation.groups and cohort.size is not None and cohort.size < aggregation.groups * least:
        raise ValueError(
            f"{aggregation.groups} groups of at least {least} clients take {aggregation.groups * least}, and "
            f"cohort.size is {cohort.size}: set it higher, or aggregation.groups lower"
        )

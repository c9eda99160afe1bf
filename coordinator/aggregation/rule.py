"""What an aggregation rule is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeVar

from farfield.protocols.errors import RunError
from farfield.protocols.messages import Trained
from farfield.protocols.rules import Asks, Rule, Rules
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State


class SumRule(ABC):
    """A rule that needs only the weighted sum of the updates: Δ = Σ wₖ Δₖ / Σ wₖ."""

    @abstractmethod
    def weight(self, trained: Trained) -> float:
        """wₖ, positive: how much one client's update counts."""

    @abstractmethod
    def finish(self, weighted_sum: State, total_weight: float) -> State:
        """Δ from Σ wₖ Δₖ, which it may overwrite, and Σ wₖ > 0."""


@dataclass(frozen=True, slots=True)
class Combined:
    """What a rule other than a sum makes of a round's updates.

    Attributes:
        update: Δ, float32, with the names and shapes of the adapter's tensors that were trained.
        lost: the share of the squared Frobenius norm of what was to be combined that Δ cannot hold, from 0 to 1; None
            for a rule that does not say.
    """

    update: State
    lost: float | None = None


class ViewRule(ABC):
    """A rule that must see every client's update, so it cannot go with secure aggregation.

    Attributes:
        factors: whether it combines LoRA's two factors by what they are, and takes them at any rank; otherwise all
            updates have the adapter's shapes.
        asks: what it asks of the Plan.
    """

    factors: ClassVar[bool] = False
    asks: ClassVar[Asks] = Asks()

    @abstractmethod
    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        """Δ, from what each client changed.

        Args:
            adapter: what the round began with, float32. An update of a smaller rank is one of its first ranks.
            updates: Δₖ by node, in the order of the nodes; at least one. Not to be written to.
            weights: wₖ > 0 by node, as `weight_of` has them.
        """


class GroupRule(ABC):
    """A rule that needs the means of several groups of clients, and so sees sums only: secure aggregation carries it.

    Attributes:
        asks: what it asks of the Plan.
    """

    asks: ClassVar[Asks] = Asks(keys=frozenset({"groups"}), needed=frozenset({"groups"}))

    @abstractmethod
    def combine(self, means: Sequence[State]) -> Combined:
        """Δ, from the mean update of each group.

        Args:
            means: Σ wₖ Δₖ / Σ wₖ over a group's clients, float32, with the same names and shapes; three or more, of
                which each counts alike. Not to be written to.
        """


def weight_of(settings: Aggregation, trained: Trained) -> float:
    """wₖ, positive: the client's number of training examples, or 1 with `weighting = "uniform"`."""
    return float(trained.examples) if settings.weighting == "examples" else 1.0


def enough(updates: Mapping[str, State], fewest: int, rule: str) -> None:
    """Raises RunError for fewer updates than `rule` can choose among; `cohort.minimum` keeps a round from that."""
    if len(updates) < fewest:
        raise RunError(f"{len(updates)} updates, and the aggregation rule {rule!r} takes {fewest} or more")


Factory = Callable[[Aggregation], SumRule | ViewRule | GroupRule]
_registry: dict[str, Factory] = {}
Made = TypeVar("Made", bound=Factory)


def register(name: str) -> Callable[[Made], Made]:
    """Decorator: make a rule, or what makes it from the Plan's section, known as `name`."""

    def add(rule: Made) -> Made:
        if name in _registry:
            raise ValueError(f"two aggregation rules are called {name!r}")
        _registry[name] = rule
        return rule

    return add


def registered() -> Mapping[str, Factory]:
    return MappingProxyType(_registry)


def traits() -> Rules:
    """All rules, and what a Plan must know of each; hand it to `farfield.protocols.plan.parse`."""
    return {name: _known(rule) for name, rule in _registry.items()}


def _known(rule: Factory) -> Rule:
    if isinstance(rule, type) and issubclass(rule, ViewRule):
        return Rule(views=True, factors=rule.factors, asks=rule.asks)
    if isinstance(rule, type) and issubclass(rule, GroupRule):
        return Rule(groups=True, asks=rule.asks)
    return Rule()

"""What an aggregation rule is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeVar

from farfield.protocols import plan
from farfield.protocols.messages import Trained
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
    """What a ViewRule makes of a round's updates.

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
    """

    factors: ClassVar[bool] = False

    @abstractmethod
    def combine(self, adapter: State, updates: Mapping[str, State], weights: Mapping[str, float]) -> Combined:
        """Δ, from what each client changed.

        Args:
            adapter: what the round began with, float32. An update of a smaller rank is one of its first ranks.
            updates: Δₖ by node, in the order of the nodes; at least one. Not to be written to.
            weights: wₖ > 0 by node, as `weight_of` has them.
        """


def weight_of(settings: Aggregation, trained: Trained) -> float:
    """wₖ, positive: the client's number of training examples, or 1 with `weighting = "uniform"`."""
    return float(trained.examples) if settings.weighting == "examples" else 1.0


Factory = Callable[[Aggregation], SumRule | ViewRule]
_registry: dict[str, Factory] = {}
Rule = TypeVar("Rule", bound=Factory)


def register(name: str) -> Callable[[Rule], Rule]:
    """Decorator: make a rule, or what makes it from the Plan's section, known as `name`."""

    def add(rule: Rule) -> Rule:
        if name in _registry:
            raise ValueError(f"two aggregation rules are called {name!r}")
        _registry[name] = rule
        return rule

    return add


def registered() -> Mapping[str, Factory]:
    return MappingProxyType(_registry)


def traits() -> plan.Rules:
    """All rules, and what a Plan must know of each; hand it to `farfield.protocols.plan.parse`."""
    return {
        name: plan.Rule(views=True, factors=rule.factors)
        if isinstance(rule, type) and issubclass(rule, ViewRule)
        else plan.Rule()
        for name, rule in _registry.items()
    }

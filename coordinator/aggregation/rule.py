"""What an aggregation rule is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

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


class ViewRule(ABC):
    """A rule that must see every client's update, so it cannot go with secure aggregation."""

    @abstractmethod
    def combine(self, updates: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """Δ from the updates and weights by node."""


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


def views() -> Mapping[str, bool]:
    """All rules, and whether each must see every update; hand it to `farfield.protocols.plan.parse`."""
    return {name: isinstance(rule, type) and issubclass(rule, ViewRule) for name, rule in _registry.items()}

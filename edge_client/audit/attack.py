"""What an attack is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, TypeVar

from farfield.protocols.audit.finding import Finding

from .subject import Planting, Subject


class Attacker(StrEnum):
    """Who attacks, and what they have."""

    COORDINATOR = "the coordinator, who keeps to the protocol and is curious: it sees what each round lets out"
    CHEAT = "a coordinator, or who has taken its place, that does not keep to the protocol"
    CLIENT = "another client: it gets the adapter of every round, and sends what it likes"
    HOLDER = "anybody who holds the adapter that is released in the end"
    BUYER = "a client that is delivered an emulator, and wants the backbone"


class Attack(ABC):
    """One way to attack a federation. Final classes under `@register`, without arguments.

    Attributes:
        name: by which it is asked for.
        title: a heading.
        attacker: who could do it.
        cost: what it takes here, for a person; roughly.
        place: where it stands in a report; smaller comes first.
        default: whether it is made where nobody says which.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    attacker: ClassVar[Attacker]
    cost: ClassVar[str]
    place: ClassVar[int]
    default: ClassVar[bool] = True

    @abstractmethod
    def unfit(self, subject: Subject) -> str | None:
        """Why it cannot be made here, one sentence without its full stop; None where it can."""

    def plant(self, subject: Subject) -> Planting:
        """What it has to put into the audited run, always the same for a subject; nothing, for most."""
        return Planting()

    @abstractmethod
    def run(self, subject: Subject) -> Finding:
        """Make the attack. What takes long is kept in `subject.notes`, so that it goes on where it was stopped.

        Raises:
            FarfieldError: it cannot be made to the end.
        """


_registry: dict[str, Attack] = {}
Kind = TypeVar("Kind", bound=type[Attack])


def register(attack: Kind) -> Kind:
    """Decorator: make an attack known by its name."""
    if attack.name in _registry:
        raise ValueError(f"two attacks are called {attack.name!r}")
    _registry[attack.name] = attack()
    return attack


def registered() -> Mapping[str, Attack]:
    """All attacks by name, in the order of their places."""
    return MappingProxyType(dict(sorted(_registry.items(), key=lambda one: one[1].place)))

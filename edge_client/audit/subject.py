"""What is attacked: a Plan, its model, its clients, and a federation of them that lets things out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from farfield.edge_client.data import ClientData, Example
from farfield.edge_client.records import Record
from farfield.edge_client.worker import Worker
from farfield.emulator import methods
from farfield.emulator.bench import Bench
from farfield.protocols.messages import Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State, pack_state

from .notes import Notes

Act: TypeAlias = Callable[[int, State, Callable[[], Part]], Part]
"""What a member of a federation sends instead of what it should: from the round's number, the adapter that it was sent,
and its honest part, which is worked out when that is called.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """Who takes part in a federation: a client with its examples, honest where `act` is None."""

    data: Callable[[], ClientData]
    act: Act | None = None


@dataclass(frozen=True, slots=True)
class Planted:
    """A record that is trained on, `times` times, by a client that would not have had it."""

    client: str
    record: Record
    times: int = 1


@dataclass(frozen=True, slots=True)
class Planting:
    """What an attack puts into the audited run: records among those of its clients, and members of its own."""

    records: tuple[Planted, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)


class Course(ABC):
    """What a federation came to, round by round, and let out.

    Attributes:
        rounds: how many there were.
    """

    rounds: int

    @abstractmethod
    def adapter(self, number: int) -> State:
        """The adapter after round `number`, which every client gets; 0 is before the first."""

    @abstractmethod
    def aggregate(self, number: int) -> State | None:
        """Δ of round `number` as its coordinator learns it: the mean of its clients' updates by its aggregation rule,
        with the noise that the Plan promises, before any server optimiser. None where the round changed nothing.
        """

    @abstractmethod
    def members(self, number: int) -> tuple[str, ...]:
        """Whose updates are in it."""


class Federation(Protocol):
    """Runs federations, on this machine, as the Plan has them: the same rounds, protection and noise."""

    def run(self, name: str, plan: Plan, members: Mapping[str, Member], say: Say) -> Course:
        """Run one to its end; asked for again by the same name, it goes on where it was stopped, or is read.

        Args:
            plan: the audited Plan, or a `variant` of it.
        """
        ...


class Say(Protocol):
    """Is told what is being done, and how much of it is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Owner:
    """What only the backbone's owner has, where clients get an emulator of it.

    Attributes:
        backbone, emulator: their folders.
        public: text that is nobody's secret; None is what the emulator was built with.
    """

    backbone: Path
    emulator: Path
    public: Path | None


@dataclass(frozen=True)
class Subject:
    """One audit's subject.

    Attributes:
        plan: as it would be run.
        folder: the backbone, or the emulator that clients get.
        bench: a bench of them, for all work of the audit. Whoever uses it loads what it wants to be there.
        initial: the adapter before the first round.
        seed: what every choice of the audit follows from; see `farfield.protocols.seeds.derive`.
        clients: by name, what reads a client's examples, without anything planted.
        prepare: reads a client's examples with records that were planted.
        federation: runs whole federations. None at an edge client, which knows nobody else.
        notes: keeps what was found out so far.
        say: shows progress.
        plantings: by attack, what it has planted; those of the attacks that are made.
        owner: None where clients get the backbone itself, and at an edge client.
    """

    plan: Plan
    folder: Path
    bench: Bench
    initial: State
    seed: int
    clients: Mapping[str, Callable[[], ClientData]]
    prepare: Callable[[str, Sequence[Record]], ClientData]
    federation: Federation | None
    notes: Notes
    say: Say
    plantings: dict[str, Planting] = field(default_factory=dict)
    owner: Owner | None = None

    @cached_property
    def members(self) -> Mapping[str, Member]:
        """Who takes part in the audited run, with everything that any attack has planted."""
        members = {name: Member(read) for name, read in self.clients.items()}
        records: dict[str, list[Record]] = {}
        for planting in self.plantings.values():
            for one in planting.records:
                records.setdefault(one.client, []).extend([one.record] * one.times)
            members.update(planting.members)
        for name, planted in records.items():
            members[name] = Member(lambda name=name, planted=planted: self.prepare(name, planted))  # type: ignore[misc]
        return members

    @cached_property
    def course(self) -> Course:
        """The audited run: the Plan as it is, over all `members`.

        At an edge client it is one round of this client alone, so that its update is the aggregate.
        """
        if self.federation is None:
            from .alone import Alone

            return Alone(self, self.members)
        return self.federation.run("audited", self.plan, self.members, self.say)

    def variant(self, **sections: Mapping[str, Any]) -> Plan:
        """The Plan with these keys of its sections replaced, and checked again.

        Raises:
            pydantic.ValidationError: it is no Plan then; that is a mistake in an attack.
        """
        document = self.plan.model_dump(mode="json")
        for name, keys in sections.items():
            document[name] = {**document[name], **keys}
        return Plan.model_validate(document, context={"tuning_kinds": methods.registered(), "rules": None})

    def update(
        self, examples: Sequence[Example], start: State, *, plan: Plan | None = None, client: str = "audited"
    ) -> Part:
        """What one client with these training examples makes of the adapter `start`: its own part, in the clear.

        It is trained as the Plan says (or the `variant` of it that is given), with the noise of DP-SGD or clipped where
        it says so; so it is what a coordinator sees where updates are not added up unseen.
        """
        bench = self.bench if plan is None else self.bench.under(plan)
        norm = bench.plan.privacy.clipping_norm if bench.plan.privacy.kind == "client" else None
        work = Train(pack_state(start, "float32"), norm)
        task = Task("audit", 1, client, bench.plan.digest, work, 1)
        return Worker(client, bench, lambda: ClientData(list(examples), [])).trained(task, work)

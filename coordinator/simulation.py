"""A whole federation in one process: the same rounds, messages and worker as a deployment, without the network.

Every task is signed and every reply sealed as between machines, and the bytes of their parcels are what is counted.
One bench (a backbone with the tuning method installed) serves all clients in turn, and of their examples only so much
is kept, so memory does not grow with the number of clients.
"""

from __future__ import annotations

import hmac
import os
import random
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.protocols.envelope import Charter, Desk, Identity, Signer, close_reply, open_task, sign_charter
from farfield.protocols.errors import DataError, PlanError, TrustError, WireError
from farfield.protocols.messages import Failed, Participant, Reply, Task
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .conductor import Conductor, Round, Traffic
from .runs import Checkpoint, RoundRecord, RunFolder

if TYPE_CHECKING:
    from farfield.edge_client.data import ClientData
    from farfield.emulator.bench import Bench

CACHED_BYTES = 32_000_000
"""How much memory the clients' examples may take after use, so that small data is tokenised only once."""

EXAMPLE_BYTES = 130
"""What an example takes besides its tokens of 4 bytes each."""


def bound_memory() -> None:
    """Keep the memory that torch takes from growing with the number of clients. To be called before it is imported.

    oneDNN keeps the kernels that it made for every shape of batch, 1,024 by default; many clients bring many shapes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@dataclass(frozen=True, slots=True)
class Faults:
    """Simulated trouble: the probability that a client vanishes from a round, or answers when the round is over."""

    dropout: float = 0.0
    stragglers: float = 0.0


class Observer(Protocol):
    """Is told how a simulation goes on; the console, or nobody."""

    def on_preparing(self, done: int, clients: int) -> None: ...
    def on_client(self, number: int, activity: str, done: int, clients: int) -> None: ...
    def on_round(self, record: RoundRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where one client's records come from: a file or folder, or prose of the standard library."""

    name: str
    path: Path | None = None
    texts: tuple[str, ...] = ()


def sources(clients: int | None, data: Path | None) -> list[Source]:
    """One source for each client: the entries of `data` in the order of their names, or the standard library's prose.

    Raises:
        DataError: `data` is no folder or holds fewer entries than `clients`.
    """
    from farfield.edge_client import stdlib

    if data is None:
        if clients is None:
            raise DataError(
                "how many clients?", hint="Give --clients N, or --data DIR with one file or folder per client."
            )
        return [Source(name, texts=tuple(texts)) for name, texts in stdlib.clients(clients)]
    if not data.is_dir():
        raise DataError("not a folder", where=data, hint="--data takes a folder with one file or folder per client.")
    found = [Source(path.name, path) for path in sorted(data.iterdir()) if not path.name.startswith(".")]
    if not found:
        raise DataError("the folder is empty", where=data, hint="It should hold one file or folder per client.")
    if clients is not None and clients > len(found):
        raise DataError(
            f"{clients} clients, but data for {len(found)}", where=data, hint="Lower --clients, or add data."
        )
    return found[:clients]


class Fleet:
    """The simulated clients: gives each by name as a participant, at one bench."""

    def __init__(self, plan: Plan, bench: Bench, clients: Sequence[Source]) -> None:
        self._plan = plan
        self._bench = bench
        self._sources = {client.name: client for client in clients}
        self._kept: OrderedDict[str, tuple[ClientData, int]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return sorted(self._sources)

    @property
    def frozen(self) -> str:
        return self._bench.frozen

    def client(self, name: str) -> Participant:
        from farfield.edge_client.worker import Worker

        return Worker(name, self._bench, lambda: self.data(name))

    def data(self, name: str) -> ClientData:
        """The client's examples: those used last are kept, up to `CACHED_BYTES`, the others read again."""
        if name not in self._kept:
            data = self._read(name)
            size = sum(EXAMPLE_BYTES + 4 * len(example.input_ids) for example in (*data.train, *data.held_out))
            self._kept[name] = data, size
        self._kept.move_to_end(name)
        while sum(size for _, size in self._kept.values()) > CACHED_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[name][0]

    def check(self, observer: Observer) -> None:
        """Read every client's data once, so that what is wrong with it is said before any work is done.

        Raises:
            DataError: names the client's file and line.
        """
        for done, name in enumerate(self.names, 1):
            self.data(name)
            observer.on_preparing(done, len(self.names))

    def _read(self, name: str) -> ClientData:
        from farfield.edge_client import data, records

        source, plan = self._sources[name], self._plan
        if source.path is None:
            if plan.model.task != "causal-lm":
                raise PlanError(
                    f"the built-in clients hold text without classes, so they cannot do {plan.model.task}",
                    hint="Give --data.",
                )
            read: Iterator[records.Record] = iter([records.Text(text) for text in source.texts])
        else:
            read = records.read(source.path, plan.data, plan.model.task, plan.model.labels)
        seed = derive(plan.training.seed, "held-out", name)
        where = source.path or f"client {name}"
        return data.prepare(read, self._bench.tokenizer, plan.data, plan.model.task, seed, where)


def identity(secret: bytes, client: str) -> Identity:
    """The keys of a simulated client, known wherever the run's secret is."""
    return Identity(
        Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, b"signing" + client.encode(), "sha256")),
        X25519PrivateKey.from_private_bytes(hmac.digest(secret, b"sealing" + client.encode(), "sha256")),
    )


@dataclass(frozen=True, slots=True)
class SimulatedParticipant:
    """One simulated client as its coordinator meets it: takes a task's parcel, and gives the parcel of the reply.

    Attributes:
        coordinator: the key that must have signed the task.
        sealed: whether anything is to be sealed.
    """

    name: str
    fleet: Fleet
    identity: Identity
    coordinator: Ed25519PublicKey
    sealed: bool

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to the task in `parcel`, whose frames are used up.

        Raises:
            TrustError, WireError: the task is not one that the coordinator made for this client.
        """
        key, now = self.identity.sealing, 0.0  # a simulation's clock stands still, so no task of its expires
        opened = open_task(parcel, self.name, lambda _: self.coordinator, key, now, sealed=self.sealed)
        if opened.charter.frozen != self.fleet.frozen:
            raise TrustError(
                "this process draws other frozen adapter weights than the coordinator",
                hint="The machines run different versions of torch or peft.",
            )
        return close_reply(self.fleet.client(self.name).perform(opened.task), opened, self.identity.signing)


@dataclass(frozen=True, slots=True)
class FolderJournal:
    """Keeps finished rounds in the run folder, and tells the observer."""

    folder: RunFolder
    observer: Observer

    def resume(self) -> Checkpoint | None:
        return self.folder.resume()

    def save(self, checkpoint: Checkpoint) -> None:
        self.folder.save(checkpoint)
        self.observer.on_round(checkpoint.record)


class Simulation:
    """Carries tasks to simulated clients and their replies back, in this process."""

    def __init__(self, plan: Plan, folder: RunFolder, fleet: Fleet, faults: Faults, observer: Observer) -> None:
        self._plan, self._fleet, self._faults, self._observer = plan, fleet, faults, observer
        self._run = folder.info.run
        self._journal = FolderJournal(folder, observer)
        self._sealed = plan.protection.kind == "sealed"
        self._signer = Signer(Ed25519PrivateKey.generate())
        self._charter = sign_charter(Charter(self._run, plan.canonical(), "", 0, fleet.frozen), self._signer)
        self._secret = secrets.token_bytes(32)

    def go(self, initial: State) -> Checkpoint:
        """Do the rounds that are left, and return the last checkpoint.

        Args:
            initial: the adapter before the first round, used when there is no checkpoint yet.

        Raises:
            PlanError: the Plan's aggregation rule needs more than the sum of the updates.
        """
        return Conductor(self._plan, self._run, carrier=self, journal=self._journal).go(initial)

    def now(self) -> float:
        return 0.0

    def gather(self, at_least: int) -> list[str]:
        return self._fleet.names

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        """Carry every task to its client and every reply back; stragglers answer when the round is over."""
        over = self._plan.cohort.round_seconds
        desk = Desk(self._charter, self._signer, round_.work, expires=over, sealed=self._sealed)
        tasks = list(round_.tasks())
        late: list[tuple[Parcel, Task]] = []
        for done, task in enumerate(tasks, 1):
            if round_.closed:
                break
            parcel = desk.address(task, identity(self._secret, task.node).member)
            traffic.down += parcel.size
            if activity == "training" and self._happens("dropout", self._faults.dropout, task):
                round_.lose(task.node, "dropped out (simulated)")
            elif activity == "training" and self._happens("straggler", self._faults.stragglers, task):
                late.append((parcel, task))
            else:
                round_.receive(self._exchange(parcel, task, desk, traffic), now=0.0)
            self._observer.on_client(task.round, activity, done, len(tasks))
        round_.tick(over)
        for parcel, task in late:
            round_.receive(self._exchange(parcel, task, desk, traffic), now=over)
        traffic.note(round_.problems)

    def _exchange(self, parcel: Parcel, task: Task, desk: Desk, traffic: Traffic) -> Reply:
        """The client's reply to the task, both as the bytes that would travel."""
        own, coordinator = identity(self._secret, task.node), self._signer.key.public_key()
        answer = SimulatedParticipant(task.node, self._fleet, own, coordinator, self._sealed).answer(parcel)
        traffic.up += answer.size
        try:
            return desk.open(answer, task, own.member)
        except WireError as error:
            return Reply.to(task, Failed(f"sent a reply that cannot be read: {error}"))

    def _happens(self, what: str, probability: float, task: Task) -> bool:
        return random.Random(derive(self._plan.training.seed, what, task.round, task.node)).random() < probability

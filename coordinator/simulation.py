"""A whole federation in one process: the same rounds, messages and worker as a deployment, without the network.

Every task is signed and every reply sealed as between machines, and the bytes of their parcels are what is counted.
One bench (a backbone with the tuning method installed) serves all clients in turn, or one all that take the same of the
Plan's alternatives; and of their examples only so much is kept, so memory does not grow with the number of clients.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import random
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.protocols.envelope import Charter, Desk, Identity, Signer, close_reply, open_task, sign_charter
from farfield.protocols.errors import DataError, PlanError, TrustError, TuningError, WireError, did_you_mean
from farfield.protocols.messages import Failed, Participant, Reply, Secure, Secured, Task
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import Terms
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .accounts import accounts
from .conductor import Conductor, Owner, Round, Traffic
from .releasing import Aggregate
from .runs import Checkpoint, RoundRecord, RunFolder

if TYPE_CHECKING:
    from farfield.edge_client.data import ClientData
    from farfield.edge_client.local_state import LocalState
    from farfield.edge_client.records import Record
    from farfield.edge_client.secure import Sessions, Work
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


class Clients(Protocol):
    """Those who take part in a simulation, by name."""

    @property
    def names(self) -> list[str]: ...

    @property
    def frozen(self) -> str:
        """As in a charter."""
        ...

    def bench(self, name: str) -> Bench:
        """Where the client works."""
        ...

    def client(self, name: str, sessions: Sessions | None = None) -> Participant:
        """The client, with the secure aggregations that it takes part in, where the Plan has any."""
        ...


class Fleet:
    """The simulated clients: gives each by name as a participant, at one bench, or at one for each way to tune."""

    def __init__(
        self,
        plan: Plan,
        bench: Bench,
        clients: Sequence[Source],
        keep: Path | None = None,
        others: Sequence[Bench] = (),
    ) -> None:
        """
        Args:
            keep: the folder where each client has one for what it keeps of its adapter at home.
            others: benches for the Plan's alternatives. Clients take the Plan and these in turn, by their names.
        """
        self._plan = plan
        self._keep = keep
        self._bench, self._others = bench, others
        self._sources = {client.name: client for client in clients}
        self._kept: OrderedDict[str, tuple[ClientData, int]] = OrderedDict()

    def use(self, bench: Bench, others: Sequence[Bench] = ()) -> None:
        """Have all clients work at this bench, or at these, from now on."""
        self._bench, self._others = bench, others

    def bench(self, name: str) -> Bench:
        """Where the client works."""
        return (self._bench, *self._others)[self.names.index(name) % (1 + len(self._others))]

    @property
    def names(self) -> list[str]:
        return sorted(self._sources)

    @property
    def frozen(self) -> str:
        return self._bench.frozen

    def client(self, name: str, sessions: Sessions | None = None) -> Participant:
        from farfield.edge_client.secure import Ground
        from farfield.edge_client.worker import Worker

        def secure(task: Task, asked: Secure, work: Work) -> Secured:
            assert sessions is not None
            return sessions.answer(task, asked, Ground(self._plan, "", self.frozen, Terms(1, 1)), work)

        taking_part = secure if sessions else None
        return Worker(name, self.bench(name), lambda: self.data(name), kept=self.kept(name), secure=taking_part)

    def kept(self, name: str) -> LocalState | None:
        """Where the client keeps its own part of the adapter."""
        from farfield.edge_client.local_state import LocalState

        return LocalState(self._keep / name) if self._keep else None

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

    def planted(self, name: str, records: Sequence[Record]) -> ClientData:
        """The client's examples with records among them that it does not have; for audits."""
        return self._read(name, records)

    def _read(self, name: str, planted: Sequence[Record] = ()) -> ClientData:
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
        return data.prepare(read, self._bench.tokenizer, plan.data, plan.model.task, seed, where, planted)


def kept_by(folder: RunFolder, client: str | None, number: int) -> State:
    """What the simulated `client` kept of its adapter for itself, as it was after round `number`.

    Raises:
        TuningError: no client is named, or one that kept nothing.
    """
    from farfield.edge_client.local_state import LocalState

    kept = sorted(path.name for path in folder.local_folder.iterdir()) if folder.local_folder.is_dir() else []
    if client is None:
        raise TuningError(
            "each client has an adapter of its own, and what they share changes nothing by itself",
            where=folder.path,
            hint="Give --client NAME." if kept else "The other parts never left the clients.",
        )
    state = LocalState(folder.local_folder / client).after(number) if client in kept else None
    if state is None:
        raise TuningError(
            f"no client {client!r} has trained in this run", where=folder.path, hint=did_you_mean(client, kept)
        )
    return state


def identity(secret: bytes, client: str) -> Identity:
    """The keys of a simulated client, known wherever the run's secret is."""
    return Identity(
        Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, b"signing" + client.encode(), "sha256")),
        X25519PrivateKey.from_private_bytes(hmac.digest(secret, b"sealing" + client.encode(), "sha256")),
    )


def sessions(plan: Plan, name: str, own: Identity) -> Sessions | None:
    """The secure aggregations of a simulated client, where the Plan has any.

    Rounding follows the Plan's seed, so that a simulation comes out the same twice; noise follows nothing.
    """
    from farfield.edge_client.secure import Sessions

    if plan.protection.kind != "secagg":
        return None

    def rounding(task: Task) -> Randomness:
        if plan.privacy.kind != "none":
            return Randomness()
        seed = derive(plan.training.seed, "rounding", task.round, name)
        return Randomness(hashlib.sha256(seed.to_bytes(8)).digest())

    return Sessions(name, own.signing, rounding)


@dataclass(frozen=True, slots=True)
class SimulatedParticipant:
    """One simulated client as its coordinator meets it: takes a task's parcel, and gives the parcel of the reply.

    Attributes:
        coordinator: the key that must have signed the task.
        sealed: whether anything is to be sealed.
        sessions: the secure aggregations that it takes part in; None where the Plan has none.
    """

    name: str
    fleet: Clients
    identity: Identity
    coordinator: Ed25519PublicKey
    sealed: bool
    sessions: Sessions | None

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to the task in `parcel`, whose frames are used up.

        Raises:
            TrustError, WireError: the task is not one that the coordinator made for this client.
        """
        key, now = self.identity.sealing, 0.0  # a simulation's clock stands still, so no task of its expires
        opened = open_task(parcel, self.name, lambda _: self.coordinator, key, now, sealed=self.sealed)
        if opened.charter.frozen != self.fleet.bench(self.name).frozen:
            raise TrustError(
                "this process draws other frozen adapter weights than the coordinator",
                hint="The machines run different versions of torch or peft.",
            )
        worker = self.fleet.client(self.name, self.sessions)
        return close_reply(worker.perform(opened.task), opened, self.identity.signing)


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

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        fleet: Clients,
        faults: Faults,
        observer: Observer,
        owner: Owner | None = None,
        watch: Callable[[int, Aggregate], None] | None = None,
    ) -> None:
        """
        Args:
            owner, watch: as a `Conductor` has them.
        """
        self._owner, self._watch = owner, watch
        self._plan, self._fleet, self._faults, self._observer = plan, fleet, faults, observer
        self._run = folder.info.run
        self._journal = FolderJournal(folder, observer)
        self._accounts = accounts(plan, self._run, folder.path)
        self._sealed = plan.protection.kind != "none"
        self._signer = Signer(Ed25519PrivateKey.generate())
        self.charter = Charter(self._run, plan.canonical(), "", 0, fleet.frozen)
        self._signed = sign_charter(self.charter, self._signer)
        self._secret = secrets.token_bytes(32)
        own = {name: identity(self._secret, name) for name in fleet.names}
        self._clients = {
            name: SimulatedParticipant(
                name, fleet, one, self._signer.key.public_key(), self._sealed, sessions(plan, name, one)
            )
            for name, one in own.items()
        }

    def go(self, initial: State) -> Checkpoint:
        """Do the rounds that are left, and return the last checkpoint.

        Args:
            initial: the adapter before the first round, used when there is no checkpoint yet.
        """
        conductor = Conductor(self._plan, self._run, self, self._journal, self._accounts, self._owner, self._watch)
        return conductor.go(initial)

    def now(self) -> float:
        return 0.0

    def gather(self, at_least: int) -> list[str]:
        return self._fleet.names

    def identities(self, nodes: Iterable[str]) -> dict[str, bytes]:
        return {name: self._clients[name].identity.member.signing.public_bytes_raw() for name in nodes}

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        """Carry every task to its client and every reply back; stragglers answer when the round is over."""
        over = self._plan.cohort.round_seconds
        desk = Desk(self._signed, self._signer, round_.work, expires=over, sealed=self._sealed)
        tasks = list(round_.tasks())
        late: list[tuple[Parcel, Task]] = []
        for done, task in enumerate(tasks, 1):
            if round_.closed:
                break
            parcel = desk.address(task, self._clients[task.node].identity.member)
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
        client = self._clients[task.node]
        answer = client.answer(parcel)
        traffic.up += answer.size
        try:
            return desk.open(answer, task, client.identity.member)
        except WireError as error:
            return Reply.to(task, Failed(f"sent a reply that cannot be read: {error}"))

    def _happens(self, what: str, probability: float, task: Task) -> bool:
        return random.Random(derive(self._plan.training.seed, what, task.round, task.node)).random() < probability

"""Rounds over Flower: the `ServerApp` that conducts one run, and the carrier that puts its tasks on Flower's grid.

The SuperLink starts the app in a process of its own, with the coordinator's home and the run's name. Everything that
it needs is in that home, and everything that it finishes goes there, so that when it dies another one goes on after
the last round that was saved.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid

from farfield.emulator import bundle, methods
from farfield.emulator.bundle import Manifest
from farfield.protocols import codec, plan
from farfield.protocols.envelope import Charter, Desk, Member, Signer, sign_charter
from farfield.protocols.errors import FarfieldError, RunError, StorageError, TrustError, WireError
from farfield.protocols.flower import body_record, from_record, to_record
from farfield.protocols.messages import Evaluate, Task
from farfield.protocols.parcel import release_freed_frames
from farfield.protocols.plan import Plan
from farfield.protocols.roster import open_roster, stated_key

from .accounts import accounts
from .asking import Verdict
from .conductor import Conductor, Round, Traffic
from .home import Home
from .owner import BackboneOwner
from .results import conclude, save_adapter
from .runs import Checkpoint, RunFolder
from .storage import BundleRow, Node, Run, RunState, Store

if TYPE_CHECKING:
    from farfield.emulator.distill import Check
    from farfield.emulator.search import Candidate

POLL_SECONDS: Final = 0.05
"""Between two questions for replies."""

WATCH_SECONDS: Final = 1.0
"""Between two looks at the database: who is there, and whether the run is still wanted."""

CLOCK_SECONDS: Final = 600.0
"""So much longer than its round a task may be begun: clocks differ."""

SAVE_SECONDS: Final = 2.0
"""Between two attempts to save a round on a full disk."""

HANDOVER_SECONDS: Final = 30.0
"""How long a new process waits for the one before it to let go of the run."""

# A reply is there before its objects are. Flower's grid asks for a missing one again after a second or two, while all
# else waits: a quarter or more of a round of 40 MB. (Who never sends them is given up by the SuperLink.)
http_grid.pull_objects = partial(  # type: ignore[attr-defined]
    pull_objects, initial_backoff=0.02, backoff_cap=0.2, max_tries_per_object=None
)

app = ServerApp()

log = logging.getLogger("farfield.run")


class Cancelled(Exception):
    """The run is no longer wanted."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    home, name = Home.open(Path(str(context.run_config["home"]))), str(context.run_config["run"])
    store = home.store()
    run = store.run(name)
    if run is None or run.state is not RunState.RUNNING:
        return
    _log_to(run.folder / "run.log")
    release_freed_frames()
    try:
        with _held(RunFolder.open(run.folder)) as folder:
            _conduct_or_say_why(grid, home, store, run, folder)
    finally:
        store.close()


def _conduct_or_say_why(grid: Grid, home: Home, store: Store, run: Run, folder: RunFolder) -> None:
    try:
        _conduct(grid, home, store, run, folder)
    except Cancelled:
        log.info("cancelled")
    except FarfieldError as error:  # trying again would end the same way
        log.error("failed: %s", error)
        store.end(run.name, RunState.FAILED, str(error), datetime.now(UTC))
    except Exception:
        log.exception("this process fails; the service starts another one after the last saved round")
        raise


@contextmanager
def _held(folder: RunFolder) -> Iterator[RunFolder]:
    """The folder, held. The process before this one may still be about to die with its SuperLink."""
    with ExitStack() as stack:
        limit = time.monotonic() + HANDOVER_SECONDS
        while True:
            try:
                stack.enter_context(folder.held())
                break
            except RunError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)
        yield folder


def _conduct(grid: Grid, home: Home, store: Store, run: Run, folder: RunFolder) -> None:
    from farfield.emulator import backbone
    from farfield.emulator.bench import Bench

    began = time.monotonic()
    parsed = plan.restore(run.plan, methods.registered(), where=f"run {run.name}")
    shipped, info = store.bundle(run.backbone), folder.info
    if shipped is None:
        raise RunError("its backbone's bundle is not in the database", where=f"run {run.name}")
    model_folder = Path(info.backbone)
    if backbone.fingerprint(model_folder) != info.backbone_fingerprint:
        raise RunError("the backbone has changed since this run began", where=model_folder, hint="Start a new run.")
    if not info.emulator and (model_folder / bundle.OWNER_ONLY).exists():
        raise RunError(f"the backbone has been marked {bundle.OWNER_ONLY} since", where=model_folder)
    roster = home.roster()
    roll = _DatabaseRoll(store, run.name, _vouched_for(roster))
    roll.say("loading the backbone")
    bench = Bench(parsed, shipped.folder)
    initial, frozen = bench.adapter(), bench.frozen
    del bench  # while the clients work nothing is done with it
    charter = Charter(run.name, run.plan, run.backbone, Manifest.parse(shipped.manifest).size, frozen, roster)
    carrier = GridCarrier(grid, roll, parsed, charter, home.authority().signer())
    account = accounts(parsed, run.name, home.path, home.budget)
    if account is not None:
        account.begin(max((record.round for record in folder.records()), default=0))
    owner = None
    if info.emulator:
        deliver, at = partial(_ship, store, run.name, carrier), partial(Bench, parsed)
        owner = BackboneOwner(parsed, folder, info, deliver, _Distilling(roll), at)
    last = Conductor(parsed, run.name, carrier, _Journal(folder, store, roll), account, owner).go(initial)
    if not any(record.clients for record in folder.records()):
        raise RunError(
            "no round counted an update", where=f"run {run.name}", hint=f"{folder.path / 'run.log'} has why."
        )
    roll.say("writing the adapter")
    save_adapter(folder, Bench(parsed, model_folder), last)
    conclude(folder, last, max(record.clients for record in folder.records()), time.monotonic() - began)
    store.end(run.name, RunState.FINISHED, "", datetime.now(UTC))
    log.info("finished after round %d", last.record.round)


def _ship(store: Store, run: str, carrier: GridCarrier, emulator: Path) -> None:
    """Have the run's clients fetch this emulator from now on."""
    manifest = bundle.describe(emulator, "emulator")
    store.add_bundle(BundleRow(manifest.digest, manifest.kind, emulator, manifest.canonical()))
    store.ship(run, manifest.digest)
    carrier.charter_anew(replace(carrier.charter, backbone=manifest.digest, backbone_bytes=manifest.size))
    log.info("clients get the emulator %s", manifest.digest)


@dataclass(frozen=True, slots=True)
class _Distilling:
    """Says how a new emulator comes on."""

    roll: _DatabaseRoll

    def on_stage(self, what: str) -> None: ...
    def on_candidate(self, candidate: Candidate, done: int, count: int) -> None: ...
    def on_check(self, check: Check) -> None: ...

    def on_step(self, done: int, steps: int, loss: float) -> None:
        self.roll.say(f"distilling the emulator anew: step {done} of {steps}")
        self.roll.present()


class _Journal:
    """Checkpoints in the run folder, which is the truth, and a row for each round in the database, which shows it.

    On a full disk it waits for room, for the clients' work is worth more than a wait.
    """

    def __init__(self, folder: RunFolder, store: Store, roll: _DatabaseRoll) -> None:
        self._folder, self._store, self._roll = folder, store, roll
        self._run = folder.info.run

    def resume(self) -> Checkpoint | None:
        last = self._folder.resume()
        for record in self._folder.records():  # the last may have been saved a moment before its process died
            self._patiently(record.round, partial(self._store.add_round, self._run, record))
        if last is not None:
            log.info("going on after round %d", last.record.round)
        return last

    def save(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        self._patiently(record.round, lambda: self._folder.save(checkpoint))
        self._patiently(record.round, lambda: self._store.add_round(self._run, record))
        log.info("round %d: %d updates, held-out loss %s", record.round, record.clients, record.eval_loss)

    def _patiently(self, number: int, write: Callable[[], None]) -> None:
        """Write, again and again until that works. Raises Cancelled when the run is no longer wanted."""
        while True:
            try:
                write()
                return
            except (RunError, StorageError) as error:
                log.error("round %d is not saved yet: %s", number, error)
                self._roll.say(f"round {number} cannot be saved, trying again: {error}")
                self._roll.present()
                time.sleep(SAVE_SECONDS)


@dataclass(frozen=True, slots=True)
class Present:
    """A node that can be asked.

    Attributes:
        fleet_id: Flower's number for it.
        member: its public keys.
        instance: the process that attends; another one knows nothing of a task that this one took.
    """

    fleet_id: int
    member: Member
    instance: str


class Roll(Protocol):
    """What a carrier must know of the world besides the grid."""

    def present(self) -> Mapping[str, Present]:
        """Who is there. Raises Cancelled when the run is no longer wanted."""
        ...

    def revoked(self, node: str) -> bool: ...

    def say(self, detail: str) -> None:
        """What the run does now, for a person."""
        ...

    def tell(self, node: str, text: str) -> None:
        """A notice to a node."""
        ...


class _DatabaseRoll:
    """Those who attend at the federation service and are known to Flower, by the database.

    Where a consortium's roster is installed, only those on it: a round with anybody else would be refused by all who
    ask for the roster.
    """

    def __init__(self, store: Store, run: str, members: Mapping[str, bytes] | None = None) -> None:
        self._store, self._run, self._members = store, run, members
        self._last: Mapping[str, Present] = {}

    def present(self) -> Mapping[str, Present]:
        with _bearing():
            run = self._store.run(self._run)
            if run is None or run.state is not RunState.RUNNING:
                raise Cancelled
            nodes = [node for node in self._store.nodes() if self._may_take_part(node)]
            self._last = {node.name: found for node in nodes if (found := _present(node))}
        return self._last

    def _may_take_part(self, node: Node) -> bool:
        return self._members is None or self._members.get(node.name) == node.signing_key

    def revoked(self, node: str) -> bool:
        with _bearing():
            found = self._store.node(node)
            return found is None or found.revoked_at is not None
        return False

    def say(self, detail: str) -> None:
        with _bearing():
            self._store.say(self._run, detail)

    def tell(self, node: str, text: str) -> None:
        with _bearing():
            self._store.notify(node, text, datetime.now(UTC))


def _vouched_for(roster: bytes) -> Mapping[str, bytes] | None:
    """The members of an installed roster; None where there is none. Raises TrustError when no client would take it."""
    return open_roster(roster, stated_key(roster), datetime.now(UTC)).members if roster else None


@contextmanager
def _bearing() -> Iterator[None]:
    """A database on a full disk must not end a round; what has to be written waits for room (`_Journal.save`)."""
    try:
        yield
    except StorageError as error:
        log.error("%s", error)


def _present(node: Node) -> Present | None:
    if node.revoked_at is not None or node.fleet_id is None or node.instance is None:
        return None
    return Present(node.fleet_id, Member.of(node.signing_key, node.sealing_key), node.instance)


class Post(Protocol):
    """What a carrier uses of Flower's `Grid`."""

    def get_node_ids(self) -> Iterable[int]: ...
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """A task on its way, and to whom."""

    task: Task
    node: Present


class _Puller:
    """Takes replies off the grid in threads of its own, one at a time each.

    A reply can be announced before all of it is there, and Flower then waits for the rest of it, for minutes if its
    node died meanwhile. Neither the other replies nor the clock of the round may wait with it.
    """

    def __init__(self, grid: Post, workers: int) -> None:
        self._grid, self._workers = grid, workers
        self._pool = ThreadPoolExecutor(workers, "replies")
        self._flying: dict[Future[list[Message]], str] = {}

    def arrived(self, ids: Iterable[str]) -> Iterator[Message]:
        """Asks once for the reply to each of these messages, and gives those that are there.

        At most as many are in memory as there are threads. One that is stuck is left to its thread, and comes up in a
        later call.
        """
        waiting = deque(one for one in ids if one not in self._flying.values())
        while True:
            while waiting and len(self._flying) < self._workers:
                one = waiting.popleft()
                self._flying[self._pool.submit(self._pull, one)] = one
            done, _ = wait(self._flying, POLL_SECONDS, FIRST_COMPLETED)
            if not done:
                return
            for future in [one for one in self._flying if one in done]:
                del self._flying[future]
                yield from future.result()

    def _pull(self, message_id: str) -> list[Message]:
        return list(self._grid.pull_messages([message_id]))


class GridCarrier:
    """Carries rounds over Flower's grid; adds replies as they arrive, and keeps none."""

    def __init__(
        self,
        grid: Post,
        roll: Roll,
        plan: Plan,
        charter: Charter,
        signer: Signer,
        clock: Callable[[], float] = time.monotonic,
        workers: int = 4,
    ) -> None:
        """
        Args:
            clock: gives the seconds by which rounds are timed.
            workers: how many threads ask for replies.
        """
        self._grid, self._roll, self._clock, self._puller = grid, roll, clock, _Puller(grid, workers)
        self.charter = charter
        self._signed, self._signer = sign_charter(charter, signer), signer
        self._sealed, self._seconds = plan.protection.kind != "none", plan.cohort.round_seconds
        self._overdue: dict[str, Task] = {}

    def charter_anew(self, charter: Charter) -> None:
        """Tell the participants this about the run from the next round on."""
        self.charter = charter
        self._signed = sign_charter(charter, self._signer)

    def now(self) -> float:
        return self._clock()

    def gather(self, at_least: int) -> Sequence[str]:
        """Those who are there; waits until they are enough, and says so."""
        said = None
        while True:
            online = set(self._grid.get_node_ids())
            present = [name for name, node in self._roll.present().items() if node.fleet_id in online]
            if len(present) >= at_least:
                return present
            if len(present) != said:
                said = len(present)
                self._roll.say(f"waiting for clients: {said} of at least {at_least} are there")
                log.info("waiting for clients: %d of at least %d are there", said, at_least)
            time.sleep(WATCH_SECONDS / 4)

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        present = self._roll.present()
        return {name: present[name].member.signing.public_bytes_raw() for name in nodes if name in present}

    def carry(self, round_: Round, activity: str, traffic: Traffic) -> None:
        self._roll.say(f"round {round_.number}: {activity}")
        expires = time.time() + self._seconds + CLOCK_SECONDS
        desk = Desk(self._signed, self._signer, round_.work, expires=expires, sealed=self._sealed)
        asked = self._push(round_, desk, traffic)
        watched = time.monotonic()
        while not round_.closed:
            idle = True
            for message in self._puller.arrived([*asked, *self._overdue]):
                idle = False
                answered = message.metadata.reply_to_message_id
                if one := asked.pop(answered, None):
                    self._take(round_, desk, one, message, traffic)
                elif late := self._overdue.pop(answered, None):
                    self._tell_late(late, message)
            round_.tick(self.now())
            if time.monotonic() - watched >= WATCH_SECONDS:
                watched = time.monotonic()
                self._watch(round_, asked)
            if idle and not round_.closed:
                time.sleep(POLL_SECONDS)
        self._overdue |= {message_id: one.task for message_id, one in asked.items()}
        traffic.note(round_.problems)
        for node, problem in round_.problems.items():
            log.warning("round %d, %s: %s", round_.number, node, problem)

    def _push(self, round_: Round, desk: Desk, traffic: Traffic) -> dict[str, _Asked]:
        """Put the round's tasks on the grid; what was asked, by the id of its message."""
        shared = body_record(desk.frames)
        present = self._roll.present()
        kind = "evaluate" if isinstance(round_.work, Evaluate) else "train"
        messages, waiting = [], []
        for task in round_.tasks():
            node = present.get(task.node)
            if node is None:
                round_.lose(task.node, "left before the round began")
                continue
            try:
                parcel = desk.address(task, node.member)
            except TrustError as error:
                round_.lose(task.node, f"no task can be sealed to it: {error}")
                continue
            traffic.down += parcel.size
            record = to_record(parcel, shared)
            messages.append(Message(record, dst_node_id=node.fleet_id, message_type=kind, group_id=str(task.round)))
            waiting.append(_Asked(task, node))
        asked: dict[str, _Asked] = {}
        for one, message_id in zip(waiting, self._grid.push_messages(messages), strict=True):
            if message_id:
                asked[message_id] = one
            else:
                round_.lose(one.task.node, "the SuperLink did not take its task")
        return asked

    def _take(self, round_: Round, desk: Desk, one: _Asked, message: Message, traffic: Traffic) -> None:
        node = one.task.node
        if message.has_error():
            round_.lose(node, _why(message.error))
            return
        try:
            parcel = from_record(message.content)
            traffic.up += parcel.size
            reply = desk.open(parcel, one.task, one.node.member)
        except (TrustError, WireError) as error:
            round_.lose(node, f"its reply was not accepted: {error}")
            return
        verdict = round_.receive(reply, self.now())
        log.info("round %d, %s: reply %s", one.task.round, node, verdict.value)
        if verdict is Verdict.LATE:
            self._tell_late(one.task, message)

    def _watch(self, round_: Round, asked: dict[str, _Asked]) -> None:
        """Give up on nodes that were revoked, or whose process is not the one that took the task."""
        present = self._roll.present()
        for message_id, one in list(asked.items()):
            node, now = one.task.node, present.get(one.task.node)
            if now is not None and now.instance != one.node.instance:
                round_.lose(node, "started anew in the middle of its task")
            elif now is None and self._roll.revoked(node):
                round_.lose(node, "was revoked")
            else:
                continue
            del asked[message_id]

    def _tell_late(self, task: Task, message: Message) -> None:
        if message.has_error():
            return
        log.info("round %d, %s: reply came late", task.round, task.node)
        self._roll.tell(
            task.node, f"run {task.run}: your answer to round {task.round} came after the round was closed; not counted"
        )


def _why(error: Error) -> str:
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "went away before it answered"
    if error.code == ErrorCode.MOD_FAILED_PRECONDITION:
        return f"did not accept its task: {codec.printable(error.reason or '')}"
    return f"no reply: {codec.printable(error.reason or '')}"


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)

"""The same federation on Flower's simulation engine: clients work in Ray's processes, several of them at once.

The `ClientApp` is the edge client's, carrier and conductor are the service's. New is only who answers: a process that
Ray starts is any client it is asked to be, at one bench that it loads once. Replies are counted in the order of their
tasks, however fast each client was, and no round ends before its last reply; so the result is that of the engine in
`simulation.py`.

Nothing here imports flwr or ray before it is needed: neither is to report home, and ray need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import secrets
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from farfield.protocols import plan as plans
from farfield.protocols.envelope import Charter, Signer
from farfield.protocols.errors import BackboneError, RunError, ServiceError
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Terms
from farfield.protocols.tensors import State

from .accounts import accounts
from .conductor import Conductor, Owner
from .runs import Checkpoint, RunFolder, RunInfo, writing
from .simulation import Fleet, FolderJournal, Observer, SimulatedParticipant, bound_memory, identity, sessions, sources

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

    from .flower import Present

LOG: Final = "run.log"
"""Where in the run folder Flower and Ray say what they do."""

_QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

_CLOSED: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""A Ray of our own listens on loopback only, which is the default elsewhere than on Linux, and wants a token: whoever
may speak to it may run code.
"""

_NAME: Final = "name"
_SESSIONS: Final = "sessions"

_POLL_SECONDS: Final = 0.05
_LEAVE_SECONDS: Final = 30.0
"""How long the engine's threads may take to end."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What each client at work has, as Ray counts it; as many work at once as the machines have of it."""

    cpus: float = 1.0
    gpus: float = 0.0


def check() -> None:
    """Raises ServiceError when the engine is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ServiceError(
            "Flower's simulation engine is not installed", hint="Install it with: pip install 'farfield[ray]'"
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a process must know to be any client of a run. It comes with every message, so it is small.

    Attributes:
        plan: the Plan's canonical bytes.
        coordinator: the key, raw, that signs tasks.
        secret: what the clients' keys are made of.
    """

    info: RunInfo
    plan: bytes
    coordinator: bytes
    secret: bytes = field(repr=False)


def client_app(setting: Setting) -> ClientApp:
    """The edge client's app, which also tells which of the clients it is."""
    from farfield.edge_client.flower import make_app

    app = make_app(partial(_Client, setting))
    app.query()(partial(_introduce, setting))
    return app


def _introduce(setting: Setting, message: Message, context: Context) -> Message:
    from flwr.app import ConfigRecord, Message, RecordDict

    return Message(RecordDict({_NAME: ConfigRecord({_NAME: _name(setting, context)})}), reply_to=message)


def _name(setting: Setting, context: Context) -> str:
    fleet, _ = _fleet(setting)
    return fleet.names[int(context.node_config["partition-id"])]


@dataclass(frozen=True, slots=True)
class _Client:
    """One client in whichever process is to be it now. Its secure aggregations go with Flower's context of the node."""

    setting: Setting
    context: Context

    def answer(self, parcel: Parcel) -> Parcel:
        from flwr.app import ConfigRecord

        (fleet, plan), name = _fleet(self.setting), _name(self.setting, self.context)
        own, records = identity(self.setting.secret, name), self.context.state.config_records
        taking_part = sessions(plan, name, own)
        if taking_part is not None and _SESSIONS in records:
            taking_part.restore(cast("dict[str, list[bytes]]", records[_SESSIONS]), Terms(1, 1))
        coordinator = Ed25519PublicKey.from_public_bytes(self.setting.coordinator)
        sealed = plan.protection.kind != "none"
        try:
            return SimulatedParticipant(name, fleet, own, coordinator, sealed, taking_part).answer(parcel)
        finally:
            if taking_part is not None:
                records[_SESSIONS] = ConfigRecord(dict(taking_part.dump()))


@cache
def _fleet(setting: Setting) -> tuple[Fleet, Plan]:
    """All clients, at the one bench of this process, and their Plan."""
    bound_memory()
    from farfield.emulator import backbone, methods
    from farfield.emulator.bench import Bench

    from .simulate import alternatives

    info = setting.info
    folder = Path(info.backbone)
    backbone.check(folder)
    if backbone.fingerprint(folder) != info.backbone_fingerprint:
        raise BackboneError(f"the backbone in {folder} is not the one that this run began with")
    plan = plans.restore(setting.plan, methods.registered(), where=f"run {info.run}")
    clients = sources(info.clients, Path(info.data) if info.data else None)
    shipped = Path(info.emulator) if info.emulator else folder
    others = [Bench(plan, shipped, local=way) for way in alternatives(plan)] if info.mixed else []
    return Fleet(plan, Bench(plan, shipped), clients, others=others), plan


def go(
    plan: Plan,
    folder: RunFolder,
    fleet: Fleet,
    resources: Resources,
    observer: Observer,
    initial: State,
    owner: Owner | None = None,
) -> Checkpoint:
    """Do the rounds that are left, and return the last checkpoint. Nothing that was started is left running.

    Args:
        initial: the adapter before the first round, used when there is no checkpoint yet.

    Raises:
        ServiceError: the engine cannot start, or broke down.
        RunError: a client's process failed, or the disk is full.
    """
    os.environ.update(_QUIET)
    own = not os.environ.get("RAY_ADDRESS")
    if own:
        os.environ.update(_CLOSED | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    # The way that it is now is the one that is wanted: a client without a GPU of its own sees none.
    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
    ray = importlib.import_module("ray")  # no import statement: type checkers work where it is not installed
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    signer = Signer(Ed25519PrivateKey.generate())
    coordinator = signer.key.public_key().public_bytes_raw()
    setting = Setting(folder.info, plan.canonical(), coordinator, secrets.token_bytes(32))
    stop = threading.Event()
    federation = _Federation(plan, folder, fleet, setting, signer, observer, stop, owner)
    last: Future[Checkpoint] = Future()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            last.set_result(federation.conduct(grid, initial))
        except Exception as error:  # Flower would wait a while, and print it
            last.set_exception(error)

    log = folder.path / LOG
    observer.on_client(len(folder.rounds()), "starting Flower's simulation engine", 0, len(fleet.names))
    with _logged(log), _threads_ended():
        try:
            run_simulation(app, client_app(setting), len(fleet.names), "ray", _backend(resources, own))
        except Exception as error:
            if not last.done():
                raise _broken(error, resources, log) from None
        finally:
            stop.set()
            ray.shutdown()
    return last.result(timeout=0)


@dataclass(frozen=True, slots=True)
class _Federation:
    """The coordinator's side of the run, which Flower calls its `ServerApp`."""

    plan: Plan
    folder: RunFolder
    fleet: Fleet
    setting: Setting
    signer: Signer
    observer: Observer
    stop: threading.Event
    owner: Owner | None

    def conduct(self, grid: Grid, initial: State) -> Checkpoint:
        """All rounds. Raises Cancelled when `stop` is set."""
        from .flower import GridCarrier, Present

        names, secret, run = self.fleet.names, self.setting.secret, self.setting.info.run
        nodes = self._meet(grid, len(names))
        present = {name: Present(nodes[name], identity(secret, name).member, "simulated") for name in names}
        roll = _Roll(present, self.stop)
        post = _Post(grid, {node: name for name, node in nodes.items()}, self.folder.path / LOG, self.observer, roll)
        charter = Charter(run, self.setting.plan, "", 0, self.fleet.frozen)
        # Rounds are timed by a clock that stands still: how fast these machines are says nothing about a federation.
        carrier = GridCarrier(post, roll, self.plan, charter, self.signer, clock=lambda: 0.0, workers=1)
        journal = FolderJournal(self.folder, self.observer)
        account = accounts(self.plan, run, self.folder.path)
        return Conductor(self.plan, run, carrier, journal, account, self.owner).go(initial)

    def _meet(self, grid: Grid, clients: int) -> dict[str, int]:
        """Flower's number of each client, by name. Only the nodes know which client they are, so they are asked.

        Their processes load the backbone for it, so the first round does not wait for that.
        """
        from flwr.app import Message, RecordDict

        while len(nodes := list(grid.get_node_ids())) < clients:
            self._pause()
        asked = set(grid.push_messages([Message(RecordDict(), node, "query") for node in nodes]))
        found: dict[str, int] = {}
        while asked:
            self._pause()
            for message in grid.pull_messages(asked):
                asked.discard(message.metadata.reply_to_message_id)
                _raise_error(message, "a client", self.folder.path / LOG)
                found[str(message.content.config_records[_NAME][_NAME])] = message.metadata.src_node_id
        return found

    def _pause(self) -> None:
        from .flower import Cancelled

        if self.stop.wait(_POLL_SECONDS):
            raise Cancelled


class _Roll:
    """The simulated clients, who are always there, until the run is to stop.

    Attributes:
        activity: what is done in the round, as it was last said.
    """

    def __init__(self, present: Mapping[str, Present], stop: threading.Event) -> None:
        self._present, self._stop = present, stop
        self.activity = ""

    def present(self) -> Mapping[str, Present]:
        from .flower import Cancelled

        if self._stop.is_set():
            raise Cancelled
        return self._present

    def revoked(self, node: str) -> bool:
        return False

    def say(self, detail: str) -> None:
        self.activity = detail.partition(": ")[2]

    def tell(self, node: str, text: str) -> None: ...


class _Post:
    """Flower's grid with replies in the order of their tasks, one at a time: sums then add up in one order only.

    A reply that is an error ends the run: no client is simulated to crash, so one that does is a fault of the machine
    or of Farfield.
    """

    def __init__(self, grid: Grid, names: Mapping[int, str], log: Path, observer: Observer, roll: _Roll) -> None:
        self._grid, self._names, self._log, self._observer, self._roll = grid, names, log, observer, roll
        self._due: deque[str] = deque()
        self._round, self._asked = 0, 0

    def get_node_ids(self) -> Iterable[int]:
        return self._names

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages[:1]:
            self._round = int(message.metadata.group_id)
        pushed = list(self._grid.push_messages(messages))
        self._due, self._asked = deque(pushed), len(pushed)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        if self._due and self._due[0] in wanted:
            pulled = list(self._grid.pull_messages([self._due[0]]))
            if pulled:
                self._due.popleft()
                self._observer.on_client(self._round, self._roll.activity, self._asked - len(self._due), self._asked)
        else:  # what is left of earlier rounds, which asked more clients than they needed
            pulled = list(self._grid.pull_messages(wanted - set(self._due)))
        for message in pulled:
            _raise_error(message, self._names[message.metadata.src_node_id], self._log)
        return pulled


def _raise_error(message: Message, client: str, log: Path) -> None:
    """Raises RunError when the reply is an error."""
    if message.has_error():
        reason = message.error.reason or ""
        logging.getLogger("farfield.run").error("%s failed: %s", client, reason)
        raise RunError(f"{client} failed: {_essence(reason)}", where=log, hint="This log has all of it.")


def _backend(resources: Resources, own: bool) -> dict[str, Any]:
    init: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if own:  # not one that happens to run here
        init["address"] = "local"
    return {"init_args": init, "client_resources": {"num_cpus": resources.cpus, "num_gpus": resources.gpus}}


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Have Flower, Ray and the carrier write their log to `path`, and not between the lines of the table."""
    with writing(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "ray", "farfield.run")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


@contextmanager
def _threads_ended() -> Iterator[None]:
    """Wait for the threads that were started inside, which Flower leaves to themselves when it is interrupted."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                thread.join(_LEAVE_SECONDS)


def _broken(error: BaseException, resources: Resources, log: Path) -> ServiceError:
    """What the user reads when Flower gives up."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "ActorPool is empty" in str(error):
        return ServiceError(
            f"no machine here has {resources.cpus:g} cores and {resources.gpus:g} GPUs for a client",
            hint="Lower --client-cpus or --client-gpus.",
        )
    return ServiceError(
        f"Flower's simulation engine broke down: {_essence(str(error))}", where=log, hint="This log has all of it."
    )


def _essence(text: str) -> str:
    """What went wrong, of all that Ray and Flower say about it: the last line, where a traceback has it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    return lines[-1].removeprefix("Exception ClientAppException occurred. Message: ").removesuffix("'>").rstrip(".")

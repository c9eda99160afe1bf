"""`coordinator serve`: keeps everything alive that a federation needs on the coordinator's side.

    the SuperLink            started, watched, started again; nodes registered with it and, once revoked, taken off
    a ServerApp a run        started when its turn comes, started again when it dies, stopped when it is cancelled
    enrolment, federation    the coordinator's own two ports

The database says what ought to be, and `Supervisor.step` makes it so, again and again: whatever is killed at whatever
moment, the next step finds it missing. No torch is imported here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from farfield.protocols.errors import FarfieldError, HomeError, ServiceError

from . import listening
from .admission import Limits
from .home import Home
from .runs import RunFolder
from .storage import Run, RunState, Store
from .superlink import SuperLink, SuperLinkSettings

STEP_SECONDS: Final = 0.25
BEAT_SECONDS: Final = 2.0
WATCH_SECONDS: Final = 1.0
RENEWAL_SECONDS: Final = 12 * 3600.0

MAX_CRASHES: Final = 5
"""A run whose ServerApp dies so often without finishing a round is given up."""

START_SECONDS: Final = 30.0
"""How long the SuperLink may fail to start before the service gives up."""


async def serve(home: Home, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then stop all that was started. Runs go on at the next start.

    Raises:
        HomeError: another service runs in this home.
        ServiceError: a port is taken, or the SuperLink does not start.
        StorageError: the database cannot be used.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with _alone(home):
        store = home.store(upgrade=True)
        supervisor = Supervisor(home, store, say)
        services = None
        try:
            await asyncio.to_thread(supervisor.begin)
            while not stop.is_set():
                if services is None:
                    services = await _listen(home, store)
                    say(_where(home))
                await asyncio.to_thread(supervisor.step)
                if supervisor.renewed and await asyncio.to_thread(supervisor.idle):
                    await services.stop(grace=1.0)
                    services = None
                    await asyncio.to_thread(supervisor.begin)
                await _pause(stop, STEP_SECONDS)
            say("Stopping.")
        finally:
            if services is not None:
                await services.stop(grace=1.0)
            await asyncio.to_thread(supervisor.close)
            store.rest()
            store.close()
    say("Stopped; unfinished runs go on at the next start.")


@dataclass(slots=True)
class _App:
    """A ServerApp that was started; `worked` once it was seen to hold its run's folder."""

    flower_run: int
    worked: bool = False


class Supervisor:
    """Makes what runs agree with what the database says. Its methods block; one thread calls them at a time.

    Attributes:
        renewed: a certificate was renewed, and whatever uses it should begin anew.
    """

    def __init__(self, home: Home, store: Store, say: Callable[[str], None]) -> None:
        self._home, self._store, self._say = home, store, say
        self._link: SuperLink | None = None
        self._registered: dict[str, int] = {}
        self._apps: dict[str, _App] = {}
        self._next: dict[str, float] = {}
        self._trouble = ""
        self.renewed = False

    def begin(self) -> None:
        """Start the SuperLink, after cleaning up what a killed service left in the database.

        Raises:
            ServiceError: it does not start, and did not for half a minute.
        """
        self.close()
        self._store.everyone_absent()
        self._renew()
        self.renewed = False
        self._start_link()
        self._store.beat(os.getpid(), _now())

    def step(self) -> None:
        """Look at everything once. Trouble that may pass is said, once, and looked at again in the next step.

        Raises:
            ServiceError: the SuperLink does not start any more.
        """
        if self._link is None or not self._link.alive:
            self._say("The SuperLink is gone; starting it again. Runs go on after their last finished round.")
            self._start_link()
        try:
            if self._due("beat", BEAT_SECONDS):
                self._store.beat(os.getpid(), _now())
            if self._due("renewal", RENEWAL_SECONDS):
                self._renew()
            self._keep_nodes()
            self._keep_runs()
            self._trouble = ""
        except FarfieldError as error:  # a SuperLink that just died, a database on a full disk
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error} Trying again.")

    def idle(self) -> bool:
        return not self._store.runs(RunState.RUNNING)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
            self._store.set_fleet_ids(dict.fromkeys(self._registered))

    def _renew(self) -> None:
        for name in self._home.authority().renew(self._home.settings.service.hostnames, _now()):
            self._say(f"Renewed the {name}'s certificate.")
            self.renewed = True

    def _start_link(self) -> None:
        service, keys = self._home.settings.service, self._home.path / "keys"
        self._store.set_fleet_ids({node.name: None for node in self._store.nodes()})
        self._registered, self._apps = {}, {}
        settings = SuperLinkSettings(
            fleet=str(service.fleet),
            control=str(service.control),
            authority=keys / "ca.pem",
            certificate=keys / "server.pem",
            key=keys / "server.key",
            home=self._home.superlink,
            log=self._home.logs / "superlink.log",
        )
        limit, said = time.monotonic() + START_SECONDS, ""
        while True:
            try:
                self._link = SuperLink(settings)
                return
            except ServiceError as error:  # the ports may still be held by one that is about to end
                if time.monotonic() > limit:
                    raise
                if str(error) != said:
                    said = str(error)
                    self._say(f"{said} Trying again for {START_SECONDS:g} seconds.")
                time.sleep(1.0)

    def _keep_nodes(self) -> None:
        """Register those who enrolled, and take off those who were revoked."""
        assert self._link is not None
        for node in self._store.nodes():
            known = self._registered.get(node.name)
            if node.revoked_at is None and known is None:
                self._registered[node.name] = self._link.register(node.fleet_key)
                self._store.set_fleet_ids({node.name: self._registered[node.name]})
                self._say(f"Node {node.name} is known to the SuperLink.")
            elif node.revoked_at is not None and known is not None:
                self._link.unregister(known)
                del self._registered[node.name]
                self._store.set_fleet_ids({node.name: None})
                self._say(f"Node {node.name} is revoked{f': {node.revoked_because}' if node.revoked_because else ''}.")

    def _keep_runs(self) -> None:
        """Start what waits for its turn, start again what died, and stop what nobody wants any more."""
        assert self._link is not None
        running = {run.name: run for run in self._store.runs(RunState.RUNNING)}
        if self._due("runs", WATCH_SECONDS):
            for name, one in list(self._apps.items()):
                self._look_at(name, one, running.get(name))
        for name, run in running.items():
            # What still holds the folder is a ServerApp whose SuperLink died; it is about to notice, and to end.
            if name not in self._apps and not RunFolder(run.folder).is_held:
                self._start_run(run, "goes on")
        free = self._home.settings.runs.parallel - len(running)
        for run in self._store.runs(RunState.QUEUED)[: max(0, free)]:
            self._start_run(run, "begins")

    def _start_run(self, run: Run, how: str) -> None:
        assert self._link is not None
        # RUNNING first: the ServerApp looks for it, and a run that is RUNNING without one is started at the next step.
        self._store.begin(run.name, 0, _now())
        flower_run = self._link.start_run(self._home.path, run.name)
        self._apps[run.name] = _App(flower_run)
        self._store.begin(run.name, flower_run, _now())
        self._say(f"Run {run.name} {how}.")

    def _look_at(self, name: str, app: _App, running: Run | None) -> None:
        """A run whose ServerApp was started: has it ended, or should it?"""
        assert self._link is not None
        died = self._link.ended(app.flower_run)
        if running is not None:
            held = RunFolder(running.folder).is_held
            if died is None and app.worked and not held:  # Flower notices that only after a while
                died = "killed"
                self._link.stop_run(app.flower_run)
            app.worked = app.worked or held
            if died is not None:
                self._bury(name, died)
            return
        run = self._store.run(name)
        if died is None and run is not None and run.state is RunState.CANCELLED:
            died = "cancelled"
            self._link.stop_run(app.flower_run)
        if died is not None:
            del self._apps[name]
            self._say(f"Run {name}: {'gone' if run is None else _ending(run)}.")

    def _bury(self, name: str, died: str) -> None:
        """The ServerApp of a run that goes on is dead: another one starts, unless this happened too often."""
        del self._apps[name]
        self._say(f"Run {name}: its ServerApp died ({died}).")
        crashes = self._store.crashed(name)
        if crashes >= MAX_CRASHES:
            detail = f"its ServerApp died {crashes} times without finishing a round, at last with: {died}"
            self._store.end(name, RunState.FAILED, detail, _now())

    def _due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + every
        return True


async def _listen(home: Home, store: Store) -> listening.Services:
    authority, settings, limits = home.authority(), home.settings.service, home.settings.limits
    return await listening.start(
        authority.server_credentials(),
        store,
        authority,
        enrolment_address=str(settings.enrolment),
        federation_address=str(settings.federation),
        advertised=(settings.fleet.port, settings.federation.port),
        now=_now,
        limits=Limits(message_bytes=limits.message_bytes, calls=limits.calls_per_peer, rate=limits.calls_per_second),
    )


def _where(home: Home) -> str:
    service = home.settings.service
    return (
        f"Serving as {', '.join(service.hostnames)}: enrolment at {service.enrolment}, "
        f"federation at {service.federation}, fleet at {service.fleet}."
    )


def _ending(run: Run) -> str:
    return f"{run.state.value}, {run.detail}" if run.detail else run.state.value


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the home's lock. Raises HomeError when another service holds it."""
    with home.lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HomeError("another `coordinator serve` runs here", where=home.path) from None
        yield


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


def _now() -> datetime:
    return datetime.now(UTC)

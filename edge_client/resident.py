"""The resident edge client: one process that attends at the coordinator, waits for tasks, and does them one by one.

Two connections are kept, each made anew when it breaks: attendance (`attendance.py`) and the fleet (`fleet.py`). A
reply that could not be sent is kept, and sent when the fleet is back. What ends the process is a signal, or an end of
attendance that is final.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context, Message, RecordDict
from rich.console import Console

from farfield.protocols.codec import LIMITS
from farfield.protocols.errors import HomeError, MessageTooLarge, ServiceError, TrustError, Unreachable
from farfield.protocols.federation_pb2_grpc import FederationStub
from farfield.protocols.identity import signer_key
from farfield.protocols.parcel import release_freed_frames

from .attendance import Attendance
from .bundles import Cache
from .fleet import Fleet
from .home import Home
from .keys import Keys
from .participant import Participant
from .pause import Pause
from .renewal import renew
from .resident_state import State

BUSY_POLL, IDLE_POLL, BUSY_SECONDS = 0.05, 2.0, 60.0
"""Seconds between two questions for a task: `BUSY_POLL` for `BUSY_SECONDS` after the last task, then slower by and by,
up to `IDLE_POLL`.
"""

CLOCK_SECONDS: Final = 30.0
"""A difference of clocks that the owner should know of."""

LOOK_AGAIN: Final = timedelta(hours=6)
"""How often the certificate is looked at."""

_SAVE_SECONDS: Final = 1.0
"""state.json is written at most so often while the activity merely goes on."""


def participant(home: str) -> Participant:
    """The participant of an edge client that has joined, for a process that has a connection of its own."""
    return Resident(Home.open(Path(home)), Console(stderr=True)).participant


def stay(home: Home, console: Console) -> None:
    """Attend and do tasks until SIGTERM.

    Raises:
        HomeError: another process works here.
        EnrolmentError: this node was revoked.
        TrustError: another process attends with its identity.
        KeyboardInterrupt: as soon as SIGINT comes.
    """
    with home.held():
        Resident(home, console).stay()


class Resident:
    """The process: its two connections, its participant, and what `edge-client status` shows of it."""

    def __init__(self, home: Home, console: Console) -> None:
        coordinator, keys = home.settings.coordinator, home.keys()
        self._home, self._console = home, console
        self._fleet_address = coordinator.target(coordinator.fleet_port)
        self._authority, self._fleet_key = keys.authority, keys.fleet_key()
        self._federation_address = coordinator.target(coordinator.federation_port)
        self._channel = federation_channel(self._federation_address, keys)
        self._cache = Cache(home.cache, home.settings.cache.max_bytes, self._say)
        authority = keys.authority_certificate()

        def trusted(signer: bytes) -> Ed25519PublicKey:
            try:
                certificate = x509.load_der_x509_certificate(signer)
            except (ValueError, x509.InvalidVersion):
                raise TrustError("the task carries no signing certificate") from None
            return signer_key(certificate, authority, datetime.now(UTC))

        self.participant = Participant(
            home.settings.node.name,
            keys.identity(),
            trusted,
            home.settings.consent,
            home.settings.data.source,
            lambda digest: self._cache.fetch(digest, self._channel, self._on_fetched),
            self._on_activity,
            clock=lambda: time.time() + self._attendance.ahead,
            keep=home.local,
            ledger=home.ledger,
            foretold=home.foretold,
        )
        now = datetime.now(UTC)
        instance = secrets.token_hex(8)
        last = home.state()
        fleet_id = last.fleet_id if last else None
        self._state = State(os.getpid(), instance, False, now, None, None, "connecting", None, now, fleet_id)
        self._saved = 0.0
        self._look_next = now
        self._lock = threading.Lock()
        self._attendance = self._new_attendance()

    def _new_attendance(self) -> Attendance:
        return Attendance(
            FederationStub(self._channel),
            self._state.instance,
            self._federation_address,
            on_notice=lambda text: self._say(f"The coordinator says: {text}"),
            on_break=self._on_break,
        )

    def stay(self) -> None:
        release_freed_frames()
        before = signal.signal(signal.SIGTERM, _terminate)
        self._save()
        self._attendance.begin()
        try:
            self._serve()
        except _Terminated:
            self._say("Stopped.")
        finally:
            signal.signal(signal.SIGTERM, before)
            self._attendance.end()
            self._channel.close()
            self._change(connected=False, activity="stopped", run=None, round=None)

    def _serve(self) -> None:
        """Connect to the fleet, do tasks, and connect again, until attendance is over."""
        from .flower import make_app

        app = make_app(lambda _: self.participant)
        pause = Pause(threading.Event())
        unsent: tuple[Message, float] | None = None
        while True:
            self._attend()
            try:
                ahead = self._attendance.ahead
                fleet = Fleet(self._fleet_address, self._authority, self._fleet_key, self._state.fleet_id, ahead)
            except ServiceError as error:
                self._on_break(str(error))
                pause.wait()
                continue
            try:
                self._change(fleet_id=fleet.id)
                polls = _Polls()
                while self._attendance.open.is_set() and not self._renewed():
                    if not self._state.connected:
                        self._on_connected()
                    if unsent is not None:
                        self._send(fleet, *unsent)
                        unsent = None
                        self._change(activity="waiting for a task", run=None, round=None)
                    pause.reset()
                    asked = time.monotonic()
                    message = self._receive(fleet)
                    if message is None:
                        polls.wait(self._attendance.over, took=time.monotonic() - asked)
                        continue
                    polls.reset()
                    began = time.monotonic()
                    context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
                    answer = app(message, context)
                    if answer.has_error():
                        self._on_trouble(f"a task was not done: {answer.error.reason}")
                    unsent = answer, time.monotonic() - began
            except ServiceError as error:
                self._on_break(str(error))
                pause.wait()
            finally:
                fleet.close()

    def _renewed(self) -> bool:
        """Whether there is a new certificate, so that the connections were begun anew; looks for it now and then."""
        now = datetime.now(UTC)
        if now < self._look_next:
            return False
        self._look_next = now + LOOK_AGAIN
        try:
            if not renew(self._home, self._channel, now):
                return False
        except (ServiceError, TrustError, HomeError) as error:
            self._on_trouble(str(error))
            return False
        self._say("The certificate was renewed.")
        self._attendance.end()
        self._channel.close()
        self._channel = federation_channel(self._federation_address, self._home.keys())
        self._attendance = self._new_attendance()
        self._attendance.begin()
        return True

    def _attend(self) -> None:
        """Wait until the coordinator holds the attendance. Raises TrustError when that is over for good."""
        while not self._attendance.open.wait(0.2):
            if self._attendance.over.is_set():
                assert self._attendance.reason is not None
                raise self._attendance.reason

    def _receive(self, fleet: Fleet) -> Message | None:
        try:
            return fleet.receive(LIMITS.message_bytes)  # consent may want less, and then refuses with its reason
        except MessageTooLarge as error:
            self._on_trouble(f"a task was dropped: {error}")
            return None

    def _send(self, fleet: Fleet, reply: Message, seconds: float) -> None:
        """Send the reply; one that the SuperLink refuses is dropped, for it will not take it later either."""
        try:
            fleet.send(reply, seconds)
        except Unreachable:
            raise
        except ServiceError as error:
            self._on_trouble(f"the coordinator no longer waits for the last answer, which is dropped ({error})")

    def _on_connected(self) -> None:
        self._say(f"Connected to {self._fleet_address} as {self._home.settings.node.name}; waiting for tasks.")
        if abs(ahead := self._attendance.ahead) > CLOCK_SECONDS:
            way = "behind" if ahead > 0 else "ahead of"
            self._on_trouble(
                f"This machine's clock is {abs(ahead):.0f} s {way} the coordinator's, which is used instead."
            )
        self._change(connected=True, activity="waiting for a task", run=None, round=None)

    def _on_trouble(self, what: str) -> None:
        self._say(what)
        self._change(last_error=what)

    def _on_break(self, what: str) -> None:
        """A connection broke or cannot be made; the same again and again is said once."""
        if what != self._state.last_error or self._state.connected:
            self._say(what)
        self._change(connected=False, last_error=what)

    def _on_activity(self, run: str, number: int, activity: str) -> None:
        if not activity.startswith("training, step"):
            self._say(f"Run {run}, round {number}: {activity}")
        self._change(run=run, round=number, activity=activity)

    def _on_fetched(self, done: int, total: int) -> None:
        self._change(activity=f"fetching the backbone, {done / max(total, 1):.0%}")

    def _change(self, **changes: object) -> None:
        with self._lock:
            now, before = datetime.now(UTC), self._state
            if changes.get("connected", before.connected) != before.connected:
                changes["since"] = now
            self._state = replace(before, **changes, updated=now)  # type: ignore[arg-type]
            merely = before.activity.split(",")[0] == self._state.activity.split(",")[0]
            if merely and time.monotonic() - self._saved < _SAVE_SECONDS:
                return
        self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        try:
            self._home.save_state(self._state)
        except HomeError as error:  # a full disk must not end the work
            self._console.print(str(error), style="yellow", highlight=False, markup=False)

    def _say(self, text: str) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        self._console.print(f"{stamp}  {text}", highlight=False, markup=False, soft_wrap=True)


class _Polls:
    """The pauses between questions for a task."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def reset(self) -> None:
        self._last = time.monotonic()

    def wait(self, stop: threading.Event, took: float) -> None:
        """`took`: how long the SuperLink needed to say that there is nothing; one that is slow is asked less often."""
        idle = time.monotonic() - self._last - BUSY_SECONDS
        stop.wait(min(IDLE_POLL, max(BUSY_POLL, 10 * took, idle / 10)))


def federation_channel(address: str, keys: Keys) -> grpc.Channel:
    """A channel to the federation service: this node's certificate, and no authority but the pinned one."""
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(keys.authority, keys.tls, keys.certificate),
        [
            ("grpc.max_receive_message_length", 16 * 2**20),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),  # without it a dead peer is noticed after a minute
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ],
    )


class _Terminated(BaseException):
    """SIGTERM came: leave whatever is being done, as KeyboardInterrupt does."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated

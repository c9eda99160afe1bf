"""The services of a coordinator for tests: real servers on loopback, with the database held in memory."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
from certificates import Pair, TestAuthority

from farfield.coordinator import listening
from farfield.coordinator.admission import Limits
from farfield.coordinator.storage import BundleRow, Node
from farfield.emulator.bundle import Manifest
from farfield.protocols.errors import EnrolmentError

T = TypeVar("T")

LIMITS = Limits(rate=1000, burst=1000, enrol_rate=1000, enrol_burst=1000, poll_seconds=0.01)


@dataclass
class Memory:
    """What the services ask of the database, without one. `happened` is told whatever changes."""

    nodes: dict[str, Node] = field(default_factory=dict)
    invitations: dict[bytes, str] = field(default_factory=dict)
    notices: dict[str, list[str]] = field(default_factory=dict)
    bundles: dict[str, BundleRow] = field(default_factory=dict)
    fetchable: set[str] = field(default_factory=set)
    events: list[tuple[str, ...]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def admit(self, name: str, pair: Pair) -> None:
        self.nodes[name] = Node(name, b"", b"", b"", f"{pair.serial:x}", datetime.now(UTC))

    def add(self, manifest: Manifest, folder: Path) -> None:
        self.bundles[manifest.digest] = BundleRow(manifest.digest, manifest.kind, folder, manifest.canonical())
        self.fetchable.add(manifest.digest)

    def wait_for(self, *event: str) -> None:
        """Until this has happened."""
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.events, 30), f"{event} never happened: {self.events}"

    def _happened(self, *event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def node(self, name: str) -> Node | None:
        return self.nodes.get(name)

    def redeem(self, secret: bytes, node: Node, now: datetime) -> None:
        with self.changed:
            state = self.invitations.get(secret, "unknown")
            if state != "open":
                raise EnrolmentError(f"the invitation is {state}", where="token")
            self.invitations[secret] = "used"
            self.nodes[node.name] = node

    def revoke(self, name: str, because: str, now: datetime) -> None:
        self.nodes[name] = replace(self.nodes[name], revoked_at=now, revoked_because=because)
        self._happened("revoke", name, because)

    def renewed(self, name: str, certificate: str) -> None:
        self.nodes[name] = replace(self.nodes[name], certificate=certificate)
        self._happened("renewed", name)

    def attend(self, name: str, instance: str, address: str, now: datetime) -> None:
        self._happened("attend", name, instance, address)

    def absent(self, name: str, instance: str, now: datetime) -> None:
        self._happened("absent", name, instance)

    def take_notices(self, node: str) -> list[str]:
        return self.notices.pop(node, [])

    def bundle(self, digest: str) -> BundleRow | None:
        return self.bundles.get(digest)

    def may_fetch(self, digest: str) -> bool:
        return digest in self.fetchable


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.begin(coroutine).result(30)

    def close(self) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Serving:
    """Services that run, and the ways to call them."""

    memory: Memory
    authority: TestAuthority
    services: listening.Services
    loop: Loop

    @contextmanager
    def channel(
        self, pair: Pair | None, authority: TestAuthority | None = None, port: int = 0
    ) -> Iterator[grpc.Channel]:
        """To the federation service as the node of that certificate; without one, to enrolment."""
        roots = (authority or self.authority).pem
        key, certificate = (pair.key, pair.certificate) if pair else (None, None)
        port = port or (self.services.federation_port if pair else self.services.enrolment_port)
        credentials = grpc.ssl_channel_credentials(roots, key, certificate)
        with grpc.secure_channel(
            f"localhost:{port}", credentials, [("grpc.max_receive_message_length", 16 << 20)]
        ) as it:
            yield it

    def node(self, name: str) -> Pair:
        """The certificate of a new node that is enrolled."""
        pair = self.authority.node(name)
        self.memory.admit(name, pair)
        return pair


@contextmanager
def serving(
    limits: Limits = LIMITS, memory: Memory | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Iterator[Serving]:
    memory, authority, loop = memory or Memory(), TestAuthority(), Loop()
    try:
        services = loop.run(
            listening.start(
                authority.server(),
                memory,
                authority,
                enrolment_address="127.0.0.1:0",
                federation_address="127.0.0.1:0",
                advertised=(9092, 0),
                now=now,
                limits=limits,
            )
        )
        try:
            yield Serving(memory, authority, services, loop)
        finally:
            loop.run(services.stop(0))
    finally:
        loop.close()


class Wire:
    """A connection that passes bytes on until it is cut, and then swallows them; or breaks."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._whole = True
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        self._whole = False

    def drop(self) -> None:
        """Every connection breaks; new ones are accepted."""
        for one in self._sockets[1:]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pass, args=pair))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._whole:
                    sink.sendall(data)

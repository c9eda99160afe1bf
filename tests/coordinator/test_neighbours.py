"""Who is at the other end of a connection on loopback: told from real sockets, and believed by the middleware."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.coordinator import neighbours
from farfield.coordinator.neighbours import Endpoint, SameUser, owner

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
families = pytest.mark.parametrize("family", LOOPBACK, ids=list(LOOPBACK.values()))

CALLER = """
import os, socket, sys
host, port, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if os.getuid() != user:
    os.setgroups([])
    os.setuid(user)
caller = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
caller.connect((host, port))
print(caller.getsockname()[1], flush=True)
sys.stdin.readline()
"""


def endpoint(name: tuple[Any, ...]) -> Endpoint:
    """Address and port, of all that a socket says of itself."""
    return name[0], name[1]


def ends(accepted: socket.socket) -> tuple[Endpoint, Endpoint]:
    """The caller's end and the service's, as the service sees them."""
    return endpoint(accepted.getpeername()), endpoint(accepted.getsockname())


@contextmanager
def serving(family: socket.AddressFamily) -> Iterator[socket.socket]:
    with socket.create_server((LOOPBACK[family], 0), family=family) as server:
        server.settimeout(60)  # for a caller that never comes
        yield server


@contextmanager
def connected(family: socket.AddressFamily) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection from this process to itself: the caller's and the service's."""
    with serving(family) as server, socket.create_connection(endpoint(server.getsockname())) as caller:
        accepted, _ = server.accept()
        with accepted:
            yield caller, accepted


@contextmanager
def called_by(user: int, family: socket.AddressFamily) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """Another process, which belongs to `user`, and the service's end of its connection.

    It closes its own end, and ends, when it gets a line.
    """
    with serving(family) as server:
        host, port = endpoint(server.getsockname())
        command = [sys.executable, "-c", CALLER, host, str(port), str(user)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            named = process.stdout.readline()
            accepted, _ = server.accept()
            with accepted:
                assert named == f"{accepted.getpeername()[1]}\n"
                yield process, accepted
            process.communicate("\n")
        assert process.returncode == 0


def another_user() -> int:
    """Who a process can be made to belong to from here: root can be anyone, and others only themselves."""
    return pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else os.getuid()


# --- Whose a socket is ------------------------------------------------------------------------------------------------


@families
def test_a_connection_from_this_process_is_this_users(family: socket.AddressFamily) -> None:
    with connected(family) as (caller, accepted):
        assert ends(accepted) == (endpoint(caller.getsockname()), endpoint(caller.getpeername()))
        assert owner(*ends(accepted)) == os.getuid()


@families
def test_a_connection_from_another_process_is_its_users(family: socket.AddressFamily) -> None:
    with called_by(another_user(), family) as (_, accepted):
        assert owner(*ends(accepted)) == another_user()


@families
def test_nobody_is_at_an_endpoint_that_there_is_not(family: socket.AddressFamily) -> None:
    """Both ends must be right, in their order, and of one connection."""
    elsewhere = "127.0.0.2" if family == socket.AF_INET else "::2"
    with connected(family) as (_, one), connected(family) as (_, other):
        (peer, own), (others_peer, others_own) = ends(one), ends(other)
        for unknown in (
            (others_peer, own),
            (peer, others_own),
            ((elsewhere, peer[1]), own),
            (peer, (elsewhere, own[1])),
            (own, own),
            ((peer[0], 0), own),
        ):
            assert owner(*unknown) is None
        assert owner(peer, own) == os.getuid()
    assert owner(peer, own) is None


@families
def test_a_listening_socket_is_no_caller(family: socket.AddressFamily) -> None:
    """It has an owner, and is connected to nothing."""
    with serving(family) as server:
        own = endpoint(server.getsockname())
        nothing = ("0.0.0.0" if family == socket.AF_INET else "::", 0)
        assert owner(own, nothing) is None


@families
@pytest.mark.parametrize("user", [another_user(), os.getuid()])
def test_who_has_closed_a_socket_is_nobody(family: socket.AddressFamily, user: int) -> None:
    """A request can be read after its sender has closed; what the kernel still keeps of the socket is then root's."""
    with called_by(user, family) as (process, accepted):
        peer, own = ends(accepted)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert accepted.recv(1) == b""
        assert owner(peer, own) is None
        wanted = f" {neighbours._hexadecimal(peer)} {neighbours._hexadecimal(own)} "
        table = neighbours._TABLES[4 if family == socket.AF_INET else 6].read_text(encoding="ascii")
        (kept,) = (line.split() for line in table.splitlines() if wanted in line)
        assert kept[3] in ("04", "05"), "it waits for the service's end to be closed too"


def test_without_the_kernels_tables_nobody_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_TABLES", {4: tmp_path / "tcp"})
    with connected(socket.AF_INET) as (_, accepted):
        assert owner(*ends(accepted)) is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 65535), st.sampled_from([4, 6]))
def test_an_endpoint_is_written_as_the_kernel_writes_it(number: int, port: int, version: int) -> None:
    """Against the C library's own idea of an address's bytes: four of them at a time are one word of this machine."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    raw = number.to_bytes(4, "big") * (1 if version == 4 else 4)
    address, _, shown = neighbours._hexadecimal((socket.inet_ntop(family, raw), port)).partition(":")
    words = [address[at : at + 8] for at in range(0, len(address), 8)]
    assert b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words) == raw
    assert (int(shown, 16), len(shown), address) == (port, 4, address.upper())


# --- Who is answered --------------------------------------------------------------------------------------------------


class App:
    """Answers everybody with 200, and counts them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["type"])
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"welcome"})


def status(app: App, accepted: socket.socket) -> int:
    """What the caller at the other end of `accepted` gets; `app` heard of it if that is 200, and else did not."""
    peer, own = ends(accepted)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the request was read")

    before = len(app.asked)
    scope = {"type": "http", "method": "POST", "path": "/v1/control/start-run", "client": peer, "server": own}
    asyncio.run(SameUser(app)(scope, receive, send))
    start, body = sent
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    assert len(app.asked) - before == (start["status"] == 200)
    return int(start["status"])


@families
def test_a_process_of_the_same_user_is_answered(family: socket.AddressFamily) -> None:
    app = App()
    with connected(family) as (_, accepted):
        assert status(app, accepted) == 200
    with called_by(os.getuid(), family) as (_, accepted):
        assert status(app, accepted) == 200


@families
def test_a_process_of_another_user_is_not(family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root starts a process of another user; whoever is not root becomes another user than that of the process."""
    app, user = App(), another_user()
    with called_by(user, family) as (_, accepted):
        if user == os.getuid():
            monkeypatch.setattr(os, "getuid", lambda: user + 1)
        assert status(app, accepted) == 403
        monkeypatch.setattr(os, "getuid", lambda: user)
        assert status(app, accepted) == 200
    assert app.asked == ["http"]


def test_a_process_of_root_is_answered_by_any_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could read the coordinator's keys anyway."""
    asked: list[tuple[Endpoint, Endpoint]] = []

    def of_root(peer: Endpoint, own: Endpoint) -> int:
        asked.append((peer, own))
        return 0

    monkeypatch.setattr(neighbours, "owner", of_root)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    with connected(socket.AF_INET) as (_, accepted):
        assert status(App(), accepted) == 200
        assert asked == [ends(accepted)]


@families
def test_who_is_not_known_is_not_answered(family: socket.AddressFamily) -> None:
    with connected(family) as (caller, accepted):
        assert status(App(), accepted) == 200
        caller.close()
        assert accepted.recv(1) == b""
        assert status(App(), accepted) == 403


def test_the_server_itself_may_begin_and_end() -> None:
    async def nothing(*_: Any) -> Any:
        raise AssertionError("there is nobody to answer")

    app = App()
    asyncio.run(SameUser(app)({"type": "lifespan"}, nothing, nothing))
    assert app.asked == ["lifespan"]

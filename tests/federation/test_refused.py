"""Who is turned away from a coordinator that runs, and what they are told. What a message must be to be believed is in
tests/protocols/test_envelope.py, and what a bundle must be in tests/emulator/test_bundle.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from processes import PATIENCE, Federation, eventually, federation
from toy import CLIENTS, place, plan

from farfield.coordinator.authority import Authority
from farfield.coordinator.neighbours import SameUser
from farfield.edge_client.cli import REVOKED
from farfield.edge_client.fleet import Fleet
from farfield.edge_client.home import Home
from farfield.edge_client.resident import federation_channel
from farfield.protocols import federation_pb2 as pb
from farfield.protocols.errors import ServiceError
from farfield.protocols.federation_pb2_grpc import FederationStub
from farfield.protocols.identity import Token


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        made.serve()
        yield made


@pytest.fixture(scope="module")
def member(running: Federation, toy: Path) -> Home:
    """A node that has joined."""
    return Home.open(running.enrol("member", toy / "data" / CLIENTS[0]))


def _code(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    code: grpc.StatusCode = error.value.code()
    return code


def _join(running: Federation, token: str, name: str, data: Path) -> str:
    home = running.path / f"home-of-{name}"
    address = f"localhost:{running.ports['enrolment']}"
    said = running.command(
        "edge-client", "join", address, "--token", token, "--data", data, "--name", name, "--home", home, "--no-start",
        status=2,
    )  # fmt: skip
    assert not home.exists()
    assert said.startswith("error: ") or "\nerror: " in said
    return said


def test_a_token_admits_once(running: Federation, toy: Path) -> None:
    (token,) = running.invite()
    running.command(
        "edge-client", "join", f"localhost:{running.ports['enrolment']}", "--token", token, "--data", toy / "data",
        "--name", "first", "--home", running.path / "first", "--no-start",
    )  # fmt: skip
    assert "used" in _join(running, token, "second", toy / "data")


def test_a_token_expires(running: Federation, toy: Path) -> None:
    token = Token(b"expired-16-bytes", _authority(running).fingerprint)
    with running.store() as store:
        before = datetime.now(UTC) - timedelta(hours=2)
        store.invite([hashlib.sha256(token.secret).digest()], before, timedelta(hours=1))
    assert "expired" in _join(running, token.text(), "late", toy / "data")


def test_a_token_that_was_altered_or_made_up(running: Federation, toy: Path) -> None:
    (token,) = running.invite()
    altered = token[:20] + ("A" if token[20] != "A" else "B") + token[21:]
    assert "damaged" in _join(running, altered, "altered", toy / "data")
    made_up = Token(bytes(16), _authority(running).fingerprint).text()
    assert "made no such invitation" in _join(running, made_up, "stranger", toy / "data")
    elsewhere = Token(Token.parse(token).secret, bytes(32)).text()
    assert "authority" in _join(running, elsewhere, "misled", toy / "data")


@pytest.mark.parametrize("service", ["enrolment", "federation", "fleet", "control"])
@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x00" * 64, b"SSH-2.0-scan\r\n"])
def test_a_scan_in_plain_text_learns_nothing(running: Federation, service: str, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.ports[service]), timeout=20) as scanner:
        scanner.sendall(line)
        answer = b""
        try:
            while chunk := scanner.recv(4096):
                answer += chunk
        except ConnectionResetError:
            pass
    assert b"farfield" not in answer.lower() and b"flower" not in answer.lower() and len(answer) < 128
    assert running.service is not None and running.service.status is None


CALLER = """
import encodings.idna, os, socket, ssl, sys  # all of it now: another user may not read this installation
port, user = int(sys.argv[1]), int(sys.argv[3])
trusted = ssl.create_default_context(cafile=sys.argv[2])
if os.getuid() != user:
    os.setgroups([])
    os.setuid(user)
for path in sys.argv[4:]:
    plain = socket.socket()
    plain.connect(("127.0.0.1", port))
    with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as service:
        service.sendall(f"POST {path} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
        print(service.recv(4096).split()[1].decode())
"""

STARTING_CODE = [f"/v1/control/{name}" for name in ("start-run", "list-runs", "register-node", "unregister-node")] + [
    f"/v1/runtime/{name}" for name in ("acquire-task", "pull-pending-tasks", "push-messages", "get-nodes")
]
"""Paths of the SuperLink's Control and Runtime APIs: with them one starts code, enrols nodes, and reads messages."""


def _asked_by(user: int, running: Federation, *paths: str) -> list[int]:
    """The statuses that a process of this user is answered with."""
    command = [sys.executable, "-c", CALLER, str(running.ports["control"]), running.home / "keys" / "ca.pem", str(user)]
    done = subprocess.run([*map(str, command), *paths], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_other_users_of_this_machine_get_nothing_from_the_superlink(
    running: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may open a socket here could otherwise start code as the coordinator. Every path, known or not."""
    paths = [*STARTING_CODE, "/", "/health", "/v1", "/docs"]
    mine = _asked_by(os.getuid(), running, *paths)
    assert len(mine) == len(paths)
    assert 403 not in mine
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody").pw_uid
        assert _asked_by(nobody, running, *paths) == [403] * len(paths)
        return
    # Nobody but root can make a process of another user; so this one is another user for the service's own check.
    user, control = os.getuid(), ("127.0.0.1", running.ports["control"])
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with socket.create_connection(control) as caller:
        assert _status_of(caller.getsockname(), control) == 403
        monkeypatch.setattr(os, "getuid", lambda: user)
        assert _status_of(caller.getsockname(), control) == 200


def _status_of(peer: tuple[str, int], own: tuple[str, int]) -> int:
    """What the service's check answers to a connection that there is."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def welcome(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def nothing() -> Any:
        raise AssertionError("the request was read")

    asyncio.run(SameUser(welcome)({"type": "http", "client": peer, "server": own}, nothing, send))
    return int(sent[0]["status"])


def test_no_certificate(running: Federation) -> None:
    root = (running.home / "keys" / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(root)
    with (
        grpc.secure_channel(f"localhost:{running.ports['federation']}", credentials) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        FederationStub(channel).DescribeBundle(pb.DescribeBundleRequest(bundle=bytes(32)), timeout=20)
    assert _code(refused) == grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_authority(running: Federation, member: Home, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = Authority.create(tmp_path / "keys", ["localhost"], datetime.now(UTC))
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "member")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    certificate = other.issue_node(request.public_bytes(Encoding.DER), "member", datetime.now(UTC))
    credentials = grpc.ssl_channel_credentials(
        (running.home / "keys" / "ca.pem").read_bytes(),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificate.public_bytes(Encoding.PEM),
    )
    with (
        grpc.secure_channel(f"localhost:{running.ports['federation']}", credentials) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        FederationStub(channel).DescribeBundle(pb.DescribeBundleRequest(bundle=bytes(32)), timeout=20)
    assert _code(refused) == grpc.StatusCode.UNAVAILABLE


def test_a_key_that_the_superlink_does_not_know(running: Federation, member: Home) -> None:
    with pytest.raises(ServiceError, match="the SuperLink says"):
        Fleet(f"localhost:{running.ports['fleet']}", member.keys().authority, ec.generate_private_key(ec.SECP384R1()))


def test_what_a_member_may_not_fetch(running: Federation, member: Home, toy: Path) -> None:
    """Bundles that no run needs, chunks that a bundle has not, and messages that are too large."""
    run = running.submit(plan(toy, rounds=1, steps=1, minimum=99))
    bundle = bytes.fromhex(running.run(run).backbone)
    with federation_channel(f"localhost:{running.ports['federation']}", member.keys()) as channel:
        stub = FederationStub(channel)
        described = stub.DescribeBundle(pb.DescribeBundleRequest(bundle=bundle), timeout=20)
        assert hashlib.sha256(described.manifest).digest() == bundle

        def fetch(*ranges: tuple[int, int]) -> int:
            asked = [pb.Range(first=first, count=count) for first, count in ranges]
            return sum(1 for _ in stub.FetchChunks(pb.FetchChunksRequest(bundle=bundle, ranges=asked), timeout=20))

        assert fetch((0, 1)) == 1
        for outside in [(10**6, 1), (0, 10**6), (2**63, 2**63)]:
            with pytest.raises(grpc.RpcError) as refused:
                fetch(outside)
            assert _code(refused) == grpc.StatusCode.OUT_OF_RANGE
        with pytest.raises(grpc.RpcError) as refused:
            stub.DescribeBundle(pb.DescribeBundleRequest(bundle=bytes(32)), timeout=20)
        assert _code(refused) in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED)
        with pytest.raises(grpc.RpcError) as refused:
            stub.DescribeBundle(pb.DescribeBundleRequest(bundle=bytes(2**20)), timeout=20)
        assert _code(refused) == grpc.StatusCode.RESOURCE_EXHAUSTED
    running.command("coordinator", "cancel", run, "--home", running.home)


def test_a_node_that_is_revoked_while_it_attends(running: Federation, toy: Path) -> None:
    """Its process ends and says why, and none of its keys opens anything any more."""
    client = running.join("traitor", toy / "data" / CLIENTS[1])
    keys = Home.open(running.path / "traitor").keys()
    running.command("coordinator", "revoke", "traitor", "--because", "laptop lost", "--home", running.home)
    assert client.wait() == REVOKED
    assert "was revoked on" in client.output and "UTC: laptop lost. With a new invitation" in client.output
    with (
        federation_channel(f"localhost:{running.ports['federation']}", keys) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        FederationStub(channel).DescribeBundle(pb.DescribeBundleRequest(bundle=bytes(32)), timeout=20)
    assert _code(refused) == grpc.StatusCode.PERMISSION_DENIED

    def fleet_refuses() -> bool:
        try:
            Fleet(f"localhost:{running.ports['fleet']}", keys.authority, keys.fleet_key()).close()
        except ServiceError:
            return True
        return False

    eventually(fleet_refuses, lambda: "the SuperLink still lets it in")


def _authority(running: Federation) -> Authority:
    return Authority(running.home / "keys")

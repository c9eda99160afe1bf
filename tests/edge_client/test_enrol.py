"""Enrolment against a real server on loopback: what a machine sends, believes, and says when it fails."""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from operator import attrgetter
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farfield.edge_client.consent import Consent
from farfield.edge_client.enrol import Address, authenticate, check_data, join, pin, withdraw
from farfield.edge_client.home import Home, enrolled, forget
from farfield.protocols import federation_pb2 as pb
from farfield.protocols import identity
from farfield.protocols.envelope import Member
from farfield.protocols.errors import (
    DataError,
    EnrolmentError,
    FarfieldError,
    HomeError,
    ServiceError,
    TrustError,
    Unreachable,
)
from farfield.protocols.federation_pb2_grpc import (
    EnrolmentServicer,
    FederationServicer,
    add_EnrolmentServicer_to_server,
    add_FederationServicer_to_server,
)
from farfield.protocols.identity import Token, fingerprint

DAY = timedelta(days=1)


class Authority:
    """A certificate authority of the kind that a coordinator has."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        builder = x509.CertificateBuilder(name, name, self.key.public_key(), x509.random_serial_number())
        self.certificate = (
            self._dated(builder)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA384())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        key: Any,
        name: str,
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        hosts: list[str] | None = None,
        valid: tuple[timedelta, timedelta] = (-DAY, DAY),
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(self.certificate.subject, subject, key, x509.random_serial_number())
        builder = self._dated(builder, valid).add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA384())

    @staticmethod
    def _dated(
        builder: x509.CertificateBuilder, valid: tuple[timedelta, timedelta] = (-DAY, DAY)
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return builder.not_valid_before(now + valid[0]).not_valid_after(now + valid[1])


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)


class Coordinator(EnrolmentServicer, FederationServicer):
    """Three ports as a coordinator has them, that admit whoever has an invitation and record what they hear.

    Attributes:
        issue: makes the certificate (PEM) for a signing request; a test may put another in its place.
        on_admitted: called when a node was admitted, before the answer goes out.
    """

    def __init__(
        self, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), valid: tuple[timedelta, timedelta] = (-DAY, DAY)
    ) -> None:
        self.authority = Authority()
        self.requests: list[pb.EnrolRequest] = []
        self.left: list[str] = []
        self.secrets: set[bytes] = set()
        self.nodes: set[str] = set()
        self.refusal = ""
        self.issue: Callable[[x509.CertificateSigningRequest, str], bytes] = self.issued
        self.on_admitted: Callable[[], object] = lambda: None
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.authority.issue(
            key.public_key(), "server", ExtendedKeyUsageOID.SERVER_AUTH, list(hosts), valid
        )
        self.key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.chain = certificate.public_bytes(Encoding.PEM) + self.authority.pem

    @contextmanager
    def serving(self) -> Iterator[Coordinator]:
        health: Any = importlib.import_module("grpc_health.v1.health")  # comes without types
        stubs: Any = importlib.import_module("grpc_health.v1.health_pb2_grpc")
        one_sided = grpc.ssl_server_credentials([(self.key, self.chain)])
        mutual = grpc.ssl_server_credentials([(self.key, self.chain)], self.authority.pem, require_client_auth=True)
        with ThreadPoolExecutor(4) as pool:
            enrolment, fleet, federation = grpc.server(pool), grpc.server(pool), grpc.server(pool)
            add_EnrolmentServicer_to_server(self, enrolment)
            add_FederationServicer_to_server(self, federation)
            stubs.add_HealthServicer_to_server(health.HealthServicer(), federation)
            self.port = enrolment.add_secure_port("127.0.0.1:0", one_sided)
            self.fleet_port = fleet.add_secure_port("127.0.0.1:0", one_sided)
            self.federation_port = federation.add_secure_port("127.0.0.1:0", mutual)
            servers = [enrolment, fleet, federation]
            for server in servers:
                server.start()
            try:
                yield self
            finally:
                for stopped in [server.stop(0) for server in servers]:
                    stopped.wait()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def invite(self) -> str:
        secret = secrets.token_bytes(16)
        self.secrets.add(secret)
        return Token(secret, fingerprint(self.authority.certificate)).text()

    def issued(self, request: x509.CertificateSigningRequest, name: str) -> bytes:
        return self.authority.issue(request.public_key(), name).public_bytes(Encoding.PEM)

    def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:  # noqa: N802 - of the protocol
        self.requests.append(request)
        if self.refusal or request.secret not in self.secrets:
            refusal = self.refusal or "The invitation was used on 2031-05-06 12:00 UTC. Ask for another."
            context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        self.secrets.remove(request.secret)
        self.nodes.add(request.node)
        certificate = self.issue(x509.load_der_x509_csr(request.signing_request), request.node)
        self.on_admitted()
        return pb.EnrolReply(certificate=certificate, fleet_port=self.fleet_port, federation_port=self.federation_port)

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveReply:  # noqa: N802 - of the protocol
        if self.refusal:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, self.refusal)
        self.left.append(context.auth_context()["x509_common_name"][0].decode())
        return pb.LeaveReply()

    def Attend(self, request: Any, context: Any) -> Any:  # noqa: N802 - of the protocol
        raise NotImplementedError

    Renew = DescribeBundle = FetchChunks = Attend


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with Coordinator().serving() as serving:
        yield serving


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "notes.jsonl"
    file.write_text('{"text": "Seen by nobody."}\n')
    return str(file)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "home"


def enrol(coordinator: Coordinator, place: Path, data: str, **changes: Any) -> Home:
    given: dict[str, Any] = {
        "address": coordinator.address, "token_text": None, "data": data, "home": place, "name": "ward-3",
        "now": datetime.now(UTC), "timeout": 10.0, **changes,
    }  # fmt: skip
    given["token_text"] = given["token_text"] or coordinator.invite()
    return join(**given)


def refused(kind: type[FarfieldError], action: Callable[[], object], *parts: str) -> str:
    with pytest.raises(FarfieldError) as caught:
        action()
    said = str(caught.value)
    assert type(caught.value) is kind, said
    assert "\n" not in said and ".." not in said
    for part in parts:
        assert part in said, said
    return said


# --- What goes well ---------------------------------------------------------------------------------------------------


def test_a_machine_joins(coordinator: Coordinator, place: Path, data: str) -> None:
    joined = enrol(coordinator, place, data)
    opened = Home.open(place)
    assert opened.settings == joined.settings
    settings = opened.settings.coordinator
    assert (settings.host, settings.enrolment_port) == ("localhost", coordinator.port)
    assert (settings.fleet_port, settings.federation_port) == (coordinator.fleet_port, coordinator.federation_port)
    assert (opened.settings.node.name, opened.settings.data.path) == ("ward-3", data)
    assert opened.settings.consent == Consent()
    keys = opened.keys()
    assert keys.authority == coordinator.authority.pem
    assert keys.node_certificate().public_key() == keys.tls_key().public_key()
    assert isinstance(keys.tls_key().curve, ec.SECP256R1)


def test_what_the_coordinator_hears_proves_the_keys_and_holds_no_secret_of_theirs(
    coordinator: Coordinator, place: Path, data: str
) -> None:
    keys = enrol(coordinator, place, data).keys()
    (request,) = coordinator.requests
    signing_request = x509.load_der_x509_csr(request.signing_request)
    assert signing_request.is_signature_valid
    assert signing_request.public_key() == keys.tls_key().public_key()
    assert signing_request.subject.rfc4514_string() == "CN=ward-3"
    fleet_key = load_ssh_public_key(request.fleet_key)
    assert isinstance(fleet_key, ec.EllipticCurvePublicKey) and isinstance(fleet_key.curve, ec.SECP384R1)
    assert fleet_key == keys.fleet_key().public_key()
    signing_key = Ed25519PublicKey.from_public_bytes(request.signing_key)
    assert signing_key == keys.signing_key().public_key()
    assert request.sealing_key == keys.sealing_key().public_key().public_bytes_raw()
    assert keys.identity().member == Member.of(request.signing_key, request.sealing_key)
    another = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for sealing_key, holds in ((request.sealing_key, True), (another, False)):
        parts = identity.enrolment_parts(
            request.secret, request.node, request.signing_request, request.fleet_key, request.signing_key, sealing_key
        )
        with nullcontext() if holds else pytest.raises(TrustError, match="this enrolment does not hold"):
            identity.verify(signing_key, request.proof, identity.ENROLMENT, *parts)
    sent = request.SerializeToString()
    assert keys.signing_key().private_bytes_raw() not in sent
    assert keys.sealing_key().private_bytes_raw() not in sent
    for key in (keys.tls_key(), keys.fleet_key()):
        number = key.private_numbers().private_value
        assert number.to_bytes((key.key_size + 7) // 8) not in sent


def test_the_invitation_is_not_kept(coordinator: Coordinator, place: Path, data: str) -> None:
    token = coordinator.invite()
    enrol(coordinator, place, data, token_text=token)
    secret = Token.parse(token).secret
    for file in place.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            assert token.encode() not in raw and secret not in raw and secret.hex().encode() not in raw


def test_keys_are_new_every_time(coordinator: Coordinator, tmp_path: Path, data: str) -> None:
    first = enrol(coordinator, tmp_path / "a", data).keys()
    second = enrol(coordinator, tmp_path / "b", data, name="ward-4").keys()
    secrets_of = attrgetter("tls", "fleet", "signing", "sealing")
    assert len({*secrets_of(first), *secrets_of(second)}) == 8


def test_the_consent_of_a_node_that_left_holds_for_the_next(coordinator: Coordinator, place: Path, data: str) -> None:
    first = enrol(coordinator, place, data)
    file = place / "edge-client.toml"
    file.write_text(file.read_text().replace("# max_rounds = 100", "max_rounds = 5"))
    with first.held():
        withdraw(first)
        forget(place)
    assert coordinator.left == ["ward-3"]
    second = enrol(coordinator, place, data, name="ward-3b")
    assert Home.open(place).settings.consent == second.settings.consent == Consent(max_rounds=5)


def test_a_part_of_the_standard_library_is_data(coordinator: Coordinator, place: Path) -> None:
    assert enrol(coordinator, place, "builtin:stdlib/2/3").settings.data.path == "builtin:stdlib/2/3"


# --- What is refused before the coordinator hears anything ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("coordinator.example:9094", "coordinator.example", 9094),
        ("10.0.0.5:1", "10.0.0.5", 1),
        ("[fd00::5]:65535", "fd00::5", 65535),
        ("[::ffff:10.0.0.5]:9094", "::ffff:10.0.0.5", 9094),
        ("h:9094", "h", 9094),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, text)


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "host:", ":9094", "host:0", "host:65536", "host:-1", "::1:9094", "[::1]", "[::1]:", "[host]:9094",
        "[:::::]:9094", "https://host:9094", "ho st:9094", "host:9094 ", "unix:/tmp/x:1", "-h:1", "host:٩",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    refused(EnrolmentError, lambda: Address.parse(text), "not an address", "HOST:PORT")


def test_an_altered_token_is_refused_here(coordinator: Coordinator, place: Path, data: str) -> None:
    token = coordinator.invite()
    for position in range(len(token)):
        altered = token[:position] + ("A" if token[position] != "A" else "B") + token[position + 1 :]
        said = refused(EnrolmentError, partial(enrol, coordinator, place, data, token_text=altered), "--token")
        assert token[10:] not in said and altered[10:] not in said
    assert not coordinator.requests and not place.exists()


def test_data_is_looked_for_before_the_token_is_spent(coordinator: Coordinator, place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wrong, said in {
        str(tmp_path / "nothing"): "no such file or folder",
        str(tmp_path / "empty"): "the folder is empty",
        "builtin:stdlib/3/2": "no such builtin data",
        "builtin:other": "no such builtin data",
        "builtin:stdlib/1/99999": "prose for at most",
        "caf\udce9": "not UTF-8",
    }.items():
        refused(DataError, partial(enrol, coordinator, place, wrong), said)
    assert not coordinator.requests and not place.exists()


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("Kept.")
    monkeypatch.chdir(tmp_path)
    assert check_data("notes.txt") == tmp_path / "notes.txt"


def test_data_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever runs the tests may be root, whom no mode stops.
    asked: list[int] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(mode))
    refused(DataError, lambda: check_data(str(tmp_path)), "may not be read by this user")
    assert asked == [os.R_OK | os.X_OK]


def test_a_home_that_is_there_is_not_enrolled_again(coordinator: Coordinator, place: Path, data: str) -> None:
    before = enrol(coordinator, place, data).keys()
    again = partial(enrol, coordinator, place, data, name="ward-4")
    refused(HomeError, again, "enrolled here already", "`edge-client start`", "`edge-client leave`")
    assert len(coordinator.requests) == 1
    assert Home.open(place).keys() == before


def test_settings_that_are_wrong_are_said_before_the_token_is_spent(
    coordinator: Coordinator, place: Path, data: str
) -> None:
    place.mkdir(mode=0o700)
    (place / "edge-client.toml").write_text("[consnt]\n")
    refused(HomeError, lambda: enrol(coordinator, place, data), "edge-client.toml")
    assert not coordinator.requests


def test_a_name_that_no_node_may_have(coordinator: Coordinator, place: Path, data: str) -> None:
    for name in ("", "ward 3", "/ward", "x" * 65, "-x"):
        refused(EnrolmentError, partial(enrol, coordinator, place, data, name=name), "is no name for a node")
    assert not coordinator.requests and not place.exists()


# --- Servers that are not what they should be -------------------------------------------------------------------------


def test_the_authority_of_another_coordinator_is_not_believed(coordinator: Coordinator, place: Path, data: str) -> None:
    token = Token(secrets.token_bytes(16), fingerprint(Authority().certificate)).text()
    refused(
        TrustError,
        lambda: enrol(coordinator, place, data, token_text=token),
        f"localhost:{coordinator.port}: this server is not the coordinator that the token is from",
    )
    assert not coordinator.requests and not place.exists()


def test_showing_the_right_authority_is_not_enough(place: Path, data: str) -> None:
    """Anyone can send the true authority's certificate along; the server's own must come from it."""
    true, false = Coordinator(), Coordinator()
    false.chain = false.chain.replace(false.authority.pem, true.authority.pem)
    with false.serving():
        token = true.invite()
        refused(
            TrustError,
            lambda: enrol(false, place, data, token_text=token),
            "this server's certificate is not from the coordinator's authority",
        )
    assert not false.requests and not place.exists()


@pytest.mark.parametrize(
    ("hosts", "asked", "said"),
    [
        (("localhost", "c.example"), "127.0.0.1", "is not for '127.0.0.1' but for localhost, c.example"),
        (("127.0.0.1",), "localhost", "is not for 'localhost' but for 127.0.0.1"),
    ],
)
def test_a_certificate_for_another_name(hosts: tuple[str, ...], asked: str, said: str, place: Path, data: str) -> None:
    with Coordinator(hosts=hosts).serving() as coordinator:
        address = f"{asked}:{coordinator.port}"
        refused(TrustError, lambda: enrol(coordinator, place, data, address=address), said, "hostnames")
    assert not coordinator.requests


@pytest.mark.parametrize(("valid", "said"), [((-2 * DAY, -DAY), "no longer valid"), ((DAY, 2 * DAY), "not valid yet")])
def test_a_certificate_out_of_its_time(valid: tuple[timedelta, timedelta], said: str, place: Path, data: str) -> None:
    with Coordinator(valid=valid).serving() as coordinator:
        refused(TrustError, lambda: enrol(coordinator, place, data), said, "clock")
    assert not coordinator.requests


def test_nothing_listens(coordinator: Coordinator, place: Path, data: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    refused(
        Unreachable,
        lambda: enrol(coordinator, place, data, address=f"127.0.0.1:{port}"),
        f"127.0.0.1:{port}: nothing listens there. Is `coordinator serve` running",
    )
    assert not place.exists()


@contextmanager
def plain(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that takes one connection and does not speak TLS."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def say_http(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.recv(1)  # with the rest of what was sent unread, closing resets the connection


def read_and_close(connection: socket.socket) -> None:
    connection.recv(4096)


def be_silent(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (say_http, ServiceError, "does not speak TLS (wrong version number)"),
        (hang_up, Unreachable, "the connection was closed before TLS had begun"),
        (read_and_close, ServiceError, "does not speak TLS"),
        (be_silent, Unreachable, "no answer in time"),
    ],
)
def test_a_server_without_tls(
    coordinator: Coordinator, place: Path, data: str, answer: Any, kind: type[FarfieldError], said: str
) -> None:
    with plain(answer) as address:
        refused(kind, lambda: enrol(coordinator, place, data, address=address, timeout=0.5), said, address)
    assert not place.exists()


def test_a_name_that_nobody_knows(
    coordinator: Coordinator, place: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **kwargs: Any) -> None:  # in place of a question to a real name service
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    address = "coordinator.example:9094"
    refused(Unreachable, lambda: enrol(coordinator, place, data, address=address), f"{address}: the name is not known")


def test_a_server_that_cannot_be_reached(coordinator: Coordinator, place: Path, data: str) -> None:
    # The kernel itself refuses: a broadcast address takes no connections.
    refused(Unreachable, lambda: enrol(coordinator, place, data, address="255.255.255.255:9094"), "cannot be reached")


@pytest.mark.parametrize("service", ["fleet", "federation"])
def test_the_coordinator_but_another_of_its_ports(
    coordinator: Coordinator, place: Path, data: str, service: str
) -> None:
    token, port = coordinator.invite(), getattr(coordinator, f"{service}_port")
    refused(
        ServiceError,
        lambda: enrol(coordinator, place, data, token_text=token, address=f"localhost:{port}"),
        "does not enrol at this port",
        "The token is still good",
    )
    enrol(coordinator, place, data, token_text=token)


# --- What the coordinator refuses, and what it should not send --------------------------------------------------------


def test_a_token_that_was_used(coordinator: Coordinator, tmp_path: Path, data: str) -> None:
    token = coordinator.invite()
    enrol(coordinator, tmp_path / "a", data, token_text=token)
    refused(
        EnrolmentError,
        lambda: enrol(coordinator, tmp_path / "b", data, token_text=token, name="ward-4"),
        "the coordinator refuses: The invitation was used on 2031-05-06 12:00 UTC. Ask for another",
        "ask for a new token, and for the node that got no certificate to be revoked",
    )
    assert not (tmp_path / "b").exists()


def test_what_the_coordinator_says_is_shown_without_its_control_characters(
    coordinator: Coordinator, place: Path, data: str
) -> None:
    coordinator.refusal = "The invitation\x1b[2J expired\n on 2031-05-06." + "x" * 5000
    said = refused(EnrolmentError, lambda: enrol(coordinator, place, data), "The invitation [2J expired  on 2031-05-06")
    assert said.isprintable() and len(said) < 700
    assert "was used" not in said


def other_key(coordinator: Coordinator, request: Any, name: str) -> bytes:
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    return coordinator.authority.issue(stranger, name).public_bytes(Encoding.PEM)


def other_name(coordinator: Coordinator, request: Any, name: str) -> bytes:
    return coordinator.authority.issue(request.public_key(), "ward-9").public_bytes(Encoding.PEM)


def other_authority(coordinator: Coordinator, request: Any, name: str) -> bytes:
    return Authority().issue(request.public_key(), name).public_bytes(Encoding.PEM)


def other_purpose(coordinator: Coordinator, request: Any, name: str) -> bytes:
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    return coordinator.authority.issue(request.public_key(), name, purpose).public_bytes(Encoding.PEM)


def other_time(coordinator: Coordinator, request: Any, name: str) -> bytes:
    issued = coordinator.authority.issue(request.public_key(), name, valid=(-2 * DAY, -DAY))
    return issued.public_bytes(Encoding.PEM)


def garbage(coordinator: Coordinator, request: Any, name: str) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (other_key, "it is for another key"),
        (other_name, "it is for another node than 'ward-3'"),
        (other_authority, "it is from another authority"),
        (other_purpose, "it is not for TLS clients"),
        (other_time, "this machine's clock says"),
        (garbage, "it is no certificate"),
    ],
)
def test_a_certificate_that_is_not_what_was_asked_for(
    coordinator: Coordinator, place: Path, data: str, wrong: Any, said: str
) -> None:
    coordinator.issue = lambda request, name: wrong(coordinator, request, name)
    refused(
        EnrolmentError,
        lambda: enrol(coordinator, place, data),
        "the certificate that the coordinator issued: the coordinator admitted 'ward-3', but then: ",
        said,
        "coordinator revoke ward-3",
    )
    assert not place.exists()


def test_ports_that_are_none(coordinator: Coordinator, place: Path, data: str) -> None:
    coordinator.fleet_port = 0
    refused(EnrolmentError, lambda: enrol(coordinator, place, data), "0 as a port", "coordinator revoke ward-3")
    assert not place.exists()


# --- Cut off ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_lost_leaves_a_person_knowing_what_to_do(
    coordinator: Coordinator, place: Path, data: str
) -> None:
    token, gone = coordinator.invite(), threading.Event()
    coordinator.on_admitted = gone.wait  # until the client has given up
    try:
        refused(
            Unreachable,
            lambda: enrol(coordinator, place, data, token_text=token, timeout=0.5),
            "the connection was lost while 'ward-3' enrolled (DEADLINE_EXCEEDED",
            "Give the same command again",
            "`coordinator revoke ward-3`",
            "`coordinator invite`",
        )
    finally:
        gone.set()
    assert not place.exists()
    assert coordinator.nodes == {"ward-3"}
    coordinator.on_admitted = lambda: None
    refused(EnrolmentError, lambda: enrol(coordinator, place, data, token_text=token), "was used", "to be revoked")
    enrol(coordinator, place, data, name="ward-3b")


JOIN = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from farfield.edge_client.enrol import join
join(sys.argv[1], sys.stdin.readline(), sys.argv[2], Path(sys.argv[3]), "ward-3", datetime.now(UTC))
"""


def test_killed_between_admission_and_writing(coordinator: Coordinator, place: Path, data: str) -> None:
    command = [sys.executable, "-c", JOIN, coordinator.address, data, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        coordinator.on_admitted = process.kill
        process.communicate(coordinator.invite() + "\n")
    assert process.returncode == -signal.SIGKILL
    assert coordinator.nodes == {"ward-3"}
    assert not enrolled(place)
    assert {path.name for path in place.iterdir()} <= {"resident.lock"}
    coordinator.on_admitted = lambda: None
    assert enrol(coordinator, place, data, name="ward-3b").settings.node.name == "ward-3b"


def test_a_disk_that_fails_when_the_node_is_admitted(coordinator: Coordinator, place: Path, data: str) -> None:
    coordinator.on_admitted = lambda: (place / "keys.partial").write_text("in the way")
    refused(
        EnrolmentError,
        lambda: enrol(coordinator, place, data),
        "the coordinator admitted 'ward-3', but then: cannot be used",
        "coordinator revoke ward-3",
    )
    assert not enrolled(place)


def test_two_that_join_at_once_into_one_home(coordinator: Coordinator, place: Path, data: str) -> None:
    second: list[str] = []

    def meanwhile() -> None:
        again = partial(enrol, coordinator, place, data, name="ward-4")
        second.append(refused(HomeError, again, "another edge-client process"))

    coordinator.on_admitted = meanwhile
    assert enrol(coordinator, place, data).settings.node.name == "ward-3"
    assert len(second) == len(coordinator.requests) == 1


# --- Leaving ----------------------------------------------------------------------------------------------------------


def test_leaving_is_said_with_the_node_s_own_certificate(coordinator: Coordinator, place: Path, data: str) -> None:
    withdraw(enrol(coordinator, place, data))
    assert coordinator.left == ["ward-3"]


def test_leaving_is_refused_or_unheard(place: Path, data: str) -> None:
    with Coordinator().serving() as coordinator:
        home = enrol(coordinator, place, data)
        coordinator.refusal = "Node 'ward-3' was revoked."
        refused(TrustError, lambda: withdraw(home), "the coordinator refuses: Node 'ward-3' was revoked")
    refused(Unreachable, lambda: withdraw(home, 0.5), "nothing listens there")
    assert home.keys()


def test_leaving_is_not_told_to_another_server_at_the_same_place(
    coordinator: Coordinator, place: Path, data: str
) -> None:
    home = enrol(coordinator, place, data)
    with Coordinator().serving() as impostor:
        settings = home.settings.coordinator.model_copy(update={"federation_port": impostor.federation_port})
        misled = Home(home.path, home.settings.model_copy(update={"coordinator": settings}))
        refused(TrustError, lambda: withdraw(misled), "is not from the coordinator's authority")
        assert not impostor.left
    assert not coordinator.left


def test_a_server_behind_a_proxy_that_ends_at_tls_1_2_is_believed_as_well(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(coordinator.chain)
    key.write_bytes(coordinator.key)
    context.load_cert_chain(chain, key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection, context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        address = Address("localhost", server.getsockname()[1])
        root = pin(address, fingerprint(coordinator.authority.certificate), 10)
        thread.join()
    assert root == coordinator.authority.certificate


def test_who_has_pinned_the_authority_needs_not_be_shown_it_again() -> None:
    coordinator = Coordinator()
    coordinator.chain = coordinator.chain.replace(coordinator.authority.pem, b"")
    root = coordinator.authority.certificate
    with coordinator.serving():
        server = Address("localhost", coordinator.port)
        authenticate(server, root, 10)
        refused(TrustError, lambda: pin(server, fingerprint(root), 10), "not the coordinator that the token is from")
        refused(
            TrustError,
            lambda: authenticate(server, Authority().certificate, 10),
            "is not from the coordinator's authority",
        )

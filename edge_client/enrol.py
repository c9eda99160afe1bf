"""Enrolment: how a machine becomes a node of a federation, and how it stops being one.

    token ──▶ secret, fingerprint of the authority
    1. a TLS handshake that trusts nobody: of the certificates that the server sends, one must have the fingerprint
    2. a handshake that trusts only that one: now the server is known to be the coordinator, under this very name
    3. four private keys, made here; Enrol sends their public halves, with the secret, over a channel as in 2
    4. the certificate that comes back is checked, and only then is the home written

Whatever fails before the coordinator has answered leaves nothing behind, neither here nor there. If the answer is lost,
the coordinator may count a node that never got its certificate, and the token is used up; the error then says so.
"""

from __future__ import annotations

import _ssl
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farfield.protocols import federation_pb2 as pb
from farfield.protocols import identity
from farfield.protocols.errors import DataError, EnrolmentError, FarfieldError, ServiceError, TrustError, Unreachable
from farfield.protocols.federation_pb2_grpc import EnrolmentStub, FederationStub
from farfield.protocols.identity import Token, fingerprint

from .home import Home, vacant
from .keys import Keys
from .settings import CoordinatorSettings, DataSettings, NodeSettings, Settings, target
from .sources import Part, data_source

TIMEOUT: Final = 20.0
"""Seconds for each of: a connection, a handshake, a call."""

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 65_536),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # step 1 and 2 go straight to the coordinator, and so must the rest
)

_WORDS_OF_SERVER: Final = 500
"""How many characters of what a server says go into a message."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return target(self.host, self.port)

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that HOST:PORT names; an IPv6 address stands in brackets. Raises EnrolmentError."""
        match = re.fullmatch(
            r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)):([0-9]{1,5})", text
        )
        hint = "It is HOST:PORT, for example coordinator.example:9094, 10.0.0.5:9094 or [fd00::5]:9094."
        if not match or not 1 <= int(match[3]) <= 65535 or (match[1] and not _is_ipv6(match[1])):
            raise EnrolmentError("not an address", where=text, hint=hint)
        return cls(match[1] or match[2], int(match[3]))


def join(
    address: str, token_text: str, data: str, home: Path, name: str, now: datetime, *, timeout: float = TIMEOUT
) -> Home:
    """Enrol this machine with the coordinator at `address` and make its home.

    Args:
        address: HOST:PORT of the coordinator's enrolment service.
        data: path of a file or a folder, or builtin:stdlib/I/N.
        name: what the node asks to be called.
        now: this machine's time; certificates must be valid at it.

    Returns:
        The home, with consent and cache settings kept from a node that was here before and has left.

    Raises:
        DataError: there is no such data, or it cannot be read.
        HomeError: an edge client has enrolled at `home`, or it cannot be written.
        Unreachable: the coordinator does not answer, or its answer was lost.
        ServiceError: what answers at `address` is no enrolment service.
        TrustError: another server answers at `address`, or its certificate does not hold.
        EnrolmentError: the address, the token or the name is wrong, or the coordinator does not admit the node.
    """
    server = Address.parse(address)
    token = Token.parse(token_text)
    identity.check_name(name)
    source = check_data(data)
    with vacant(home) as previous:
        authority = pin(server, token.authority, timeout)
        keys = _PrivateKeys.make()
        reply = _enrol(server, token, name, keys, authority, timeout)
        try:
            certificate = _checked(reply.certificate, name, keys, authority, now)
            settings = Settings(
                coordinator=CoordinatorSettings(
                    host=server.host,
                    enrolment_port=server.port,
                    fleet_port=_port(reply.fleet_port),
                    federation_port=_port(reply.federation_port),
                ),
                node=NodeSettings(name=name),
                data=DataSettings(path=str(source)),
            )
            if previous is not None:
                settings = settings.model_copy(update={"cache": previous.cache, "consent": previous.consent})
            return Home.create(home, settings, keys.pem(authority, certificate))
        except FarfieldError as error:
            raise EnrolmentError(
                f"the coordinator admitted {name!r}, but then: {error.what}",
                where=error.where or server,
                hint=_used(name),
            ) from None


def withdraw(home: Home, timeout: float = TIMEOUT) -> None:
    """Tell the coordinator that this node leaves; from then on its keys are worth nothing.

    Raises:
        Unreachable: it does not answer.
        TrustError: it does not take this node's certificate.
    """
    coordinator = home.settings.coordinator
    server = Address(coordinator.host, coordinator.federation_port)
    keys = home.keys()
    authenticate(server, keys.authority_certificate(), timeout)
    with channel(server, keys) as opened:
        try:
            FederationStub(opened).Leave(pb.LeaveRequest(), timeout=timeout)
        except grpc.RpcError as error:
            code, details = status(error)
            if code in _NO_ANSWER:
                raise Unreachable(f"did not answer ({code.name}: {details})", where=server) from None
            raise TrustError(f"the coordinator refuses: {details}", where=server) from None


def check_data(text: str) -> Path | Part:
    """What `text` names, made absolute, if it is there and may be read. Raises DataError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the path is not UTF-8 text", where=repr(text), hint="Rename it, or link to it.") from None
    if text.startswith("builtin:"):
        part = data_source(text)
        assert isinstance(part, Part)
        part.texts()
        return part
    try:
        path = Path(text).expanduser().absolute()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot be read: {error}", where=text) from None
    if not exists:
        raise DataError("no such file or folder", where=path, hint="--data takes the path of this machine's data.")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise DataError("may not be read by this user", where=path, hint="See to its permissions.")
    if path.is_dir() and not any(path.iterdir()):
        raise DataError("the folder is empty", where=path, hint="Put the data there first.")
    return path


def pin(server: Address, authority: bytes, timeout: float = TIMEOUT) -> x509.Certificate:
    """The certificate of the authority with this fingerprint, from `server`, whose own certificate it has issued.

    Raises:
        Unreachable: nothing answers there.
        ServiceError: what answers does not speak TLS, or to none but nodes.
        TrustError: it does not show that authority, or as `authenticate` does.
    """
    chain = _chain(server, timeout)
    root = next((one for one in chain if fingerprint(one) == authority), None)
    if root is None:
        raise TrustError(
            "this server is not the coordinator that the token is from: it shows certificates of another authority",
            where=server,
            hint=f"Check both. {_PORTS} {_BETWEEN}",
        )
    _handshake(server, root, chain[0], timeout, stranger=True)
    return root


def authenticate(server: Address, root: x509.Certificate, timeout: float = TIMEOUT) -> None:
    """Return if `server` has a certificate for its name, valid now, that the authority `root` has issued.

    Raises:
        Unreachable: nothing answers there.
        ServiceError: what answers does not speak TLS.
        TrustError: the certificate comes from elsewhere, is for another name, or is not valid now.
    """
    _handshake(server, root, next(iter(_chain(server, timeout)), None), timeout)


@contextmanager
def channel(server: Address, keys: Keys) -> Iterator[grpc.Channel]:
    """A channel to `server` over mutual TLS, as the node that `keys` are of."""
    credentials = grpc.ssl_channel_credentials(keys.authority, keys.tls, keys.certificate)
    with grpc.secure_channel(str(server), credentials, CHANNEL_OPTIONS) as opened:
        yield opened


def status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """What a failed call says: its code, and the server's words as one printable line of bounded length."""
    assert isinstance(error, grpc.Call)
    words = "".join(one if one.isprintable() else " " for one in error.details() or "")
    return error.code(), words[:_WORDS_OF_SERVER].strip().rstrip(".") or "no reason given"


@dataclass(frozen=True, slots=True)
class _PrivateKeys:
    """The keys of a node; see `Keys`."""

    tls: ec.EllipticCurvePrivateKey
    fleet: ec.EllipticCurvePrivateKey
    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey

    def __repr__(self) -> str:
        return "_PrivateKeys(…)"

    @classmethod
    def make(cls) -> _PrivateKeys:
        return cls(
            ec.generate_private_key(ec.SECP256R1()),
            ec.generate_private_key(ec.SECP384R1()),
            Ed25519PrivateKey.generate(),
            X25519PrivateKey.generate(),
        )

    def request(self, secret: bytes, name: str) -> pb.EnrolRequest:
        """What the coordinator gets to see of them."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signing_request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.tls, hashes.SHA256())
        csr = signing_request.public_bytes(Encoding.DER)
        fleet_key = self.fleet.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        signing_key = self.signing.public_key().public_bytes_raw()
        sealing_key = self.sealing.public_key().public_bytes_raw()
        parts = identity.enrolment_parts(secret, name, csr, fleet_key, signing_key, sealing_key)
        return pb.EnrolRequest(
            secret=secret,
            node=name,
            signing_request=csr,
            fleet_key=fleet_key,
            signing_key=signing_key,
            sealing_key=sealing_key,
            proof=identity.sign(self.signing, identity.ENROLMENT, *parts),
        )

    def pem(self, authority: x509.Certificate, certificate: x509.Certificate) -> Keys:
        return Keys(
            authority=_pem(authority),
            certificate=_pem(certificate),
            tls=_private_pem(self.tls),
            fleet=_private_pem(self.fleet),
            signing=_private_pem(self.signing),
            sealing=_private_pem(self.sealing),
        )


def _enrol(
    server: Address, token: Token, name: str, keys: _PrivateKeys, authority: x509.Certificate, timeout: float
) -> pb.EnrolReply:
    """The coordinator's answer. Raises EnrolmentError when it is a no, Unreachable when there is none."""
    credentials = grpc.ssl_channel_credentials(_pem(authority))
    with grpc.secure_channel(str(server), credentials, CHANNEL_OPTIONS) as opened:
        try:
            return EnrolmentStub(opened).Enrol(keys.request(token.secret, name), timeout=timeout)
        except grpc.RpcError as error:
            _explain(*status(error), server, name)


_NO_ANSWER: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    }
)
"""What a call ends with when nobody can know whether the server did what was asked."""


def _explain(code: grpc.StatusCode, details: str, server: Address, name: str) -> NoReturn:
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise _another_port(server)
    if code in _NO_ANSWER:
        raise Unreachable(
            f"the connection was lost while {name!r} enrolled ({code.name}: {details}), so the coordinator may have "
            "admitted it or not",
            where=server,
            hint=f"Give the same command again. If the token is then refused as used: {_used(name)}",
        )
    hint = ""
    if "used" in details:
        hint = (
            "If a `join` from here was cut off, it may have been that one: ask for a new token, and for the node that "
            "got no certificate to be revoked."
        )
    raise EnrolmentError(f"the coordinator refuses: {details}", where=server, hint=hint)


def _used(name: str) -> str:
    return (
        f"The token is used up and the name taken: have the node revoked (`coordinator revoke {name}`), ask for a new "
        "token (`coordinator invite`), and join under another name."
    )


def _another_port(server: Address) -> ServiceError:
    hint = f"{_PORTS} The token is still good."
    return ServiceError("the coordinator does not enrol at this port", where=server, hint=hint)


_PORTS: Final = "`join` takes the address that `coordinator invite` prints, by default with port 9094."


def _checked(pem: bytes, name: str, keys: _PrivateKeys, authority: x509.Certificate, now: datetime) -> x509.Certificate:
    """The certificate that was issued, if it is what was asked for. Raises TrustError."""
    where = "the certificate that the coordinator issued"
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("it is no certificate", where=where) from None
    check_certificate(certificate, keys.tls.public_key(), name, authority, now, where)
    return certificate


def check_certificate(
    certificate: x509.Certificate,
    key: PublicKeyTypes,
    name: str,
    authority: x509.Certificate,
    now: datetime,
    where: object,
) -> None:
    """Return if `certificate` is one of node `name` with `key`, issued by `authority` for TLS clients, valid `now`.

    Raises:
        TrustError: it is not; says in what.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError("it is from another authority", where=where) from None
    if certificate.public_key() != key:
        raise TrustError("it is for another key", where=where)
    names = [one.value for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        raise TrustError(f"it is for another node than {name!r}", where=where)
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        purposes = x509.ExtendedKeyUsage([])
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise TrustError("it is not for TLS clients", where=where)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise TrustError(
            f"it is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}",
            where=where,
        )


def _port(number: int) -> int:
    if not 1 <= number <= 65535:
        raise EnrolmentError(f"it named {number} as a port")
    return number


def _chain(server: Address, timeout: float) -> list[x509.Certificate]:
    """The certificates that `server` shows, its own first; nothing about them was verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with _explaining(server), _connected(server, context, timeout) as connection:
        # Public from Python 3.13 on (bytes); before, the same method of the inner object (its own type).
        inner: Any = connection if hasattr(connection, "get_unverified_chain") else getattr(connection, "_sslobj")  # noqa: B009
        shown = inner.get_unverified_chain() or []
        ders = [one if isinstance(one, bytes) else one.public_bytes(_ssl.ENCODING_DER) for one in shown]
        try:
            return [x509.load_der_x509_certificate(der) for der in ders]
        except (ValueError, x509.InvalidVersion):
            raise TrustError("it shows a certificate that cannot be read", where=server) from None


def _handshake(
    server: Address, root: x509.Certificate, shown: x509.Certificate | None, timeout: float, *, stranger: bool = False
) -> None:
    """A handshake that trusts `root` alone; `shown` is the server's certificate, for what there is to say about it.

    A `stranger` also waits for the server's first byte, which HTTP/2 has it send at once: in TLS 1.3 a handshake is
    over before a server that insists on a client's certificate has hung up.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=_pem(root).decode())
    with _explaining(server, shown), _connected(server, context, timeout) as connection:
        if stranger and connection.version() == "TLSv1.3" and not _heard(connection):
            raise _another_port(server)


def _heard(connection: ssl.SSLSocket) -> bool:
    """Whether the server says anything, and does not hang up."""
    try:
        return bool(connection.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


@contextmanager
def _connected(server: Address, context: ssl.SSLContext, timeout: float) -> Iterator[ssl.SSLSocket]:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((server.host, server.port), timeout) as connection,
        context.wrap_socket(connection, server_hostname=server.host) as secure,
    ):
        yield secure


@contextmanager
def _explaining(server: Address, certificate: x509.Certificate | None = None) -> Iterator[None]:
    """Turn what goes wrong with a connection into a sentence; `certificate` is the server's, when it is known."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _distrust(server, certificate, error) from None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise ServiceError(
            f"does not speak TLS ({reason})", where=server, hint=f"Is the port right? {_PORTS}"
        ) from None
    except socket.gaierror as error:
        hint = "Check the spelling, and this machine's name service."
        raise Unreachable(f"the name is not known ({error.strerror})", where=server, hint=hint) from None
    except ConnectionRefusedError:
        raise Unreachable(
            "nothing listens there", where=server, hint=f"Is `coordinator serve` running, and the port right? {_PORTS}"
        ) from None
    except TimeoutError:
        hint = "Is the address right, and does a firewall let this machine through?"
        raise Unreachable("no answer in time", where=server, hint=hint) from None
    except (ConnectionError, EOFError):
        raise Unreachable(
            "the connection was closed before TLS had begun", where=server, hint=f"Is the port right? {_PORTS}"
        ) from None
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise Unreachable(f"cannot be reached: {reason}", where=server) from None


_MISMATCH: Final = frozenset({62, 64})
_NOT_YET, _EXPIRED = 9, 10
"""Numbers that OpenSSL gives to what is wrong with a certificate (X509_V_ERR_…)."""


def _distrust(server: Address, certificate: x509.Certificate | None, error: ssl.SSLCertVerificationError) -> TrustError:
    if error.verify_code in _MISMATCH:
        names = ", ".join(_names(certificate)) if certificate else ""
        return TrustError(
            f"the coordinator's certificate is not for {server.host!r}{f' but for {names}' if names else ''}",
            where=server,
            hint=f"Use such a name, or have {server.host!r} added to the coordinator's hostnames.",
        )
    if error.verify_code in (_NOT_YET, _EXPIRED):
        state = "not valid yet" if error.verify_code == _NOT_YET else "no longer valid"
        span = ""
        if certificate:
            span = f" ({certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d})"
        return TrustError(
            f"the coordinator's certificate is {state}{span}",
            where=server,
            hint="Check this machine's clock; if it is right, the coordinator's certificate must be renewed.",
        )
    return TrustError(
        f"this server's certificate is not from the coordinator's authority ({error.verify_message})",
        where=server,
        hint=f"Check the address. {_BETWEEN}",
    )


_BETWEEN: Final = "If that is right, the coordinator was made anew, or someone is between you and it."


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    addresses = [str(one) for one in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _private_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

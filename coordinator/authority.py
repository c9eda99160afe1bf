"""The coordinator's own certificate authority, and the key that signs Plans and tasks.

    keys/  ca.key      ca.pem        the authority: ECDSA P-384, 10 years; every client pins it when it enrols
           server.key  server.pem    what the services show: ECDSA P-256, a year
           signer.key  signer.pem    signs Plans and tasks: Ed25519, a year

A renewal makes a new certificate for the key that is there, so that one file is replaced and whoever reads meanwhile
finds a pair that fits. To change a key as well, remove its file; the next renewal makes another.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farfield.protocols import identity
from farfield.protocols.durable import write
from farfield.protocols.envelope import Signer
from farfield.protocols.errors import EnrolmentError, HomeError, TrustError

RENEW_DAYS: Final = 30
"""A certificate with fewer days left than this is renewed."""

_AUTHORITY_LIFE: Final = timedelta(days=3650)
_LIFE: Final = timedelta(days=365)
_CLOCK_SKEW: Final = timedelta(days=1)  # a peer's clock may be late

_Private: TypeAlias = ec.EllipticCurvePrivateKey | Ed25519PrivateKey
_Public: TypeAlias = ec.EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class ServerCredentials:
    """What a TLS server of the coordinator needs, all PEM.

    Attributes:
        chain: the server's certificate, then the authority's, so that a client that enrols can find the one to pin.
        authority: the authority's certificate alone: what clients' certificates are checked against.
    """

    key: bytes
    chain: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "ServerCredentials(key=…)"


class Authority:
    """The folder of keys of one coordinator. Every method that reads or writes a file raises HomeError if it cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = self._certificate("ca")

    @classmethod
    def create(cls, folder: Path, hostnames: Sequence[str], now: datetime) -> Authority:
        """Make all keys and certificates in a new folder."""
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise _unwritable(error, folder) from None
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key()
        number = x509.SubjectKeyIdentifier.from_public_key(public)
        name = _name(f"Farfield coordinator {number.digest.hex()[:8]}")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            x509.CertificateBuilder(name, name, public, x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + _AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(number, critical=False)
            .sign(key, hashes.SHA384())
        )
        _write(folder / "ca.key", _private_pem(key))
        _write(folder / "ca.pem", _pem(certificate))
        authority = cls(folder)
        authority.renew_server(hostnames, now)
        authority.renew_signer(now)
        return authority

    # --- What it gives ----------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> bytes:
        """What an invitation carries of the authority; 32 bytes."""
        return identity.fingerprint(self.certificate)

    def server_credentials(self) -> ServerCredentials:
        authority = _pem(self.certificate)
        chain = _pem(self._certificate("server")) + authority
        return ServerCredentials(_private_pem(self._tls_key("server")), chain, authority)

    def signer(self) -> Signer:
        return Signer(self._signing_key(), self._certificate("signer").public_bytes(serialization.Encoding.DER))

    def issue_node(self, request: bytes, name: str, now: datetime) -> x509.Certificate:
        """A client certificate, valid for a year, for the node `name`.

        Args:
            request: PKCS #10, DER. Of what it asks for, only its key counts; the name is the caller's decision.

        Raises:
            EnrolmentError: no request, not signed by its own key, or another kind of key than P-256; or no such name.
        """
        identity.check_name(name)
        where = f"the signing request of {name}"
        try:
            asked = x509.load_der_x509_csr(request)
            signed, key = asked.is_signature_valid, asked.public_key()
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise EnrolmentError("not a signing request", where=where) from None
        if not signed:
            raise EnrolmentError("not signed by the key in it", where=where)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise EnrolmentError("another key than NIST P-256", where=where)
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._issue(name, key, now, (purpose, False))

    # --- Renewal ----------------------------------------------------------------------------------------------------

    def renew_server(self, hostnames: Sequence[str], now: datetime) -> None:
        """A new certificate for the services: for these names and addresses, and for this machine itself."""
        self._make("server", lambda: ec.generate_private_key(ec.SECP256R1()))
        key = self._tls_key("server")
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        names = x509.SubjectAlternativeName(_names(hostnames))
        certificate = self._issue("Farfield coordinator", key.public_key(), now, (purpose, False), (names, False))
        _write(self.folder / "server.pem", _pem(certificate))

    def renew_signer(self, now: datetime) -> None:
        """A new certificate for the key that signs Plans and tasks."""
        self._make("signer", Ed25519PrivateKey.generate)
        key = self._signing_key()
        purpose = x509.ExtendedKeyUsage([identity.SIGNER_EKU])
        certificate = self._issue("Farfield coordinator's signer", key.public_key(), now, (purpose, True))
        _write(self.folder / "signer.pem", _pem(certificate))

    def renew(self, hostnames: Sequence[str], now: datetime) -> list[str]:
        """Renew what is due, of "server" and "signer", and say which that was.

        Due is one that is missing or has lost its key, has less than `RENEW_DAYS` left, or is not for these hostnames.
        """
        renewed = []
        if self._due("server", now) or self._server_names() != set(_names(hostnames)):
            self.renew_server(hostnames, now)
            renewed.append("server")
        if self._due("signer", now):
            self.renew_signer(now)
            renewed.append("signer")
        return renewed

    def days_left(self, now: datetime) -> dict[str, int]:
        """Whole days for which "server", "signer" and "authority" are still valid; negative when they are not."""
        files = {"server": "server", "signer": "signer", "authority": "ca"}
        return {name: (self._certificate(file).not_valid_after_utc - now).days for name, file in files.items()}

    def _due(self, name: str, now: datetime) -> bool:
        if not all((self.folder / f"{name}.{end}").exists() for end in ("key", "pem")):
            return True
        return self._certificate(name).not_valid_after_utc - now < timedelta(days=RENEW_DAYS)

    def _server_names(self) -> set[x509.GeneralName]:
        extensions = self._certificate("server").extensions
        return set(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _issue(
        self, name: str, key: _Public, now: datetime, *extensions: tuple[x509.ExtensionType, bool]
    ) -> x509.Certificate:
        """A certificate for `key`, with these extensions (True: critical), for a year but no longer than the authority.

        Raises:
            TrustError: the authority is not valid at `now`.
        """
        first, last = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        if not first <= now < last:
            raise TrustError(
                f"valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and this machine's clock says {now:%Y-%m-%d %H:%M}",
                where="the coordinator's certificate authority",
                hint="Set this machine's clock; if it is right, make a new coordinator and let the nodes join again.",
            )
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        own = self._tls_key("ca")
        builder = (
            x509.CertificateBuilder(self.certificate.subject, _name(name), key, x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(min(now + _LIFE, last))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(own, hashes.SHA384())

    def _make(self, name: str, generate: Callable[[], _Private]) -> None:
        """Make a key where there is none."""
        if not (path := self.folder / f"{name}.key").exists():
            _write(path, _private_pem(generate()))

    def _tls_key(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = self._private_key(name)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise self._damaged(name)
        return key

    def _signing_key(self) -> Ed25519PrivateKey:
        key = self._private_key("signer")
        if not isinstance(key, Ed25519PrivateKey):
            raise self._damaged("signer")
        return key

    def _private_key(self, name: str) -> object:
        try:
            return serialization.load_pem_private_key(_read(self.folder / f"{name}.key"), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise self._damaged(name) from None

    def _damaged(self, name: str) -> HomeError:
        where = self.folder / f"{name}.key"
        return HomeError("damaged, or another kind of key", where=where, hint="Restore it from a backup.")

    def _certificate(self, name: str) -> x509.Certificate:
        path = self.folder / f"{name}.pem"
        try:
            return x509.load_pem_x509_certificate(_read(path))
        except (ValueError, x509.InvalidVersion):
            raise HomeError("not a certificate", where=path, hint="Restore it from a backup.") from None


def _names(hostnames: Sequence[str]) -> list[x509.GeneralName]:
    """As alternative names: these, and those of this machine to itself; each once."""
    names: dict[x509.GeneralName, None] = {}
    for hostname in (*hostnames, "localhost", "127.0.0.1", "::1"):
        try:
            names[x509.IPAddress(ipaddress.ip_address(hostname))] = None
        except ValueError:
            names[x509.DNSName(hostname)] = None
    return list(names)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: _Private) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise HomeError(f"cannot be read: {reason}", where=path, hint="Restore it from a backup.") from None


def _write(path: Path, raw: bytes) -> None:
    """Put `raw` at `path`, whole or not at all, for its owner only."""
    try:
        write(path, raw, mode=0o600)
    except OSError as error:
        raise _unwritable(error, path) from None


def _unwritable(error: OSError, path: Path) -> HomeError:
    reason = (error.strerror or str(error)).lower()
    return HomeError(f"cannot be written: {reason}", where=path, hint="Make room, or choose another place.")

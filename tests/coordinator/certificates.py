"""Certificates for tests: an authority that lives in memory, and what others would make to get past it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farfield.coordinator.authority import ServerCredentials
from farfield.protocols.errors import TrustError


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate, both PEM."""

    key: bytes
    certificate: bytes
    serial: int


class TestAuthority:
    """An authority of its own each time."""

    __test__ = False  # pytest, this is no test

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name("authority of a test")
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(self._subject, self._subject, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=10))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(Encoding.PEM)

    def server(self) -> ServerCredentials:
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        pair = self._pair("server", ExtendedKeyUsageOID.SERVER_AUTH, names)
        return ServerCredentials(pair.key, pair.certificate + self.pem, self.pem)

    def node(self, name: str) -> Pair:
        return self._pair(name, ExtendedKeyUsageOID.CLIENT_AUTH)

    def issue_node(self, request: bytes, name: str, now: datetime) -> x509.Certificate:
        asked = x509.load_der_x509_csr(request)
        if not asked.is_signature_valid:
            raise TrustError("not signed by the key in it", where="the signing request")
        key = asked.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self._issue(key, name, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _pair(self, name: str, purpose: x509.ObjectIdentifier, *extensions: x509.ExtensionType) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(key.public_key(), name, purpose, *extensions)
        return Pair(private_pem(key), certificate.public_bytes(Encoding.PEM), certificate.serial_number)

    def _issue(
        self, key: ec.EllipticCurvePublicKey, name: str, purpose: x509.ObjectIdentifier, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(self._subject, _name(name), key, x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=5))
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def signing_request(key: EllipticCurvePrivateKey) -> bytes:
    """PKCS #10, DER."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name("whoever"))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

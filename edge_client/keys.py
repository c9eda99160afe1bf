"""What an edge client is known by: the files of `keys/`, and the keys and certificates that are in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from farfield.protocols.errors import HomeError

if TYPE_CHECKING:
    from farfield.protocols.envelope import Identity

KEYS: Final = "keys"
FILES: Final = {
    "authority": "ca.pem", "certificate": "tls.pem", "tls": "tls.key", "fleet": "fleet.key", "signing": "signing.key",
    "sealing": "sealing.key",
}  # fmt: skip
"""The file of each attribute of `Keys`, in the folder `KEYS`."""

LOST: Final = "Without it this node is nobody: have it revoked, `edge-client leave --force`, and join again."
"""What to do about a key that is missing or damaged."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What an edge client is known by: everything in `keys/`, as PEM.

    Attributes:
        authority: the certificate of the coordinator's authority, the only one that is trusted.
        certificate: this node's, issued by that authority for `tls`.
        tls: private key, ECDSA P-256, of the TLS connections.
        fleet: private key, ECDSA P-384, that the SuperLink knows.
        signing: private key, Ed25519, that signs replies.
        sealing: private key, X25519, that opens what is sealed to this node.
    """

    authority: bytes
    certificate: bytes
    tls: bytes = field(repr=False)
    fleet: bytes = field(repr=False)
    signing: bytes = field(repr=False)
    sealing: bytes = field(repr=False)

    def authority_certificate(self) -> x509.Certificate:
        return _certificate(self.authority, "ca.pem")

    def node_certificate(self) -> x509.Certificate:
        return _certificate(self.certificate, "tls.pem")

    def tls_key(self) -> EllipticCurvePrivateKey:
        return _elliptic(self.tls, "tls.key")

    def fleet_key(self) -> EllipticCurvePrivateKey:
        return _elliptic(self.fleet, "fleet.key")

    def signing_key(self) -> Ed25519PrivateKey:
        key = _private(self.signing, "signing.key")
        if not isinstance(key, Ed25519PrivateKey):
            raise _damaged("signing.key", "not an Ed25519 key")
        return key

    def sealing_key(self) -> X25519PrivateKey:
        key = _private(self.sealing, "sealing.key")
        if not isinstance(key, X25519PrivateKey):
            raise _damaged("sealing.key", "not an X25519 key")
        return key

    def identity(self) -> Identity:
        """With which this node answers tasks."""
        from farfield.protocols.envelope import Identity  # brings numpy, which the other commands do without

        return Identity(self.signing_key(), self.sealing_key())


def _certificate(pem: bytes, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise _damaged(name, "not a certificate") from None


def _private(pem: bytes, name: str) -> Any:
    try:
        return load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise _damaged(name, "not a private key") from None


def _elliptic(pem: bytes, name: str) -> EllipticCurvePrivateKey:
    key = _private(pem, name)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise _damaged(name, "not a key on an elliptic curve")
    return key


def _damaged(name: str, what: str) -> HomeError:
    return HomeError(what, where=f"{KEYS}/{name}", hint=LOST)

"""Who is who: node names, invitation tokens, and signatures that are worth something in one context only.

Every signature covers a *domain*, the text that says what kind of statement was signed, so that a signature made for
one purpose is worth nothing for another. Signatures are Ed25519 (RFC 8032); certificates are X.509, issued by the
coordinator's own authority, which a client pins when it enrols.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import EnrolmentError, TrustError

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
"""What a node may be called."""

SIGNER_EKU: Final = x509.ObjectIdentifier("2.25.62146302873527311418306262471530894115")
"""Extended key usage of the certificate whose key signs Plans and tasks: nothing else that the authority issues has it,
so no node can sign as the coordinator. (2.25 is the arc of object identifiers that are made from a UUID.)
"""

_PREFIX: Final = "farfield1."
_SECRET_BYTES: Final = 16
_CHECK_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Token:
    """An invitation: what a person copies from the coordinator to a machine that is to join.

    Attributes:
        secret: 16 random bytes, good for one enrolment; the coordinator keeps only their SHA-256.
        authority: SHA-256 of the authority's certificate (DER), so that the client knows whom it talks to.
    """

    secret: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "Token(secret=…)"

    def text(self) -> str:
        raw = self.secret + self.authority
        return _PREFIX + base64.urlsafe_b64encode(raw + _checksum(raw)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token that `text` spells. Raises EnrolmentError when it was cut or mistyped."""
        hint = "Copy it whole, as `coordinator invite` printed it."
        body = text.strip()
        if not body.startswith(_PREFIX):
            raise EnrolmentError(f"not an invitation: a token begins with {_PREFIX!r}", where="--token", hint=hint)
        body = body.removeprefix(_PREFIX)
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        content, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        token = cls(content[:_SECRET_BYTES], content[_SECRET_BYTES:])
        # It has one spelling, though base64 leaves bits over and takes its padding or not.
        whole = len(content) == _SECRET_BYTES + hashlib.sha256().digest_size and check == _checksum(content)
        if not whole or token.text() != text.strip():
            raise EnrolmentError("the token is damaged", where="--token", hint=hint)
        return token


def check_name(name: str) -> str:
    """`name`, if a node may be called so. Raises EnrolmentError."""
    if not NAME.fullmatch(name):
        raise EnrolmentError(
            f"{name!r} is no name for a node",
            hint="1 to 64 letters, digits, '.', '_', '+' or '-', the first one a letter or a digit.",
        )
    return name


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER bytes."""
    return certificate.fingerprint(hashes.SHA256())


def statement(domain: str, *parts: bytes) -> bytes:
    """Domain and parts, each with its length in front, so that no two lists of parts give the same bytes."""
    pieces = [f"farfield {domain}".encode(), *parts]
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


def sign(key: Ed25519PrivateKey, domain: str, *parts: bytes) -> bytes:
    """Signature, 64 bytes, over `parts` as a statement of kind `domain`."""
    return key.sign(statement(domain, *parts))


def verify(key: Ed25519PublicKey, signature: bytes, domain: str, *parts: bytes) -> None:
    """Raises TrustError unless `signature` was made by `key` over the same parts in the same domain."""
    try:
        key.verify(signature, statement(domain, *parts))
    except InvalidSignature:
        raise TrustError(f"the signature on this {domain} does not hold") from None


def signer_key(signer: x509.Certificate, authority: x509.Certificate, now: datetime) -> Ed25519PublicKey:
    """The key that may sign Plans and tasks, from a certificate that the pinned authority issued for that.

    Raises:
        TrustError: issued by another authority, for another purpose, or not valid at `now`.
    """
    where = "the coordinator's signing certificate"
    try:
        signer.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError("not issued by the authority that was pinned at enrolment", where=where) from None
    try:
        purposes = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        purposes = x509.ExtendedKeyUsage([])
    if SIGNER_EKU not in purposes:
        raise TrustError("issued for another purpose", where=where)
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        raise TrustError(
            f"valid from {signer.not_valid_before_utc:%Y-%m-%d} to {signer.not_valid_after_utc:%Y-%m-%d}, "
            f"and this machine's clock says {now:%Y-%m-%d %H:%M}",
            where=where,
            hint="Set this machine's clock; if it is right, the coordinator must renew the certificate.",
        )
    key = signer.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError("not an Ed25519 key", where=where)
    return key


def enrolment_parts(
    secret: bytes, node: str, request: bytes, fleet_key: bytes, signing_key: bytes, sealing_key: bytes
) -> list[bytes]:
    """What a node signs when it enrols (domain `ENROLMENT`), to show that it holds the signing key."""
    return [secret, node.encode(), request, fleet_key, signing_key, sealing_key]


ENROLMENT: Final = "enrolment"


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:_CHECK_BYTES]

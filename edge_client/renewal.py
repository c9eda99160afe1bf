"""Renewal: a node's new certificate, in time before the old one ends. The keys stay."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from farfield.protocols import federation_pb2 as pb
from farfield.protocols.errors import ServiceError, TrustError
from farfield.protocols.federation_pb2_grpc import FederationStub

from .enrol import TIMEOUT, check_certificate, status
from .home import Home

BEFORE: Final = timedelta(days=60)
"""A certificate that ends sooner is renewed."""


def renew(home: Home, channel: grpc.Channel, now: datetime) -> bool:
    """Have the certificate renewed and keep the new one, if the old one ends soon; whether that was so.

    Args:
        channel: to the federation service, with the old certificate.

    Raises:
        ServiceError: the coordinator does not answer, or refuses.
        TrustError: what it gave is not this node's certificate.
        HomeError: the disk refuses.
    """
    keys, name = home.keys(), home.settings.node.name
    if keys.node_certificate().not_valid_after_utc - now > BEFORE:
        return False
    key = keys.tls_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    asked = pb.RenewRequest(signing_request=request.public_bytes(Encoding.DER))
    try:
        raw = FederationStub(channel).Renew(asked, timeout=TIMEOUT).certificate
    except grpc.RpcError as error:
        raise ServiceError(f"the certificate was not renewed: {status(error)[1]}") from None
    where = "the renewed certificate"
    try:
        certificate = x509.load_pem_x509_certificate(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("no certificate", where=where) from None
    check_certificate(certificate, key.public_key(), name, keys.authority_certificate(), now, where)
    home.save_certificate(raw)
    return True

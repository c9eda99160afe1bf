"""The coordinator's own services: nodes enrol, attend, leave, and fetch bundles (protocols/federation.proto).

The handlers say what each call does; `admission` says who may call, `listening` opens the ports.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Any, Protocol

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from farfield.emulator.bundle import Manifest
from farfield.protocols import federation_pb2 as wire
from farfield.protocols import identity, sealing
from farfield.protocols.errors import EnrolmentError, TrustError
from farfield.protocols.federation_pb2_grpc import EnrolmentServicer, FederationServicer

from .admission import Limits, Nodes, Peer, Refusal, address
from .presence import Attendance, Presence
from .shipping import Source
from .storage import BundleRow, Node

ATTEND = "/farfield.federation.v1.Federation/Attend"

_SEEN_SECONDS = 15.0  # how often the database is told that a node still attends
_SOURCES = 8
_INSTANCE = re.compile(r"[A-Za-z0-9-]{1,64}")
_MAX_REQUEST = 4 << 10


class Admissions(Protocol):
    """Where invitations are redeemed."""

    def redeem(self, secret: bytes, node: Node, now: datetime) -> None: ...


class Issuer(Protocol):
    """The certificate authority. Raises TrustError for a signing request that it does not accept."""

    def issue_node(self, request: bytes, name: str, now: datetime) -> x509.Certificate: ...


class Registry(Admissions, Nodes, Attendance, Protocol):
    """What the services ask of the database. Every method may block."""

    def revoke(self, name: str, because: str, now: datetime) -> None: ...
    def renewed(self, name: str, certificate: str) -> None: ...
    def take_notices(self, node: str) -> list[str]: ...
    def bundle(self, digest: str) -> BundleRow | None: ...
    def may_fetch(self, digest: str) -> bool: ...


class Enrolments(EnrolmentServicer):
    """Admits whoever holds an invitation.

    Args:
        ports: of the SuperLink's fleet API and of the federation service, which the new node is told.
    """

    def __init__(
        self, registry: Admissions, issuer: Issuer, ports: tuple[int, int], now: Callable[[], datetime]
    ) -> None:
        self._registry, self._issuer, self._ports, self._now = registry, issuer, ports, now

    async def Enrol(self, request: wire.EnrolRequest, context: Any) -> wire.EnrolReply:  # noqa: N802 - of the protocol
        return await asyncio.to_thread(self._enrol, request)

    def _enrol(self, request: wire.EnrolRequest) -> wire.EnrolReply:
        """Raises EnrolmentError or TrustError, and then nothing has changed. Nothing of the request is ever logged."""
        name = identity.check_name(request.node)
        fleet_key = _fleet_key(request.fleet_key)
        signing_key = _signing_key(request.signing_key)
        if len(request.signing_request) > _MAX_REQUEST:
            raise EnrolmentError("the signing request is too long", where=name)
        try:
            sealing.seal((), request.sealing_key, b"")
        except TrustError:
            raise EnrolmentError("the sealing key is not an X25519 key of 32 bytes", where=name) from None
        proven = identity.enrolment_parts(
            request.secret,
            request.node,
            request.signing_request,
            request.fleet_key,
            request.signing_key,
            request.sealing_key,
        )
        identity.verify(signing_key, request.proof, identity.ENROLMENT, *proven)
        # The certificate is made first and handed out last. Until the node stands in the database, which happens in the
        # same transaction as the invitation is used up, the certificate opens nothing. So after a crash before `redeem`
        # the invitation is still good; after a crash behind it the node is enrolled but has no certificate, nobody has,
        # and it needs another invitation and another name.
        now = self._now()
        certificate = self._issuer.issue_node(request.signing_request, name, now)
        keys = (fleet_key, request.signing_key, request.sealing_key)
        node = Node(name, *keys, f"{certificate.serial_number:x}", now)
        self._registry.redeem(request.secret, node, now)
        fleet_port, federation_port = self._ports
        return wire.EnrolReply(
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            fleet_port=fleet_port,
            federation_port=federation_port,
        )


class Federation(FederationServicer):
    """Serves the nodes that are enrolled; the gate before it has made sure that the caller is one.

    Args:
        readers: threads that read bundles, apart from those that ask the database.
    """

    def __init__(
        self, registry: Registry, issuer: Issuer, limits: Limits, readers: Executor, now: Callable[[], datetime]
    ) -> None:
        self._registry, self._issuer = registry, issuer
        self._limits, self._readers, self._now = limits, readers, now
        self._presence = Presence(registry, now)
        self._sources: dict[str, Source] = {}

    def dismiss(self) -> None:
        """Ask those who attend to go, before the server stops."""
        self._presence.dismiss()

    async def close(self) -> None:
        """Say of all nodes that they are absent, when the server has stopped."""
        await self._presence.close()

    async def Attend(self, request: wire.AttendRequest, context: Any) -> AsyncIterator[wire.Notice]:  # noqa: N802
        peer = Peer.of(context)
        if not _INSTANCE.fullmatch(request.instance):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "An instance is 1 to 64 letters, digits or '-'.")
        session = self._presence.enter(peer.name, request.instance, address(context))
        loop = asyncio.get_running_loop()
        try:
            await self._presence.seen(session)
            told = loop.time()
            yield wire.Notice(time=self._now().timestamp())
            while session.why is None:
                for text in await asyncio.to_thread(self._news, peer):
                    yield wire.Notice(text=text, time=self._now().timestamp())
                if loop.time() - told > _SEEN_SECONDS:
                    await self._presence.seen(session)
                    told = loop.time()
                with suppress(TimeoutError):
                    await asyncio.wait_for(session.ended.wait(), self._limits.poll_seconds)
            raise session.why
        finally:
            await self._presence.leave(session)

    async def Leave(self, request: wire.LeaveRequest, context: Any) -> wire.LeaveReply:  # noqa: N802
        await asyncio.to_thread(self._registry.revoke, Peer.of(context).name, "left", self._now())
        return wire.LeaveReply()

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewReply:  # noqa: N802
        return await asyncio.to_thread(self._renew, Peer.of(context).name, request.signing_request)

    def _renew(self, name: str, request: bytes) -> wire.RenewReply:
        """Raises TrustError for a bad request. The old certificate stays good until it ends: answers get lost."""
        if len(request) > _MAX_REQUEST:
            raise EnrolmentError("the signing request is too long", where=name)
        certificate = self._issuer.issue_node(request, name, self._now())
        self._registry.renewed(name, f"{certificate.serial_number:x}")
        return wire.RenewReply(certificate=certificate.public_bytes(serialization.Encoding.PEM))

    async def DescribeBundle(self, request: wire.DescribeBundleRequest, context: Any) -> wire.BundleDescription:  # noqa: N802
        source = await self._source(request.bundle)
        return wire.BundleDescription(manifest=source.manifest.canonical())

    async def FetchChunks(self, request: wire.FetchChunksRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        source = await self._source(request.bundle)
        async with aclosing(source.chunks(source.wanted(request.ranges), self._readers)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _news(self, peer: Peer) -> list[str]:
        """The node's notices. Raises Refusal once it may not attend any more."""
        peer.admit(self._registry)
        return self._registry.take_notices(peer.name)

    async def _source(self, digest: bytes) -> Source:
        """Raises Refusal unless a run that is queued or running uses this bundle."""
        name = digest.hex()
        row = await asyncio.to_thread(self._row, name)
        if row is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"No run that is queued or running uses bundle {name[:16]}….")
        source = self._sources.get(name)
        if source is None or source.folder != row.folder:
            source = Source(await asyncio.to_thread(Manifest.parse, row.manifest), row.folder)
            self._sources[name] = source
            while len(self._sources) > _SOURCES:
                del self._sources[next(iter(self._sources))]
        return source

    def _row(self, name: str) -> BundleRow | None:
        return self._registry.bundle(name) if self._registry.may_fetch(name) else None


def _fleet_key(raw: bytes) -> bytes:
    """The key as OpenSSH writes it, without a comment. Raises EnrolmentError unless it is one on P-384."""
    try:
        key = serialization.load_ssh_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        raise EnrolmentError("the fleet key is no OpenSSH public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentError("the fleet key is not on the curve P-384")
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _signing_key(raw: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise EnrolmentError("the signing key is not an Ed25519 key of 32 bytes") from None

"""Opens the two ports of the coordinator's own services, and closes them.

Two, because gRPC for Python cannot ask for a client certificate without insisting on it: whoever enrols has none yet.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # it ships no types

from farfield.protocols import federation_pb2 as wire
from farfield.protocols.errors import ServiceError
from farfield.protocols.federation_pb2_grpc import add_EnrolmentServicer_to_server, add_FederationServicer_to_server

from .admission import Limits, address_gate, node_gate
from .authority import ServerCredentials
from .federation import ATTEND, Enrolments, Federation, Issuer, Registry

_SERVICE: Final = wire.DESCRIPTOR.services_by_name["Federation"].full_name
_HANDSHAKE_SECONDS = 10
_READERS = 4
_ENROLMENTS = 64  # at the same time, from all addresses


@dataclass(slots=True)
class Services:
    """The two servers, listening. Made by `start`.

    Attributes:
        enrolment_port, federation_port: those in use, also where port 0 was asked for.
    """

    enrolment_port: int
    federation_port: int
    _servers: tuple[grpc.aio.Server, grpc.aio.Server]
    _federation: Federation
    _health: health.aio.HealthServicer
    _readers: ThreadPoolExecutor

    async def stop(self, grace: float) -> None:
        """Take no new calls and give open ones `grace` seconds; then both ports are closed, and nobody attends."""
        await self._health.enter_graceful_shutdown()
        self._federation.dismiss()
        for server in self._servers:
            await server.stop(grace)
        await self._federation.close()
        self._readers.shutdown()


async def start(
    credentials: ServerCredentials,
    registry: Registry,
    issuer: Issuer,
    *,
    enrolment_address: str,
    federation_address: str,
    advertised: tuple[int, int],
    now: Callable[[], datetime],
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Services:
    """Serve enrolment, the federation service and the standard health service; the latter two over mutual TLS.

    Args:
        enrolment_address, federation_address: HOST:PORT to listen at.
        advertised: ports of the SuperLink's fleet API and of the federation service, as a new node is told them; 0 for
            the second is the port that is listened at.
        now: the time of day, aware.

    Raises:
        ServiceError: an address cannot be listened at, or the credentials are no PEM.
    """
    readers = ThreadPoolExecutor(_READERS, "bundles")
    gate = node_gate(registry, limits, frozenset({ATTEND}))
    federation = grpc.aio.server(interceptors=[gate], options=options(limits))
    servicer = Federation(registry, issuer, limits, readers, now)
    add_FederationServicer_to_server(servicer, federation)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, federation)
    await checks.set(_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    federation_port = _listen(federation, federation_address, tls(credentials, mutual=True))

    gate = address_gate(limits)
    enrolment = grpc.aio.server(interceptors=[gate], options=options(limits), maximum_concurrent_rpcs=_ENROLMENTS)
    ports = (advertised[0], advertised[1] or federation_port)
    add_EnrolmentServicer_to_server(Enrolments(registry, issuer, ports, now), enrolment)
    enrolment_port = _listen(enrolment, enrolment_address, tls(credentials, mutual=False))

    await federation.start()
    await enrolment.start()
    return Services(enrolment_port, federation_port, (enrolment, federation), servicer, checks, readers)


def _listen(server: grpc.aio.Server, address: str, tls: grpc.ServerCredentials) -> int:
    try:
        return server.add_secure_port(address, tls)
    except RuntimeError:
        hint = "Is another coordinator running? Else choose another address in coordinator.toml."
        raise ServiceError("cannot listen there", where=address, hint=hint) from None


def tls(credentials: ServerCredentials, *, mutual: bool) -> grpc.ServerCredentials:
    roots = credentials.authority if mutual else None
    return grpc.ssl_server_credentials([(credentials.key, credentials.chain)], roots, require_client_auth=mutual)


def options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # or a second server would listen at the same port, and half the calls go astray
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
        ("grpc.max_concurrent_streams", 2 * limits.calls),
        ("grpc.keepalive_time_ms", int(limits.keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout * 1000)),
        ("grpc.http2.ping_timeout_ms", int(limits.keepalive_timeout * 1000)),  # without it, a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients ask in turn whether the server lives; more often than this is taken for an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]

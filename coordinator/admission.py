"""Who may call the coordinator, how often and for how long; and how what goes wrong is said to a client.

Every call to either server passes one `Gate`, so no method can forget a check.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import logging
import time
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import grpc
import grpc.aio

from farfield.protocols.errors import (
    BundleError,
    FarfieldError,
    MalformedMessage,
    MessageTooLarge,
    ServiceError,
    StorageError,
    TrustError,
    UnknownVersion,
)

from .storage import Node

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LOG = logging.getLogger(__name__)
_MAX_SENTENCE = 1000  # it travels in a header, which has a limit
_MAX_BUCKETS = 10_000

_STATUS: Final[Mapping[type[FarfieldError], grpc.StatusCode]] = {
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownVersion: grpc.StatusCode.FAILED_PRECONDITION,
    MalformedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    TrustError: grpc.StatusCode.PERMISSION_DENIED,
    BundleError: grpc.StatusCode.DATA_LOSS,
    StorageError: grpc.StatusCode.UNAVAILABLE,
    ServiceError: grpc.StatusCode.UNAVAILABLE,
}
_PRIVATE: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL})
"""Trouble of the coordinator's own, whose details (paths, addresses) are for its log and not for its clients."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may ask of the service.

    Attributes:
        call_seconds: longest call; a client's own deadline may be shorter. Attending has no end.
        calls: how many calls one peer may have open at the same time.
        rate, burst: calls a second that a node may begin in the long run, and at once.
        enrol_rate, enrol_burst: the same for enrolments from one address.
        message_bytes: largest request.
        keepalive_seconds, keepalive_timeout: a peer that is silent for the first is asked whether it lives, and is
            given up after the second; together, how long a dead one counts as present.
        poll_seconds: how often the database is asked for notices and revocations.
    """

    call_seconds: float = 600.0
    calls: int = 8
    rate: float = 20.0
    burst: int = 100
    enrol_rate: float = 0.5
    enrol_burst: int = 30
    message_bytes: int = 256 << 10
    keepalive_seconds: float = 10.0
    keepalive_timeout: float = 8.0
    poll_seconds: float = 0.5


class Refusal(Exception):
    """Ends a call with a status and a sentence for the person at the other end."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        self.code = code
        super().__init__(sentence)


class Nodes(Protocol):
    """What is asked of the database about a caller."""

    def node(self, name: str) -> Node | None: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """The node that a client certificate names. The authority signed that, and gives a name only once."""

    name: str

    @classmethod
    def of(cls, context: Context) -> Peer:
        """Raises Refusal when the caller showed no certificate that says who it is."""
        shown: Mapping[str, Any] = context.auth_context()
        names = shown.get("x509_common_name", ())
        if len(names) != 1:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "The client certificate does not name one node.")
        return cls(names[0].decode(errors="replace"))

    def admit(self, nodes: Nodes) -> None:
        """Raises Refusal unless the node is enrolled and not revoked."""
        node = nodes.node(self.name)
        if node is None:
            raise _denied(f"No node {self.name!r} is enrolled here.")
        if node.revoked_at is not None:
            why = f": {node.revoked_because}" if node.revoked_because else ""
            raise _denied(f"Node {self.name!r} was revoked on {node.revoked_at:%Y-%m-%d %H:%M} UTC{why}.")


def address(context: Context) -> str:
    """The address that a call comes from, without the port."""
    kind, _, rest = urllib.parse.unquote(context.peer()).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def network(context: Context) -> str:
    """What counts as one address: of IPv6 the network, since one machine has all the addresses of a /64."""
    text = address(context)
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text
    return text if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


class Buckets:
    """A token bucket for each peer: `burst` calls at once, then `rate` a second. `clock` gives seconds."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, peer: str) -> float:
        """0 when the call may begin, otherwise for how many seconds the peer has to wait."""
        now = self._clock()
        left, since = self._left.pop(peer, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._left[peer] = (left if wait else left - 1, now)
        if len(self._left) > _MAX_BUCKETS:  # who has been quiet the longest is forgotten
            del self._left[next(iter(self._left))]
        return wait


class Gate(grpc.aio.ServerInterceptor):
    """Admits calls, bounds them, and turns whatever goes wrong in one into a status with a sentence.

    A handler that streams may give replies as messages, or as bytes that it has serialised already.

    Args:
        identify: gives the name that the caller's limits are counted under; raises Refusal.
        admit: raises Refusal or FarfieldError when the caller may not call; it may block, and runs in a thread.
        endless: full names of the methods that have no longest duration.
    """

    def __init__(
        self,
        identify: Callable[[Context], str],
        admit: Callable[[Context], None],
        buckets: Buckets,
        limits: Limits,
        endless: frozenset[str] = frozenset(),
    ) -> None:
        self._identify, self._admit, self._buckets, self._limits = identify, admit, buckets, limits
        self._endless = endless
        self._open: Counter[str] = Counter()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        seconds = None if method in self._endless else self._limits.call_seconds
        if handler is None:
            return None
        if handler.unary_unary is not None:

            async def unary(request: Any, context: Context) -> Any:
                async with self._call(context, method, seconds):
                    return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)

        async def stream(request: Any, context: Context) -> None:
            async with self._call(context, method, seconds):
                if not inspect.isasyncgenfunction(handler.unary_stream):
                    await handler.unary_stream(request, context)
                    return
                async with aclosing(handler.unary_stream(request, context)) as replies:
                    async for reply in replies:
                        await context.write(reply)

        def serializer(reply: Any) -> bytes:
            return reply if isinstance(reply, bytes) else handler.response_serializer(reply)

        return grpc.unary_stream_rpc_method_handler(stream, handler.request_deserializer, serializer)

    @asynccontextmanager
    async def _call(self, context: Context, method: str, seconds: float | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds), self._admitted(context):
                yield
        except grpc.aio.AbortError:
            raise
        except Refusal as refusal:
            await _end(context, refusal.code, str(refusal))
        except FarfieldError as error:
            code = status(error)
            if code in _PRIVATE or code is grpc.StatusCode.DATA_LOSS:
                _LOG.warning("%s: %s", method, error)
            own = "The coordinator cannot do this now; its log says why."
            await _end(context, code, own if code in _PRIVATE else str(error))
        except TimeoutError:
            await _end(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"A call may take {seconds:g} seconds here.")
        except Exception:
            _LOG.exception("%s failed", method)
            await _end(context, grpc.StatusCode.INTERNAL, "The coordinator failed at this; its log says how.")

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncIterator[None]:
        peer = self._identify(context)
        if wait := self._buckets.take(peer):
            raise _exhausted(f"Too many calls from {peer}: try again in {wait:.1f} seconds.")
        if self._open[peer] >= self._limits.calls:
            raise _exhausted(f"{peer} has {self._limits.calls} calls open, which is as many as it may have.")
        self._open[peer] += 1
        try:
            await asyncio.to_thread(self._admit, context)
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


def node_gate(nodes: Nodes, limits: Limits, endless: frozenset[str]) -> Gate:
    """The gate of the server that wants client certificates: only enrolled nodes pass."""
    buckets = Buckets(limits.rate, limits.burst, time.monotonic)
    return Gate(lambda context: Peer.of(context).name, lambda c: Peer.of(c).admit(nodes), buckets, limits, endless)


def address_gate(limits: Limits) -> Gate:
    """The gate of the server that anyone may call: only the limits count, by address."""
    buckets = Buckets(limits.enrol_rate, limits.enrol_burst, time.monotonic)
    return Gate(network, lambda _: None, buckets, limits)


def status(error: FarfieldError) -> grpc.StatusCode:
    """The gRPC status for an error of ours: that of the nearest class in the tree."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return grpc.StatusCode.INTERNAL


async def _end(context: Context, code: grpc.StatusCode, sentence: str) -> None:
    await context.abort(code, " ".join(sentence[:_MAX_SENTENCE].split()))


def _denied(sentence: str) -> Refusal:
    return Refusal(grpc.StatusCode.PERMISSION_DENIED, sentence)


def _exhausted(sentence: str) -> Refusal:
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)

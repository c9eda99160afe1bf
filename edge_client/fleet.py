"""The resident connection to Flower's Fleet API: one process that takes messages, hands them on, and sends replies.

Flower's own SuperNode polls every 3 s and then starts a process for each message, which imports torch, loads the
backbone, and runs the code that came with the run. This one keeps what is loaded, and never asks for code: of the Fleet
API it calls ActivateNode, DeactivateNode, SendNodeHeartbeat, PullMessages, PullObject, ConfirmMessageReceived,
PushMessages and PushObject, and nothing else.

These are internals of Flower 1.39 (hence the pin in pyproject.toml), and this file is all that knows them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from farfield.protocols.errors import MessageTooLarge, ServiceError, Unreachable

HEARTBEAT_SECONDS: Final = 30.0
"""What the SuperLink is promised; it takes a node for gone when two of these passed in silence."""

DEADLINE: Final = 30.0
"""Of every call, in seconds; the largest object is 5 MiB."""

FIRST_WAIT: Final = 0.02
LONGEST_WAIT: Final = 0.2
"""Seconds before an object is asked for again that is not there yet: a message comes before its objects. The wait
doubles from the first to the longest. Flower's own begins with a second, and most rounds of 1 MB would lose it.
"""

PATIENCE: Final = 180.0
"""Seconds after which a message whose objects do not come is given up; so long the SuperLink waits for them, too."""

_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
]


class Fleet:
    """One connection to a SuperLink, from activation until it is closed or an error ends it.

    Every method raises Unreachable when the SuperLink does not answer, and ServiceError when it refuses; the connection
    is then to be closed and made anew.
    """

    def __init__(
        self,
        address: str,
        authority: bytes,
        key: EllipticCurvePrivateKey,
        before: int | None = None,
        ahead: float = 0.0,
    ) -> None:
        """Connect and activate the node.

        Args:
            address: HOST:PORT.
            authority: the pinned certificate, PEM; nothing else is trusted.
            key: authenticates the node.
            before: the node's `id` in an earlier connection, which may have ended without a goodbye. The SuperLink
                would refuse the node until it has missed that one long enough.
            ahead: how many seconds the coordinator's clock is ahead of this one. Flower signs and dates by the clock,
                and takes nothing that is five seconds ahead of it.
        """
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), _OPTIONS)
        self._channel = grpc.intercept_channel(
            channel,
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            _Authentication(key, ahead),
        )
        self._ahead = ahead
        self._stub: Any = FleetStub(self._channel)
        self._silent = threading.Event()
        try:
            if before is not None:
                with suppress(grpc.RpcError):
                    self._stub.DeactivateNode(DeactivateNodeRequest(node_id=before), timeout=DEADLINE)
            with _explained(address):
                request = ActivateNodeRequest(
                    public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_SECONDS
                )
                self._node = Node(node_id=self._stub.ActivateNode(request, timeout=DEADLINE).node_id)
        except BaseException:
            self._channel.close()
            raise
        self._address = address
        threading.Thread(target=self._beat, name="fleet-heartbeat", daemon=True).start()

    @property
    def id(self) -> int:
        """By which Flower knows this node."""
        return int(self._node.node_id)

    def receive(self, limit: int) -> Message | None:
        """The next message for this node with its content, or None when there is none now.

        Raises:
            MessageTooLarge: its objects are more than `limit` bytes together; it is dropped.
        """
        with _explained(self._address):
            answer = self._stub.PullMessages(PullMessagesRequest(node=self._node), timeout=DEADLINE)
            if not answer.messages_list:
                return None
            envelope, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
            run = envelope.metadata.run_id
            contents = pull_objects(
                [one.object_id for one in iterate_object_tree(tree)],
                self._puller(run, limit),
                max_time=PATIENCE,
                max_tries_per_object=None,
                initial_backoff=FIRST_WAIT,
                backoff_cap=LONGEST_WAIT,
            )
            self._stub.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=tree.object_id),
                timeout=DEADLINE,
            )
        message = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(message, Message):
            raise ServiceError(f"sent a {type(message).__name__} in place of a message", where=self._address)
        message.metadata.__dict__.update(envelope.metadata.__dict__)
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """Send the reply, which took `seconds` to make."""
        with _explained(self._address), no_object_id_recompute():
            reply.metadata.created_at += self._ahead
            reply.metadata.ttl -= self._ahead
            reply.metadata.__dict__["_message_id"] = reply.object_id
            run = reply.metadata.run_id
            objects = get_all_nested_objects(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            answer = self._stub.PushMessages(request, timeout=DEADLINE)

            def push(object_id: str, content: bytes) -> None:
                pushed = PushObjectRequest(
                    node=self._node,
                    run_id=run,
                    object_id=object_id,
                    object_content=content,
                    session_id=answer.session_id,
                )
                if not self._stub.PushObject(pushed, timeout=DEADLINE).stored:
                    raise ServiceError("did not take the reply: it came too late", where=self._address)

            push_objects(objects, push, object_ids_to_push=set(answer.objects_to_push))

    def close(self) -> None:
        """Say goodbye, if that is possible, and disconnect."""
        self._silent.set()
        try:
            self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id), timeout=2.0)
        except grpc.RpcError:
            pass  # it will notice the silence
        finally:
            self._channel.close()

    def _puller(self, run: int, limit: int) -> Callable[[str], bytes]:
        left, lock = limit, threading.Lock()

        def pull(object_id: str) -> bytes:
            nonlocal left
            request = PullObjectRequest(node=self._node, run_id=run, object_id=object_id)
            answer = self._stub.PullObject(request, timeout=DEADLINE)
            if not answer.object_found:
                raise ServiceError("withdrew a message", where=self._address)
            if not answer.object_available:
                raise ObjectUnavailableError(object_id)
            content = bytes(answer.object_content)
            with lock:
                left -= len(content)
            if left < 0:
                raise MessageTooLarge(f"a message of more than {limit} bytes", where=self._address)
            return content

        return pull

    def _beat(self) -> None:
        """Tell the SuperLink that this node lives, until closed. What fails here fails the next call as well."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        while not self._silent.wait(HEARTBEAT_SECONDS * random.uniform(0.5, 0.8)):
            try:
                self._stub.SendNodeHeartbeat(request, timeout=DEADLINE)
            except grpc.RpcError:
                self._silent.wait(1.0)


class _Authentication(grpc.UnaryUnaryClientInterceptor):
    """Shows with each call who calls, as Flower's own interceptor does, by the coordinator's clock."""

    def __init__(self, key: EllipticCurvePrivateKey, ahead: float) -> None:
        self._key, self._public, self._ahead = key, public_key_to_bytes(key.public_key()), ahead

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        moment = (datetime.now(UTC) + timedelta(seconds=self._ahead)).isoformat()
        shown = [
            *(client_call_details.metadata or []),
            (PUBLIC_KEY_HEADER, self._public),
            (TIMESTAMP_HEADER, moment),
            (SIGNATURE_HEADER, sign_message(self._key, moment.encode("ascii"))),
        ]
        return continuation(client_call_details._replace(metadata=shown), request)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what gRPC says into one sentence: Unreachable if it may pass, ServiceError if not."""
    try:
        yield
    except ObjectPullError:
        raise ServiceError(f"the rest of a message did not come within {PATIENCE:g} s", where=address) from None
    except grpc.RpcError as error:
        code, details = error.code(), _reason(error.details())
        if code == grpc.StatusCode.UNAVAILABLE:
            raise Unreachable("the SuperLink cannot be reached", where=address) from None
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unreachable(f"the SuperLink did not answer within {DEADLINE:g} s", where=address) from None
        if "timestamp" in details.lower():
            now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            raise ServiceError(
                f"this machine's clock, {now}, is minutes away from the coordinator's",
                where=address,
                hint="Set it, for instance with NTP.",
            ) from None
        raise ServiceError(f"the SuperLink says: {details}", where=address) from None


def _reason(details: str | None) -> str:
    """What the SuperLink says, which may be one of Flower's own errors as JSON."""
    own = FlowerError.from_json(details)
    text = own.message if own else details or "no reason given"
    return text.strip().splitlines()[0].rstrip(".")

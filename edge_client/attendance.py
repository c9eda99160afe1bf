"""Attendance: the stream that says that this node is there, and brings notices from the coordinator.

It is held by a thread, and made anew when it breaks. Two ends are final: the coordinator revoked this node, or another
process attends with the same identity.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from farfield.protocols import federation_pb2 as pb
from farfield.protocols.errors import EnrolmentError, TrustError
from farfield.protocols.federation_pb2_grpc import FederationStub

from .pause import Pause

_FINAL: Final = {
    grpc.StatusCode.ALREADY_EXISTS: "Stop one of the two; if you do not know the other one, tell the coordinator.",
    grpc.StatusCode.PERMISSION_DENIED: "With a new invitation it may join again, after `edge-client leave --force`.",
    grpc.StatusCode.UNAUTHENTICATED: "`edge-client doctor` looks for the cause.",
}


class Attendance:
    """A node's presence, from `begin` to `end`.

    Attributes:
        open: set while the coordinator holds the stream.
        over: set when an end was final; `reason` then says why.
        ahead: how many seconds the coordinator's clock is ahead of this machine's.
    """

    def __init__(
        self,
        federation: FederationStub,
        instance: str,
        address: str,
        on_notice: Callable[[str], None],
        on_break: Callable[[str], None],
    ) -> None:
        """
        Args:
            instance: random, drawn by this process.
            on_notice, on_break: are told in the thread what the coordinator says, and why the stream broke.
        """
        self._federation, self._instance, self._address = federation, instance, address
        self._on_notice, self._on_break = on_notice, on_break
        self.open, self.over = threading.Event(), threading.Event()
        self.reason: TrustError | None = None
        self.ahead = 0.0
        self._ending = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._attend, name="attendance", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        if self._stream is not None:
            self._stream.cancel()
        self._thread.join(timeout=5)

    def _attend(self) -> None:
        pause = Pause(self._ending)
        while not self._ending.is_set():
            try:
                self._stream = self._federation.Attend(pb.AttendRequest(instance=self._instance))
                for notice in self._stream:
                    pause.reset()
                    self.ahead = notice.time - time.time()
                    self.open.set()
                    if notice.text:
                        self._on_notice(notice.text)
                reason = "the coordinator ended the connection"
            except grpc.RpcError as error:
                code, reason = error.code(), (error.details() or "").strip().rstrip(".") or "no reason given"
                if code in _FINAL and not self._ending.is_set():
                    kind = EnrolmentError if code == grpc.StatusCode.PERMISSION_DENIED else TrustError
                    self.reason = kind(reason, where=self._address, hint=_FINAL[code])
                    self.over.set()
                    return
                if code == grpc.StatusCode.UNAVAILABLE:
                    reason = "the coordinator cannot be reached"
            finally:
                self.open.clear()
            if not self._ending.is_set():
                self._on_break(f"{self._address}: {reason}; trying again")
                pause.wait()

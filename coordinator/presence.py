"""Which process of each node attends: one at a time, and the database knows which."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import grpc

from .admission import Refusal


class Attendance(Protocol):
    """What is told to the database."""

    def attend(self, name: str, instance: str, address: str, now: datetime) -> None: ...
    def absent(self, name: str, instance: str, now: datetime) -> None: ...


@dataclass(eq=False, slots=True)
class Session:
    """One open stream. Whoever ends it says `why` and sets `ended`."""

    node: str
    instance: str
    address: str
    since: datetime
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: Refusal | None = None

    def end(self, code: grpc.StatusCode, sentence: str) -> None:
        self.why = Refusal(code, sentence)
        self.ended.set()


class Presence:
    """The open streams of all nodes. `now` gives the time of day."""

    def __init__(self, registry: Attendance, now: Callable[[], datetime]) -> None:
        self._registry, self._now = registry, now
        self._sessions: dict[str, Session] = {}
        # What is said of one node reaches the database in the order in which it happened.
        self._order = asyncio.Lock()

    def enter(self, node: str, instance: str, address: str) -> Session:
        """The stream that is now the node's only one; call `leave` when it ends, however it ends.

        Raises:
            Refusal: another process of this node attends.
        """
        first = self._sessions.get(node)
        if first is not None and first.instance != instance:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"Another process attends as {node!r}, from {first.address} since "
                f"{first.since:%Y-%m-%d %H:%M:%S} UTC: stop one of the two.",
            )
        if first is not None:
            first.end(grpc.StatusCode.ABORTED, "The same process attends over another connection now.")
        session = Session(node, instance, address, self._now())
        self._sessions[node] = session
        return session

    async def seen(self, session: Session) -> None:
        """Tell the database that the node attends."""
        async with self._order:
            if self._sessions.get(session.node) is session:
                await asyncio.to_thread(
                    self._registry.attend, session.node, session.instance, session.address, self._now()
                )

    async def leave(self, session: Session) -> None:
        """The stream has ended. Its node is absent, unless another stream has taken its place."""
        async with self._order:
            if self._sessions.get(session.node) is session:
                del self._sessions[session.node]
                await asyncio.to_thread(self._registry.absent, session.node, session.instance, self._now())

    def dismiss(self) -> None:
        """Ask all streams to end, because the service stops."""
        for session in self._sessions.values():
            session.end(grpc.StatusCode.UNAVAILABLE, "The coordinator is stopping.")

    async def close(self) -> None:
        """All streams have ended, though some may not know it yet."""
        for session in list(self._sessions.values()):
            await self.leave(session)

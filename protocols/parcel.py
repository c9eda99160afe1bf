"""A parcel: what a message is while it travels. A small head, and a body in frames of bounded size.

Carriers move heads and frames and understand neither. Frames are small enough for every transport's limit on a single
object, and a reader can drop each one as soon as it has been used, so a large body is never twice in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np

from .errors import MessageTooLarge

Buffer: TypeAlias = "bytes | bytearray | memoryview"

FRAME_BYTES: Final = 4 * 2**20

OVERHEAD_BYTES: Final = 16
"""By how much a sealed frame may be longer."""


@dataclass(frozen=True)
class Body:
    """The frames of one message, each of `FRAME_BYTES` but the last; shared by all messages that carry the same."""

    frames: tuple[bytes, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.frames))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the frames one after another."""
        hashed = hashlib.sha256()
        for frame in self.frames:
            hashed.update(frame)
        return hashed.digest()


@dataclass(slots=True)
class Parcel:
    """A message on its way. Reading it may use its frames up.

    Attributes:
        head: a serialised message of messages.proto.
        frames: the body, in order.
    """

    head: bytes
    frames: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.head) + sum(map(len, self.frames))

    def check(self, most: int) -> None:
        """Raises MessageTooLarge when it is larger than `most` bytes, or has a frame that no sender would make."""
        if self.size > most:
            raise MessageTooLarge(f"a message of {self.size} bytes", hint=f"The limit is {most}.")
        longest = max(map(len, self.frames), default=0)
        if longest > FRAME_BYTES + OVERHEAD_BYTES:
            raise MessageTooLarge(f"a frame of {longest} bytes", hint=f"They have at most {FRAME_BYTES}.")


def cut(pieces: Iterable[Buffer]) -> Iterator[bytes]:
    """`pieces` one after another as frames of `FRAME_BYTES`, the last one shorter; none for no bytes."""
    frame = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest):
            room = FRAME_BYTES - len(frame)
            frame += rest[:room]
            rest = rest[room:]
            if len(frame) == FRAME_BYTES:
                yield bytes(frame)
                frame.clear()
    if frame:
        yield bytes(frame)


def join(frames: list[bytes]) -> memoryview:
    """The frames as one read-only buffer. Uses them up: each is dropped when it has been copied."""
    # A bytearray would be filled with zeros first, and so be in memory as a whole beside all the frames.
    whole = np.empty(sum(map(len, frames)), np.uint8).data
    at = 0
    frames.reverse()
    while frames:
        frame = frames.pop()
        whole[at : at + len(frame)] = frame
        at += len(frame)
    return whole.toreadonly()


def release_freed_frames() -> None:
    """Have the system get the memory of frames back as soon as they are dropped, from here on in this process.

    For processes that go through many large messages. glibc keeps freed blocks for itself once some of a size were
    freed (mallopt(3), M_MMAP_THRESHOLD), and with them as much memory again as a message has. Where the C library is
    another one, nothing is done.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, FRAME_BYTES // 8)


_M_MMAP_THRESHOLD: Final = -3

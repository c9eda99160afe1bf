"""Bundles as they lie on the coordinator's disk, read ahead for those who fetch them."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeAlias

import grpc

from farfield.emulator.bundle import Manifest, changed, pread
from farfield.protocols import federation_pb2 as wire
from farfield.protocols.chunks import serialized
from farfield.protocols.errors import BundleError

from .admission import Refusal

AHEAD = 1
"""Chunks that are read while one is being sent. More would only push each other out of the processor's caches."""

_Stamp: TypeAlias = tuple[int, ...]


class Source:
    """One bundle. Its chunks are hashed when they are read for the first time, and again whenever the file has changed.

    Hashing each chunk for each client would halve what a coordinator with two cores can send. What a file's time stamps
    do not tell, a bit that flips on the disk, is found by the client, which hashes every chunk.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self._proven: dict[str, tuple[_Stamp, set[int]]] = {}

    def wanted(self, ranges: Iterable[wire.Range]) -> list[int]:
        """The numbers of the chunks in `ranges`, in that order.

        Raises:
            Refusal: a range leaves the manifest, or more is asked for than there is.
        """
        total = self.manifest.chunks
        indices: list[int] = []
        for one in ranges:
            if one.first + one.count > total:
                last = one.first + one.count - 1
                raise Refusal(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"Chunks {one.first} to {last} were asked for, and the bundle has 0 to {total - 1}.",
                )
            if len(indices) + one.count > total:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"More than all {total} chunks were asked for.")
            indices += range(one.first, one.first + one.count)
        return indices

    def read(self, index: int) -> bytes:
        """Chunk `index`, serialised as it is sent. Blocks.

        Raises:
            BundleError: the file cannot be read, or no longer holds what the manifest says.
        """
        place = self.manifest.place(index)
        path = self.folder / place.file.path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                data = pread(descriptor, place)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BundleError(
                f"cannot be read: {(error.strerror or str(error)).lower()}", where=place.file.path
            ) from None
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        known, proven = self._proven.get(place.file.path, (None, set()))
        if known != stamp:
            proven = set()
            self._proven[place.file.path] = (stamp, proven)
        if index not in proven:
            if not place.holds(data):
                raise changed(place)
            proven.add(index)
        return serialized(index, data)

    async def chunks(self, indices: Iterable[int], readers: Executor) -> AsyncGenerator[bytes]:
        """These chunks, in order, `AHEAD` of them being read while one is sent. Raises BundleError as `read` does."""
        loop = asyncio.get_running_loop()
        coming: deque[asyncio.Future[bytes]] = deque()
        rest = iter(indices)
        try:
            for index in rest:
                coming.append(loop.run_in_executor(readers, self.read, index))
                if len(coming) > AHEAD:
                    yield await coming.popleft()
            while coming:
                yield await coming.popleft()
        finally:
            await asyncio.gather(*coming, return_exceptions=True)

"""Fetches a bundle's chunks from the coordinator, and asks again until each is right or there is no hope.

While one chunk is received, those before it are hashed and written by a few threads: both let the interpreter go.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeAlias

import grpc

from farfield.emulator.bundle import Manifest, Place
from farfield.protocols import federation_pb2 as wire
from farfield.protocols.chunks import parsed
from farfield.protocols.errors import BundleError, MalformedMessage, TrustError, Unreachable
from farfield.protocols.federation_pb2_grpc import FederationStub

ATTEMPTS: Final = 8
"""Calls in a row that may fail without bringing anything new."""

WRONG: Final = 3
"""How often one chunk may arrive damaged."""

Keep: TypeAlias = Callable[[Place, memoryview], None]
Progress: TypeAlias = Callable[[int, int], None]
"""Told how many bytes of the bundle are here and verified, and how many it has."""

FETCH_CHUNKS: Final = "/farfield.federation.v1.Federation/FetchChunks"

_CALL_SECONDS: Final = 300.0  # a call that ends for this reason is followed by the next, if it brought anything
_DESCRIBE_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = (0.5, 30.0)
_RANGES: Final = 4096
_THREADS: Final = 2
_BETWEEN: Final = 4  # chunks received but not yet written, at most: what bounds the memory

_LARGEST: Final = 31 << 20  # just under glibc's DEFAULT_MMAP_THRESHOLD_MAX

_HOPELESS: Final = {
    grpc.StatusCode.UNAUTHENTICATED: TrustError,
    grpc.StatusCode.PERMISSION_DENIED: TrustError,
    grpc.StatusCode.DATA_LOSS: BundleError,
    grpc.StatusCode.FAILED_PRECONDITION: BundleError,
    grpc.StatusCode.INVALID_ARGUMENT: BundleError,
    grpc.StatusCode.NOT_FOUND: BundleError,
    grpc.StatusCode.OUT_OF_RANGE: BundleError,
    grpc.StatusCode.UNIMPLEMENTED: BundleError,
}


class Download:
    """The download of one bundle.

    Args:
        say: told, for a person, why something has to be tried again.
        pause: waits for that many seconds; may raise to give up.
    """

    def __init__(
        self, channel: grpc.Channel, digest: str, say: Callable[[str], None], pause: Callable[[float], None]
    ) -> None:
        self._digest, self._say, self._pause = digest, say, pause
        self._describe = FederationStub(channel).DescribeBundle
        # As the stub has it, but the replies are left as they come: they are parsed where they are verified.
        self._fetch: grpc.UnaryStreamMultiCallable[wire.FetchChunksRequest, bytes] = channel.unary_stream(
            FETCH_CHUNKS, wire.FetchChunksRequest.SerializeToString, response_deserializer=None
        )
        self._failures = 0
        self._wrong: Counter[int] = Counter()

    def manifest(self) -> Manifest:
        """What the bundle is made of, verified.

        Raises:
            BundleError: the coordinator does not have it, or sends something else.
            TrustError: this node may not fetch it.
            Unreachable: the coordinator does not answer.
        """
        request = wire.DescribeBundleRequest(bundle=bytes.fromhex(self._digest))
        for _ in range(WRONG):
            raw = self._described(request)
            if hashlib.sha256(raw).hexdigest() == self._digest:
                return Manifest.parse(raw)
            self._say("the manifest arrived damaged; asking again")
        raise BundleError(f"the manifest arrived damaged {WRONG} times", where=self._where)

    def chunks(self, manifest: Manifest, missing: Sequence[int], keep: Keep, progress: Progress) -> None:
        """Hand every missing chunk, verified, to `keep`, which other threads call.

        Args:
            missing: numbers of chunks, in order.

        Raises:
            BundleError, TrustError, Unreachable: as `manifest` does; or a chunk keeps arriving damaged.
            OSError: whatever `keep` raises.
        """
        # Once glibc has seen a block as large as this one freed, it keeps what chunks leave behind for the next ones,
        # which otherwise get pages that the system has to clear first. The block itself is never touched.
        bytes(_LARGEST)
        left = set(missing)
        done = manifest.size - sum(manifest.place(index).size for index in left)
        with ThreadPoolExecutor(_THREADS, "verify") as threads:
            while left:
                before = len(left)
                try:
                    for index in self._received(manifest, left, keep, threads):
                        left.remove(index)
                        done += manifest.place(index).size
                        progress(done, manifest.size)
                except grpc.RpcError as error:
                    if len(left) < before:
                        self._failures = 0
                    if len(left) == before or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                        self._again(error)

    def _received(self, manifest: Manifest, left: set[int], keep: Keep, threads: ThreadPoolExecutor) -> Iterator[int]:
        """One call for what is left: gives the number of each chunk once it is verified and kept."""
        ranges = _ranges(sorted(left))[:_RANGES]
        asked = deque(index for one in ranges for index in range(one.first, one.first + one.count))
        request = wire.FetchChunksRequest(bundle=bytes.fromhex(self._digest), ranges=ranges)
        call = self._fetch(request, timeout=_CALL_SECONDS)
        between: deque[tuple[int, Future[bool]]] = deque()
        try:
            for raw in call:
                if not asked:
                    raise BundleError("the coordinator sent more chunks than it was asked for", where=self._where)
                index = asked.popleft()
                between.append((index, threads.submit(_verify, index, manifest.place(index), raw, keep)))
                if len(between) > _BETWEEN:
                    yield from self._settled(manifest, *between.popleft())
        except grpc.RpcError:
            # What was received is kept all the same, so that it is not asked for again.
            while between:
                yield from self._settled(manifest, *between.popleft())
            raise
        finally:
            call.cancel()
        while between:
            yield from self._settled(manifest, *between.popleft())
        if asked:
            raise BundleError("the coordinator left out chunks that it was asked for", where=self._where)

    def _settled(self, manifest: Manifest, index: int, verified: Future[bool]) -> Iterator[int]:
        if verified.result():
            yield index
            return
        self._wrong[index] += 1
        what = f"chunk {index} ({manifest.place(index)}) arrived damaged"
        if self._wrong[index] == WRONG:
            raise BundleError(
                f"{what} {WRONG} times",
                where=self._where,
                hint="Something between here and the coordinator alters what it carries, or memory is faulty.",
            )
        self._say(f"{what}; asking again")

    def _described(self, request: wire.DescribeBundleRequest) -> bytes:
        while True:
            try:
                reply = self._describe(request, timeout=_DESCRIBE_SECONDS)
            except grpc.RpcError as error:
                self._again(error)
            else:
                self._failures = 0
                return reply.manifest

    def _again(self, error: grpc.RpcError) -> None:
        """Wait before the next call. Raises when there is no sense in another one."""
        code, details = error.code(), error.details()
        if code in _HOPELESS:
            raise _HOPELESS[code](_clause(details), where="the coordinator")
        self._failures += 1
        why = f"the coordinator did not go on: {_clause(details or code.name)}"
        if self._failures == ATTEMPTS:
            raise Unreachable(
                f"{why} ({ATTEMPTS} times)", where=self._where, hint="What was fetched is kept; try again later."
            )
        shortest, longest = _PAUSE_SECONDS
        seconds = min(longest, shortest * 2 ** (self._failures - 1)) * random.uniform(0.75, 1.25)
        self._say(f"{why}; trying again in {seconds:.1f} s")
        self._pause(seconds)

    @property
    def _where(self) -> str:
        return f"bundle {self._digest[:16]}…"


def _verify(index: int, place: Place, raw: bytes, keep: Keep) -> bool:
    """Whether `raw` is chunk `index`, serialised; if it is, its data has been kept."""
    try:
        number, data = parsed(raw, index)
    except MalformedMessage:
        return False
    if number != index or not place.holds(data):
        return False
    keep(place, data)
    return True


def _ranges(indices: Sequence[int]) -> list[wire.Range]:
    """Runs of neighbours among `indices`, which are in order."""
    found: list[wire.Range] = []
    for index in indices:
        if found and index == found[-1].first + found[-1].count:
            found[-1].count += 1
        else:
            found.append(wire.Range(first=index, count=1))
    return found


def _clause(details: str | None) -> str:
    return (details or "no reason given").strip().rstrip(".")

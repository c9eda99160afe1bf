"""The cache of bundles: each is downloaded once, verified by every process that opens it, and mended where it is wrong.

    CACHE/lock              held, for moments, by whoever makes room or begins to use a bundle
    CACHE/DIGEST/           the bundle's files, at their full size from the start; nothing else
    CACHE/DIGEST.json       its manifest
    CACHE/DIGEST.use        locked (shared) by each process that uses the bundle; its time is when one last began to
    CACHE/DIGEST.write      locked by the process that downloads or mends it

No record is kept of what is already there: chunks are hashed. So nothing can be out of step with the files, whenever
a process is killed, and what is on the disk is never believed because somebody once checked it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Final

import grpc

from farfield.emulator.bundle import MAX_MANIFEST_BYTES, Manifest, Place, intact
from farfield.protocols.errors import BundleError

from .download import Download, Progress

_DIGEST = re.compile("[0-9a-f]{64}")
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC
_THREADS = 2


class Cache:
    """Bundles by their digest, in a folder that several processes may share.

    Args:
        folder: made when it is needed.
        max_bytes: how much all bundles together may take. Those not in use make room, the least recently used first.
        say: told, for a person, why a download has to wait or a chunk is fetched again.
        pause: waits between attempts; may raise to give up.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        say: Callable[[str], None] = lambda _: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._say, self._pause = say, pause
        self._used: dict[str, int] = {}
        self._mutex = threading.Lock()

    def fetch(self, digest: str, channel: grpc.Channel, progress: Progress = lambda done, total: None) -> Path:
        """The folder of the bundle, every chunk of which this process has verified; only missing chunks are fetched.

        The bundle stays in use, and in the cache, until `release` or the end of the process. Meanwhile asking for it
        again costs nothing.

        Raises:
            BundleError: it is larger than the cache or the disk, the disk fails, or it cannot be had as it should be.
            TrustError: the coordinator does not admit this node.
            Unreachable: the coordinator does not answer, after several attempts; what was fetched is kept.
        """
        if not _DIGEST.fullmatch(digest):
            raise BundleError("no digest of a bundle", where=repr(digest[:80]))
        path = self.folder / digest
        with self._mutex:
            if digest in self._used:
                return path
            with _disk(self.folder):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                used = self._use(digest)
                try:
                    with _locked(self.folder / f"{digest}.write"):
                        self._complete(digest, Download(channel, digest, self._say, self._pause), progress)
                except BaseException:
                    os.close(used)
                    raise
                self._used[digest] = used
        return path

    def release(self, digest: str) -> None:
        """The bundle is no longer used here: it may make room for others, and is verified when it is fetched again."""
        with self._mutex:
            if (used := self._used.pop(digest, None)) is not None:
                os.close(used)

    def _use(self, digest: str) -> int:
        """The lock that says that this process uses the bundle."""
        with _locked(self.folder / "lock"):
            used = os.open(self.folder / f"{digest}.use", os.O_RDWR | os.O_CREAT | _FILE, 0o600)
            fcntl.flock(used, fcntl.LOCK_SH)  # only who holds the other lock ever has this one alone
            os.utime(used)
            return used

    def _complete(self, digest: str, download: Download, progress: Progress) -> None:
        """Make the bundle whole."""
        manifest = self._known(digest)
        if manifest is None:
            manifest = download.manifest()
        with _locked(self.folder / "lock"):
            self._make_room(digest, manifest)
            files = _Files(self.folder / digest, manifest)
            new = files.prepare()
            _write(self.folder / f"{digest}.json", manifest.canonical())
        missing = []
        done = 0
        places = [manifest.place(index) for index in range(manifest.chunks)]
        with ThreadPoolExecutor(_THREADS, "verify") as threads:
            checks = threads.map(lambda place: place.file.path not in new and files.holds(place), places)
            for index, here in enumerate(checks):
                if here:
                    done += places[index].size
                    progress(done, manifest.size)
                else:
                    missing.append(index)
        download.chunks(manifest, missing, files.write, progress)

    def _known(self, digest: str) -> Manifest | None:
        """The manifest as it was kept; None when it was not, or is damaged."""
        try:
            with open(os.open(self.folder / f"{digest}.json", os.O_RDONLY | _FILE), "rb") as file:  # noqa: PTH123
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError:
            return None
        return Manifest.parse(raw) if hashlib.sha256(raw).hexdigest() == digest else None

    def _make_room(self, digest: str, manifest: Manifest) -> None:
        """Remove what must go for the bundle to fit. Raises BundleError, and removes nothing, if it cannot fit."""
        mine = manifest.size
        if mine > self.max_bytes:
            raise BundleError(
                f"it has {_size(mine)}, and the cache may hold {_size(self.max_bytes)}",
                where=f"bundle {digest[:16]}…",
                hint="Raise cache.max_bytes in edge-client.toml.",
            )
        with os.scandir(self.folder) as found:
            names = [one.name for one in found if _DIGEST.fullmatch(one.name) and one.is_dir(follow_symlinks=False)]
        others = {name: _bytes(self.folder / name) for name in names}
        here = others.pop(digest, 0)
        over = sum(others.values()) + mine - self.max_bytes
        disk = os.statvfs(self.folder)
        lacking = mine - here - disk.f_bavail * disk.f_frsize
        going: list[str] = []
        with _idle(self.folder, others) as idle:
            for one in idle:
                if over <= 0 and lacking <= 0:
                    break
                going.append(one)
                over -= others[one]
                lacking -= others[one]
            if over > 0:
                raise BundleError(
                    f"it has {_size(mine)}, and bundles in use leave only {_size(mine - over)} of the cache",
                    where=f"bundle {digest[:16]}…",
                    hint="Raise cache.max_bytes in edge-client.toml.",
                )
            if lacking > 0:
                raise BundleError(
                    f"it has {_size(mine)}, and the disk lacks {_size(lacking)} for it",
                    where=self.folder,
                    hint="Make room, or move the cache to another disk.",
                )
            for one in going:
                self._say(f"removing bundle {one[:16]}… from the cache to make room")
                shutil.rmtree(self.folder / one)
                for end in ("json", "json.partial", "write", "use"):
                    (self.folder / f"{one}.{end}").unlink(missing_ok=True)


class _Files:
    """The files of one bundle. No link is ever followed, so nothing outside the folder is read or written."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def prepare(self) -> set[str]:
        """Every file there at its size, and nothing else, least of all a link. Gives the files that were not there."""
        if self._folder.is_symlink() or (self._folder.exists() and not self._folder.is_dir()):
            self._folder.unlink()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        files = {PurePosixPath(file.path) for file in self._manifest.files}
        folders = {parent for path in files for parent in path.parents}
        with _opened(self._folder, _FOLDER) as root:
            for where, inner, names, descriptor in os.fwalk(".", topdown=False, dir_fd=root):
                for name in inner + names:
                    mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
                    path = PurePosixPath(where, name)
                    if stat.S_ISDIR(mode) and path not in folders:
                        os.rmdir(name, dir_fd=descriptor)
                    elif not stat.S_ISDIR(mode) and not (stat.S_ISREG(mode) and path in files):
                        os.unlink(name, dir_fd=descriptor)
        new = set()
        for file in self._manifest.files:
            with self._open(file.path, os.O_RDWR | os.O_CREAT, make=True) as descriptor:
                before = os.fstat(descriptor).st_size
                if before == 0:
                    new.add(file.path)
                if before > file.size:
                    os.ftruncate(descriptor, file.size)
                if file.size:
                    os.posix_fallocate(descriptor, 0, file.size)
        return new

    def holds(self, place: Place) -> bool:
        """Whether the chunk is here and right."""
        with self._open(place.file.path, os.O_RDONLY) as descriptor:
            return intact(descriptor, place)

    def write(self, place: Place, data: memoryview) -> None:
        with self._open(place.file.path, os.O_WRONLY) as descriptor:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], place.offset + written)

    @contextmanager
    def _open(self, path: str, flags: int, *, make: bool = False) -> Iterator[int]:
        """The file below the folder, reached step by step; `make` makes the folders on the way."""
        *folders, name = path.split("/")
        at = os.open(self._folder, _FOLDER)
        try:
            for folder in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(folder, 0o700, dir_fd=at)
                inner = os.open(folder, _FOLDER, dir_fd=at)
                os.close(at)
                at = inner
            descriptor = os.open(name, flags | _FILE, 0o600, dir_fd=at)
        finally:
            os.close(at)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _idle(folder: Path, digests: dict[str, int]) -> Iterator[list[str]]:
    """Those that no process uses, least recently used first; none can begin to use one meanwhile."""
    held: dict[str, int] = {}
    try:
        for digest in digests:
            descriptor = os.open(folder / f"{digest}.use", os.O_RDWR | os.O_CREAT | _FILE, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                held[digest] = descriptor
        yield sorted(held, key=lambda digest: os.fstat(held[digest]).st_mtime_ns)
    finally:
        for descriptor in held.values():
            os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with _opened(path, os.O_RDWR | os.O_CREAT | _FILE) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _disk(where: Path) -> Iterator[None]:
    """Turn what the disk refuses into a BundleError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "Make room, or move the cache to another disk; what was verified is kept."
            raise BundleError("the disk is full", where=where, hint=hint) from None
        reason = (error.strerror or str(error)).lower()
        raise BundleError(f"cannot be used: {reason}", where=error.filename or where) from None


def _write(path: Path, raw: bytes) -> None:
    """Put `raw` at `path`, whole or not at all; its digest tells a later reader, so it need not reach the disk now."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with (
        _opened(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE) as descriptor,
        open(descriptor, "wb", closefd=False) as file,
    ):
        file.write(raw)
    partial.replace(path)


def _bytes(folder: Path) -> int:
    """What lies in the folder; files have their full size from the start."""
    return sum(Path(where, name).lstat().st_size for where, _, names in os.walk(folder) for name in names)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

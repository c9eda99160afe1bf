"""One process at a time works in a home: a lock that the system frees when its holder ends, even if it is killed."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from farfield.protocols.errors import HomeError

from .disk import disk

LOCK: Final = "resident.lock"
_ATTEMPTS: Final = 20


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes from working in the folder `path`.

    Raises:
        HomeError: another process works there; says which.
    """
    with disk(path):
        lock = os.fdopen(os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")
    with lock:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _ATTEMPTS - 1:
                    pid = _pid(lock.read())
                    raise HomeError(
                        f"another edge-client process{f' ({pid})' if pid else ''} runs here",
                        where=path,
                        hint="Stop it first, or give another place with --home.",
                    ) from None
            time.sleep(0.01)  # `edge-client status` looks at the lock for a moment
        with suppress(OSError):  # a full disk; the lock holds, only whose it is cannot be said
            os.truncate(lock.fileno(), 0)
            os.pwrite(lock.fileno(), str(os.getpid()).encode(), 0)
        yield


def holder(path: Path) -> int | None:
    """The process that works in `path`: its id (0 where that cannot be read), or None when none does."""
    try:
        lock = (path / LOCK).open(encoding="ascii")
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid(lock.read())
    return None


def _pid(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0

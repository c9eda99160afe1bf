"""Files that are written whole or not at all, and a disk that refuses in one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farfield.protocols.errors import HomeError


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a HomeError."""
    try:
        yield
    except OSError as error:
        raise HomeError(
            f"cannot be used: {(error.strerror or str(error)).lower()}",
            where=error.filename or path,
            hint="Make room or see to its permissions, or name another place with --home.",
        ) from None


def write(file: Path, raw: bytes, *, durable: bool = True) -> None:
    """Put `raw` at `file`, mode 0600, whole or not at all; on the disk before returning if `durable`."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(raw)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Have what was made, renamed or removed in `folder` on the disk before returning."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove `folder` and all that is in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)

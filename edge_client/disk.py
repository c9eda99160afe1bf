"""Files that are written whole or not at all, and a disk that refuses in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farfield.protocols import durable as durably
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
    """Put `raw` at `file`, for its owner only; otherwise as `farfield.protocols.durable.write` does."""
    durably.write(file, raw, mode=0o600, durable=durable)


def remove(folder: Path) -> None:
    """Remove `folder` and all that is in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)

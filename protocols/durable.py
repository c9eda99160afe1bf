"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write(file: Path, raw: bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Put `raw` at `file`, whole or not at all; with `durable` it is on the disk before this returns.

    Args:
        mode: the file's, less what the umask takes away.

    Raises:
        OSError: as the disk says; what was there before is still there.
    """
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(raw)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(file.parent)


def sync(folder: Path) -> None:
    """Have what was made, renamed or removed in `folder` on the disk before returning."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

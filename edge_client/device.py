"""What this machine has of memory, what this process takes of it, and how its allocator goes about it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_GROUP: Final = Path("/sys/fs/cgroup")

_FRUGAL: Final = 256 * 1024
_USUAL: Final = 32 * 1024 * 1024
_MMAP_THRESHOLD: Final = -3
"""M_MMAP_THRESHOLD of glibc's mallopt."""


def available_memory() -> int | None:
    """Bytes that a process here may still take: what the machine has free, or what its container (cgroup 2) leaves."""
    try:
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, another version of cgroups, or "max"
        return free
    return max(0, min(free, limit - used))


def resident() -> int:
    """Bytes of memory that this process takes now, shared libraries included; 0 where that cannot be seen."""
    try:
        # Read thousands of times while there is little left: a few microseconds, and no memory to speak of.
        with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123
            return int(file.read(128).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def most_resident() -> int:
    """The most bytes that it took at any time; 0 where that cannot be seen."""
    return _status("VmHWM")


def writable() -> int:
    """Bytes that it may write to, taken or not: what RLIMIT_DATA counts; 0 where that cannot be seen."""
    return _status("VmData")


def save_memory(frugal: bool) -> bool:
    """Have large tensors be pages of their own, which go back to the system as soon as they are given up, or not.

    Otherwise the C library keeps them in one heap, whose holes are too small for what comes next: training takes up to
    twice the memory of its tensors. In return each new tensor costs the system fresh pages, and time.

    Returns:
        Whether that could be arranged; only glibc knows how.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        return False
    done = bool(library.mallopt(_MMAP_THRESHOLD, _FRUGAL if frugal else _USUAL))
    if frugal:
        library.malloc_trim(0)
    return done


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)

"""Looks for one client's update wherever a byte can lie: in files, and in the memory of processes that run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = 1 << 24
OVERLAP = 1 << 10
"""More than any window has bytes."""

VALUES = 12
"""So many values in a row are no accident."""


@dataclass(frozen=True)
class Trace:
    """What an update looks like where nothing hides it.

    Attributes:
        exact: by the name of a form, the bytes of some stretches of it.
        words: stretches of its values in fixed point, modulo 2^24; stochastic rounding may move each by one.
    """

    exact: Mapping[str, tuple[bytes, ...]]
    words: tuple[NDArray[np.uint32], ...]

    def found(self, raw: bytes) -> frozenset[str]:
        """The forms that are in `raw`."""
        exact = {form for form, stretches in self.exact.items() if any(one in raw for one in stretches)}
        return frozenset(exact | ({"words"} if any(_near(raw, one) for one in self.words) else set()))


def stretches(values: Iterable[NDArray[np.float32]], most: int = 2) -> Iterator[slice | None]:
    """For each array a stretch whose values are all far from zero; None where there is none, or after `most`."""
    given = 0
    for array in values:
        smallest = np.lib.stride_tricks.sliding_window_view(np.abs(array), VALUES).min(axis=1)
        at = int(smallest.argmax())
        clear = bool(smallest[at] > 1e-5) and given < most
        given += clear
        yield slice(at, at + VALUES) if clear else None


def floats(values: NDArray[np.float32]) -> dict[str, bytes]:
    """The values as they are, and as half of each would be sent."""
    half = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    return {"float32": values.tobytes(), "bfloat16": half.tobytes()}


def in_files(trace: Trace, folder: Path) -> dict[Path, frozenset[str]]:
    """Files under `folder` that hold the update, and in which form."""
    every = {path: trace.found(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    return {path: forms for path, forms in every.items() if forms}


def in_memory(trace: Trace, pid: int) -> frozenset[str]:
    """The forms in which the update is in the memory of a process, which runs on meanwhile; none if it has ended."""
    forms: frozenset[str] = frozenset()
    for chunk in _memory(pid):
        forms |= trace.found(chunk)
    return forms


def _memory(pid: int) -> Iterator[bytes]:
    """What the process may write to."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="ascii", errors="replace").splitlines()
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in maps:
                extent, rights = line.split()[:2]
                begin, end = (int(one, 16) for one in extent.split("-"))
                if rights.startswith("rw"):
                    yield from _chunks(memory, begin, end)
    except (FileNotFoundError, ProcessLookupError):
        return


def _chunks(memory: FileIO, begin: int, end: int) -> Iterator[bytes]:
    for start in range(begin, end, CHUNK):
        try:
            memory.seek(start)
            yield memory.read(min(CHUNK + OVERLAP, end - start))
        except OSError:  # given back meanwhile, or a device's
            return


def _near(raw: bytes, words: NDArray[np.uint32]) -> bool:
    memory = np.frombuffer(raw, "<u4", len(raw) // 4)
    for at in np.flatnonzero(_within_one(memory, words[0])):
        candidate = memory[at : at + len(words)]
        if len(candidate) == len(words) and _within_one(candidate, words).all():
            return True
    return False


def _within_one(memory: NDArray[np.uint32], words: NDArray[np.uint32] | np.uint32) -> NDArray[np.bool_]:
    return (memory - words + np.uint32(1)) & np.uint32(0xFFFFFF) <= 2

"""What was foretold of Plans on this machine, kept at home so that nobody looks ahead twice.

What a way to work by a Plan comes to depends on the Plan, the backbone, the methods that the owner allows, our own code
and the libraries; with any other of these it is looked at anew. The limit is none of them: whether a way fits is judged
by the limit of the moment, which changes with what the machine has free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from farfield.protocols.audit.provenance import code_digest, versions
from farfield.protocols.plan import Plan

from .disk import write

if TYPE_CHECKING:
    from .choice import Fit

REMEMBERED: Final = 16
"""Of how many Plans and backbones it is kept."""


class Foretold:
    """The file in which it is kept; it need not exist, and one that cannot be read is as good as none."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def recall(self, key: str, most: int) -> tuple[Fit, ...] | None:
        """The ways that were looked at under `key`, judged by the limit of `most` bytes.

        None where there are none, or where none of them fits and there are others that were not looked at.
        """
        from .choice import Fit, Way, within

        try:
            table = tuple(Fit(**{**one, "way": Way(**one["way"])}) for one in self._all()[key])
            judged = tuple(replace(one, fits=within(one.memory, most)) for one in table)
        except (KeyError, TypeError):
            return None
        # Who looked ahead stopped at the first that fitted: where none did, these are all.
        every = not any(one.fits for one in table)
        return judged if every or any(one.fits for one in judged) else None

    def keep(self, key: str, table: tuple[Fit, ...]) -> None:
        """Keep what was looked at, in place of what was kept under `key` before."""
        known = {other: kept for other, kept in self._all().items() if other != key}
        known[key] = [asdict(one) for one in table]
        latest = dict(list(known.items())[-REMEMBERED:])
        with suppress(OSError):  # a full disk costs the next look and not this task
            write(self._file, json.dumps(latest).encode())

    def forget(self) -> None:
        """Keep nothing: what was foretold did not come true."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def question(plan: Plan, backbone: str, allowed: Collection[str]) -> str:
    """What it all depends on, as one digest.

    Args:
        backbone: digest of its bundle, or of the emulator's.
        allowed: tuning methods that the owner of the data consents to.
    """
    parts = [plan.digest, backbone, sorted(allowed), code_digest(), versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""What a client keeps of a run's adapter at home, by round, so that a round which is done again comes out the same.

    FOLDER/
        round-0005.safetensors     the state before the last round that this client trained in
        round-0007.safetensors     the state after it; written beside its name and moved there, mode 0600

A coordinator that dies in round 7 does round 7 again, and then this client begins from its state of round 5 again. What
is older has no further use and is removed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from farfield.protocols.durable import sync
from farfield.protocols.errors import HomeError
from farfield.protocols.tensors import State

from .disk import write

_NAME: Final = re.compile(r"round-(\d+)\.safetensors")
_BEFORE: Final = "before"


class LocalState:
    """The states of one client in one run. The folder need not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after(self, number: int) -> State | None:
        """The state after round `number`: that of the last round up to it that the client trained in; None if in none.

        Raises:
            HomeError: it was there once and is not any more, or cannot be read.
        """
        rounds = self._rounds()
        found = max((one for one in rounds if one <= number), default=None)
        if found is not None:
            return self._read(found)[0]
        # Only later rounds are here. The first of them knows whether there was anything before it.
        if rounds and self._read(min(rounds))[1]:
            raise HomeError(
                f"what was kept here from before round {min(rounds)} is gone, and round {number} was before it",
                where=self._folder,
                hint="A run can be taken back by one round only; start a new one.",
            )
        return None

    def save(self, number: int, state: State) -> None:
        """Keep `state`, float32 arrays by name, as that after round `number`; any later round is forgotten.

        Raises:
            HomeError: the disk refuses.
        """
        rounds = self._rounds()
        before = max((one for one in rounds if one < number), default=0)
        raw = save(dict(sorted(state.items())), metadata={_BEFORE: str(before)})
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write(self._path(number), raw)
            sync(self._folder)  # the states before it are removed next
            for one in rounds:
                if one not in (before, number):
                    self._path(one).unlink()
        except OSError as error:
            raise HomeError(f"cannot be written: {error.strerror}", where=self._folder) from None

    def _rounds(self) -> list[int]:
        try:
            found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=self._folder) from None
        return [int(match[1]) for match in found if match]

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}.safetensors"

    def _read(self, number: int) -> tuple[State, int]:
        """The state, and the number of the round before it that this client trained in; 0 for none."""
        path = self._path(number)
        try:
            with safe_open(path, "numpy") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                return state, int(file.metadata()[_BEFORE])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HomeError(f"cannot be read: {error}", where=path) from None

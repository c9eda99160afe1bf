"""What an audit has found out so far, kept so that it can be killed at any moment and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load, save

from farfield.protocols.durable import write
from farfield.protocols.errors import AuditError
from farfield.protocols.tensors import State


class Notes:
    """A folder of named results, each made once: asked for again, it is read."""

    def __init__(self, folder: Path) -> None:
        """Raises AuditError when the folder cannot be made."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(folder, error) from None

    def values(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON-ready values, as JSON has them: tuples come back as lists.

        Raises:
            AuditError: what is there cannot be read, or what was made cannot be written.
        """
        file = self.folder / f"{name}.json"
        if not file.exists():
            self._write(file, json.dumps(make(), allow_nan=False).encode())
        try:
            return json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from None

    def state(self, name: str, make: Callable[[], Mapping[str, Any]]) -> State:
        """Named float32 arrays. Raises as `values` does."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            self._write(file, save(dict(make())))
        try:
            return dict(load(file.read_bytes()))
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from None

    def within(self, name: str) -> Notes:
        """A folder in this one."""
        return Notes(self.folder / name)

    def _write(self, file: Path, raw: bytes) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, raw)
        except OSError as error:
            raise _refused(file, error) from None


def _refused(path: Path, error: OSError) -> AuditError:
    return AuditError(
        f"cannot be written: {(error.strerror or str(error)).lower()}",
        where=path,
        hint="Make room or choose another disk; what was found so far is kept.",
    )


def _damaged(path: Path, error: Exception) -> AuditError:
    return AuditError(f"cannot be read: {error}", where=path, hint="Remove it to have it made again.")

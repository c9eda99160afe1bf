"""What the setting `data.path` names, and the records that are in it: the owner's files, or a part of the prose of
Python's standard library, for a demonstration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farfield.protocols.errors import DataError, PlanError
from farfield.protocols.sections import Data

from .records import Record

_STDLIB: Final = re.compile(r"builtin:stdlib/([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
_BUILTIN: Final = "builtin:"


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` (from 1) of `parts` of the standard library's prose."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{_BUILTIN}stdlib/{self.number}/{self.parts}"

    def texts(self) -> list[str]:
        """Its texts. Raises DataError when there is too little prose for so many parts."""
        from . import stdlib

        return stdlib.clients(self.parts)[self.number - 1][1]


def data_source(text: str) -> Path | Part:
    """What `data.path` means: a file or a folder, which need not exist, or a part of the standard library.

    Raises:
        DataError: neither an absolute path nor a builtin that is known.
    """
    if text.startswith(_BUILTIN):
        match = _STDLIB.fullmatch(text)
        if not match or int(match[1]) > int(match[2]):
            raise DataError(
                "no such builtin data",
                where=text,
                hint="builtin:stdlib/I/N is part I, from 1, of N parts of the standard library's prose.",
            )
        return Part(int(match[1]), int(match[2]))
    path = Path(text)
    if not path.is_absolute():
        raise DataError("not an absolute path", where=text, hint="Give it from the root on; '/data/notes', say.")
    return path


def records(source: Path | Part, data: Data, task: str, labels: int | None) -> Iterator[Record]:
    """The records of `source`, lazily.

    Raises:
        DataError: as `farfield.edge_client.records.read` does, while iterating.
        PlanError: a part of the standard library is asked for classes, which it has not.
    """
    from . import records as files

    if isinstance(source, Path):
        return files.read(source, data, task, labels)
    if task == files.CLASSIFICATION:
        raise PlanError(f"the data here, {source}, is text without classes, so it cannot do {task}")
    return (files.Text(text) for text in source.texts())

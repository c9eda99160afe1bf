"""Which program made a report: its sources as one digest, and the versions of what its figures depend on."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from farfield.protocols.identity import statement

PACKAGES: Final = ("coordinator", "edge_client", "emulator", "kernels", "protocols")

_LIBRARIES: Final = ("torch", "transformers", "peft", "opacus", "dp-accounting", "cryptography", "numpy")
_SOURCES: Final = ("*.py", "*.proto", "*.jinja", "*.css")


@cache
def code_digest() -> str:
    """SHA-256, in hexadecimal, over the sources of the five packages as they are installed here.

    The same for a wheel and for an editable install of one state of the repository; compiled files and folders that
    are no part of a package have no say.
    """
    hasher = hashlib.sha256()
    for package in PACKAGES:
        for name, file in sources(package):
            hasher.update(statement("source", name.encode(), file.read_bytes()))
    return hasher.hexdigest()


def sources(package: str) -> list[tuple[str, Path]]:
    """The source files of one of `PACKAGES` by name, "protocols/plan.py", in the order of their names."""
    # A namespace has a list of folders, and an editable install puts a hook among them that is none.
    folders = [Path(place) for place in import_module(f"farfield.{package}").__path__ if Path(place).is_dir()]
    found = {
        f"{package}/{file.relative_to(folder).as_posix()}": file
        for folder in reversed(folders)  # the first one is what is imported
        for pattern in _SOURCES
        for file in folder.rglob(pattern)
    }
    return sorted(found.items())


def release() -> str:
    """The version of Farfield."""
    return version("farfield")


def versions() -> dict[str, str]:
    """Versions of the libraries that a figure may depend on; none of them is imported for it."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an edge machine may do without one
            continue
    return found

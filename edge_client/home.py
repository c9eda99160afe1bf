"""The home of an edge client: its settings, its keys, its cache, and what it last did.

    HOME/
        edge-client.toml     settings and consent; the owner edits it, and every start reads it anew
        keys/                ca.pem  tls.key tls.pem  fleet.key  signing.key  sealing.key   (folder 0700, files 0600)
        cache/               bundles by digest
        ledger.jsonl         what runs have spent of the data's privacy; it stays when the node leaves
        local/               by run, what of its adapter never leaves this machine   (folder 0700, files 0600)
        foretold.json        what Plans were found to take of this machine's memory
        state.json           what the resident process last did
        resident.lock        held by the one process that works here

A folder is a home from the moment that `keys` is in it. `keys` appears whole, by a rename, after everything else was
written, so whatever kills `Home.create` leaves either a home or none.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from farfield.protocols.durable import sync
from farfield.protocols.errors import HomeError

from . import lock
from .disk import disk, remove, write
from .keys import FILES, KEYS, LOST, Keys
from .resident_state import State
from .settings import SETTINGS, Settings, read_settings

_PARTIAL: Final = "keys.partial"
_CACHE: Final = "cache"
_LEDGER: Final = "ledger.jsonl"
_LOCAL: Final = "local"
_FORETOLD: Final = "foretold.json"
_STATE: Final = "state.json"

_PROBE_BYTES: Final = 65536
"""More than all that `Home.create` writes."""


class Home:
    """One enrolled edge client on disk."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Not called directly: `create` and `open` check what they hand out."""
        self.path, self.settings = path, settings

    @classmethod
    def create(cls, path: Path, settings: Settings, keys: Keys) -> Home:
        """Make the home at `path`, whole or not at all; best within `vacant`.

        Settings that stood there before are kept as `edge-client.toml.old`.

        Raises:
            HomeError: there is a home already, or the disk refuses.
        """
        _refuse_second(path)
        partial = path / _PARTIAL
        with disk(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove(partial)  # of a process that was killed here
            try:
                partial.mkdir(mode=0o700)
                for attribute, name in FILES.items():
                    write(partial / name, getattr(keys, attribute))
                sync(partial)
                if (path / SETTINGS).exists():
                    write(path / f"{SETTINGS}.old", (path / SETTINGS).read_bytes())
                write(path / SETTINGS, settings.render().encode())
                partial.rename(path / KEYS)
                sync(path)
            except BaseException:
                remove(partial)
                raise
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> Home:
        """The home at `path`, with its settings as they are now.

        Raises:
            HomeError: no edge client has enrolled here, a secret lies open to others, or a setting is wrong.
        """
        if not enrolled(path):
            raise HomeError(
                "no edge client has enrolled here", where=path, hint="`edge-client join HOST:PORT --home …` does it."
            )
        _check_permissions(path)
        return cls(path, read_settings(path))

    @property
    def cache(self) -> Path:
        """The folder of downloaded bundles; it need not exist."""
        return self.path / _CACHE

    def cached_bytes(self) -> int:
        """How much disk the cache takes."""
        used = 0
        for file in self.cache.rglob("*"):
            try:
                used += file.stat().st_size if file.is_file() else 0
            except OSError:  # the resident process has just removed it
                continue
        return used

    @property
    def ledger(self) -> Path:
        """The file of what runs have spent of the data's privacy; it need not exist."""
        return self.path / _LEDGER

    @property
    def local(self) -> Path:
        """The folder of what the node keeps of adapters for itself; it need not exist."""
        return self.path / _LOCAL

    @property
    def foretold(self) -> Path:
        """The file of what Plans were found to take of this machine's memory; it need not exist."""
        return self.path / _FORETOLD

    def keys(self) -> Keys:
        """The keys. Raises HomeError when one is missing or may be read by others."""
        _check_permissions(self.path)
        try:
            return Keys(**{name: (self.path / KEYS / file).read_bytes() for name, file in FILES.items()})
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=error.filename, hint=LOST) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working here; released by the system when this process ends, even if killed.

        Raises:
            HomeError: another process works here; says which.
        """
        with lock.held(self.path):
            yield

    def holder(self) -> int | None:
        """The process that works here: its id (0 where that cannot be read), or None when none does."""
        return lock.holder(self.path)

    def state(self) -> State | None:
        """What the resident process last did; None when it never did anything, or the file cannot be read."""
        try:
            return State.parse((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save_certificate(self, certificate: bytes) -> None:
        """Replace this node's certificate (PEM). Raises HomeError when the disk refuses."""
        with disk(self.path):
            write(self.path / KEYS / FILES["certificate"], certificate)

    def save_state(self, state: State) -> None:
        """Replace `state.json`. Raises HomeError when the disk refuses."""
        with disk(self.path):
            write(self.path / _STATE, (json.dumps(state.document(), indent=2) + "\n").encode(), durable=False)


@contextmanager
def vacant(path: Path) -> Iterator[Settings | None]:
    """Keep a place for a home while its owner enrols, so that no token is used up for a place that is none.

    Yields the settings that stand there already, for instance of a node that has left, or None. The folder is made, and
    taken away again if no home was created in it.

    Raises:
        HomeError: there is a home already, another process works there, the settings that stand there are wrong, the
            place can be changed by others, or it cannot be written.
    """
    _refuse_second(path)
    with disk(path):
        made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with disk(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_writers(path)
            probe = path / f".probe-{os.getpid()}"
            try:
                write(probe, bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        with lock.held(path):
            _refuse_second(path)
            yield read_settings(path) if (path / SETTINGS).exists() else None
    finally:
        if made and not (path / KEYS).exists():
            with suppress(OSError):  # it was never made, or something else is in it
                (path / lock.LOCK).unlink(missing_ok=True)
                for one in made:
                    one.rmdir()


def forget(path: Path) -> None:
    """Remove keys, cache, parts of adapters, what was foretold, and state, within `held`; the owner's settings stay.

    Raises:
        HomeError: the disk refuses.
    """
    with disk(path):
        remove(path / _PARTIAL)
        if (path / KEYS).exists():
            (path / KEYS).rename(path / _PARTIAL)  # from here on this is no home, whatever happens
        sync(path)
        remove(path / _PARTIAL)
        remove(path / _CACHE)
        remove(path / _LOCAL)
        (path / _FORETOLD).unlink(missing_ok=True)
        (path / _STATE).unlink(missing_ok=True)


def enrolled(path: Path) -> bool:
    """Whether an edge client has enrolled at `path`, sound or not. Raises HomeError when that cannot be seen."""
    with disk(path):
        return (path / KEYS).exists()


def _refuse_second(path: Path) -> None:
    if enrolled(path):
        raise HomeError(
            "an edge client has enrolled here already",
            where=path,
            hint="`edge-client start` runs it and `edge-client leave` withdraws it; --home DIR names another place.",
        )


def _check_permissions(path: Path) -> None:
    """Raise HomeError if anybody else may read a secret, or change what this machine trusts and allows."""
    _check_writers(path)
    folder = path / KEYS
    names = sorted(name for name in FILES.values() if name.endswith(".key"))
    for secret in (folder, *(folder / name for name in names)):
        try:
            mode = stat.S_IMODE(secret.stat().st_mode)
        except FileNotFoundError:
            raise HomeError("is missing", where=secret, hint=LOST) from None
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=secret) from None
        if mode & 0o077:
            raise HomeError(
                f"others may use this secret (its mode is {mode:04o})",
                where=secret,
                hint=f"If none can have read it, `chmod -R go= {folder}`; else have the node revoked and join again.",
            )


def _check_writers(path: Path) -> None:
    for one in (path, path / SETTINGS):
        if one.exists() and one.stat().st_mode & stat.S_IWOTH:
            raise HomeError(
                "everyone on this machine may change it, and so what this client trusts and allows",
                where=one,
                hint=f"`chmod o-w {one}`.",
            )

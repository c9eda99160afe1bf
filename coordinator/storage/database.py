"""The connection to the database: opened, upgraded, used in transactions, and its complaints put in words."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from farfield.protocols.errors import StorageError

from .tables import REVISION

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_WAIT_SECONDS: Final = 30
_UPGRADE_LOCK: Final = 0x46617266  # any number, the same in every process

_ADVICE: Final = (
    (("full", "disk i/o error", "no space"), "Make room on its disk; what was committed is kept."),
    (("readonly", "read-only", "unable to open", "permission denied"), "Whoever runs this must be able to write it."),
    (("locked",), "Another process has been writing for too long; try again."),
    (("not a database", "malformed"), "Restore it from a backup."),
    (("connection", "server closed", "terminating"), "Is the database server running, and the URL right?"),
)


class Database:
    """One database, usable from several threads; other processes may have it open too.

    Args:
        url: `sqlite:///FILE`, or `postgresql://…` (psycopg 3).
        base: what a relative FILE is relative to.
        upgrade: make the tables, or bring those of an older release up to date.

    Raises:
        StorageError: it cannot be opened, or its tables are not those of this release.
    """

    def __init__(self, url: str, base: Path, *, upgrade: bool) -> None:
        parsed = _parse(url, base)
        self.name = _name(parsed)
        self._engine = _engine(parsed, self.name, make=upgrade)
        self._writer = self._engine.execution_options(writing=True)
        try:
            if upgrade:
                self._upgrade()
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    @property
    def dialect(self) -> str:
        return self._engine.dialect.name

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database. Raises StorageError."""
        with self._explained(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is kept whole, or not at all when the block raises. Raises StorageError."""
        with self._explained(), self._writer.begin() as connection:
            yield connection

    def _check(self) -> None:
        with self.reading() as connection:
            found = _revision(connection)
        if found is None:
            raise StorageError("holds no tables", where=self.name, hint="`coordinator serve` makes them.")
        if found < REVISION:
            hint = "`coordinator serve` upgrades it; make a backup first."
            raise StorageError("was made by an older release of Farfield", where=self.name, hint=hint)
        if found > REVISION:
            raise StorageError("was made by a newer release of Farfield", where=self.name, hint="Update Farfield.")

    def _upgrade(self) -> None:
        from alembic import command
        from alembic.config import Config

        with self.writing() as connection:
            if self.dialect == "postgresql":  # SQLite's transaction keeps others out already
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
            if (_revision(connection) or "") >= REVISION:
                return
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, NoConnectionFree) as error:
            raise _explanation(error, self.name) from error


def _parse(url: str, base: Path) -> URL:
    """The URL with an absolute path, or with the driver that this package declares."""
    hint = "Give sqlite:///FILE, or postgresql://USER@HOST/NAME."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # without the URL: it may hold a password
        raise StorageError("not the URL of a database", where="database.url", hint=hint) from None
    match parsed.drivername:
        case "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise StorageError("several processes must share it, so it is a file", where="database.url", hint=hint)
            return parsed.set(database=str(base / parsed.database))
        case "postgresql" | "postgresql+psycopg":
            return parsed.set(drivername="postgresql+psycopg")
        case other:
            raise StorageError(f"{other!r} databases are not supported", where="database.url", hint=hint)


def _name(url: URL) -> str:
    """The URL as a person reads it: without a password, and a path as it is."""
    return f"sqlite:///{url.database}" if url.drivername == "sqlite" else url.render_as_string(hide_password=True)


def _engine(url: URL, name: str, *, make: bool) -> Engine:
    if url.drivername != "sqlite":
        try:
            return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
        except (ImportError, NoSuchModuleError):
            hint = "Install farfield[postgresql]."
            raise StorageError("PostgreSQL's driver psycopg is missing", where=name, hint=hint) from None
    assert url.database is not None
    try:
        # Made here and not by SQLite, so that only the owner may read it; the files beside it take its mode.
        os.close(os.open(url.database, os.O_RDWR | (os.O_CREAT if make else 0), 0o600))
    except FileNotFoundError:
        raise StorageError("no such database", where=name, hint="`coordinator init` makes one.") from None
    except OSError as error:
        raise StorageError(
            f"cannot be opened: {(error.strerror or str(error)).lower()}",
            where=name,
            hint="Whoever runs this must be able to write it.",
        ) from None
    engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say; see _begin_sqlite
    _write_ahead(connection)
    connection.execute("PRAGMA foreign_keys = ON")


def _write_ahead(connection: Any) -> None:
    """The mode in which readers do not wait for a writer. SQLite's own patience is not for the change to it."""
    limit = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > limit:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that will write takes the lock first: one that read before could not, if another wrote between."""
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _explanation(error: DBAPIError | NoConnectionFree, where: str) -> StorageError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    reason = lines[0].rstrip(".:")
    said = str(cause).lower()
    hint = next((advice for signs, advice in _ADVICE if any(sign in said for sign in signs)), "")
    return StorageError(f"the database says: {reason}", where=where, hint=hint)

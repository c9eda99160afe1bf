"""The tables, as they are after the last migration; a test holds the two together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from sqlalchemy import (
    Column,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

from .rows import RunState

REVISION: Final = "0001"
"""The last migration. They are numbered, so that a newer database can be told from an older one."""


class Moment(TypeDecorator[datetime]):
    """An aware datetime; SQLite, which has no time zones, holds it in UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Number(TypeDecorator[int]):
    """Flower's numbers for nodes and runs: 64 bits without a sign, which neither database has; held as decimal text."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value)


class Words(TypeDecorator[str]):
    """Text that may come from a peer: what PostgreSQL (NUL) or UTF-8 (lone surrogates) cannot hold becomes '?'."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "?").encode("utf-8", "replace").decode()


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

invitations = Table(
    "invitations",
    metadata,
    Column("secret_digest", LargeBinary(32), primary_key=True),
    Column("invited_at", Moment, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("used_at", Moment),
    Column("used_by", String(64), ForeignKey("nodes.name")),
)

nodes = Table(
    "nodes",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("fleet_key", LargeBinary, nullable=False, unique=True),
    Column("signing_key", LargeBinary(32), nullable=False, unique=True),
    Column("sealing_key", LargeBinary(32), nullable=False),
    Column("certificate", String(40), nullable=False, unique=True),
    Column("enrolled_at", Moment, nullable=False),
    Column("revoked_at", Moment),
    Column("revoked_because", Words),
    Column("fleet_id", Number),
    Column("instance", Words),
    Column("address", Words),
    Column("seen_at", Moment),
)

runs = Table(
    "runs",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("plan", LargeBinary, nullable=False),
    Column("plan_digest", String(64), nullable=False),
    Column("backbone", String(64), nullable=False),
    Column("folder", Text, nullable=False),
    Column(
        "state",
        Enum(RunState, native_enum=False, length=16, values_callable=lambda states: [one.value for one in states]),
        nullable=False,
    ),
    Column("detail", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("started_at", Moment),
    Column("finished_at", Moment),
    Column("flower_run", Number),
    Column("crashes", Integer, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", String(200), ForeignKey("runs.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column(
        "record", Text, nullable=False
    ),  # the JSON of a line of metrics.jsonl, so that a new field needs no migration
)

bundles = Table(
    "bundles",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("folder", Text, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
)

notices = Table(
    "notices",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("node", String(64), ForeignKey("nodes.name"), nullable=False, index=True),
    Column("text", Words, nullable=False),
    Column("noticed_at", Moment, nullable=False),
)

service = Table(
    "service",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("pid", Integer, nullable=False),
    Column("since", Moment, nullable=False),
    Column("beat_at", Moment, nullable=False),
)

"""The store: one method for each thing that happens, each one transaction, so that none is ever half done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Row, Table, delete, exists, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from farfield.coordinator.runs import RoundRecord
from farfield.protocols.errors import EnrolmentError, StorageError, did_you_mean

from .database import Database
from .rows import BundleRow, Node, Run, RunState
from .tables import bundles, invitations, nodes, notices, rounds, runs, service

ALIVE: Final = timedelta(seconds=10)
"""A service whose last beat is older than this does not run any more."""

_OPEN: Final = (RunState.QUEUED, RunState.RUNNING)
_ASK: Final = "Ask for a new one, made with `coordinator invite`."


class Store:
    """The coordinator's memory. Safe to use from several threads and processes at once.

    Every method raises StorageError when the database cannot do it: no room, read-only, damaged, or out of reach.
    """

    def __init__(self, database: Database, base: Path) -> None:
        self._database, self._base = database, base

    @classmethod
    def open(cls, url: str, *, base: Path | None = None, upgrade: bool = False) -> Store:
        """The store in the database at `url`.

        Args:
            url: `sqlite:///FILE` or `postgresql://…`.
            base: what a relative FILE is relative to, and stored folders too where they are inside it, so that a home
                can be moved; by default the current folder.
            upgrade: make the tables, or bring those of an older release up to date.

        Raises:
            StorageError: it cannot be opened, holds no tables, or those of an older or a newer release.
        """
        base = (base or Path()).resolve()
        return cls(Database(url, base, upgrade=upgrade), base)

    def close(self) -> None:
        self._database.close()

    @property
    def name(self) -> str:
        """The database's URL, without a password."""
        return self._database.name

    # --- Invitations ------------------------------------------------------------------------------------------------

    def invite(self, secret_digests: Sequence[bytes], now: datetime, lifetime: timedelta) -> None:
        """Open invitations: each the SHA-256 of a token's secret, good for one enrolment within `lifetime`."""
        rows = [{"secret_digest": one, "invited_at": now, "expires_at": now + lifetime} for one in secret_digests]
        with self._database.writing() as db:
            if rows:
                db.execute(insert(invitations), rows)

    def redeem(self, secret: bytes, node: Node, now: datetime) -> None:
        """Admit `node`, and mark the invitation with this secret as used: both or neither.

        Raises:
            EnrolmentError: there is no such invitation, it was used or has expired, or another node has the name or one
                of the keys; the invitation then stays as it was.
        """
        digest = hashlib.sha256(secret).digest()
        mine = invitations.c.secret_digest == digest
        with self._database.writing() as db:
            # Locks the row in PostgreSQL; in SQLite the whole database is locked. Whoever comes second sees it used.
            row = db.execute(select(invitations).where(mine).with_for_update()).one_or_none()
            if row is None:
                raise EnrolmentError("this coordinator made no such invitation", where="token", hint=_ASK)
            if row.used_at is not None:
                raise EnrolmentError(f"the invitation was used on {_at(row.used_at)}", where="token", hint=_ASK)
            if now >= row.expires_at:
                raise EnrolmentError(f"the invitation expired on {_at(row.expires_at)}", where="token", hint=_ASK)
            self._check_new(db, node)
            try:
                db.execute(insert(nodes).values(asdict(node)))
            except IntegrityError:  # PostgreSQL, when two invitations are redeemed for one name at the same moment
                hint = "Choose another name, or make new keys."
                raise EnrolmentError("its name or a key was taken a moment ago", where=node.name, hint=hint) from None
            db.execute(update(invitations).where(mine).values(used_at=now, used_by=node.name))

    def open_invitations(self, now: datetime) -> int:
        """How many can still be redeemed."""
        unused = select(func.count()).where(invitations.c.used_at.is_(None), invitations.c.expires_at > now)
        with self._database.reading() as db:
            return db.execute(unused).scalar_one()

    @staticmethod
    def _check_new(db: Connection, node: Node) -> None:
        same = or_(
            nodes.c.name == node.name,
            nodes.c.fleet_key == node.fleet_key,
            nodes.c.signing_key == node.signing_key,
            nodes.c.certificate == node.certificate,
        )
        taken = db.execute(select(nodes.c.name).where(same)).scalars().all()
        if node.name in taken:
            hint = "Choose another name: one that was revoked is not given again either."
            raise EnrolmentError("another node has this name", where=node.name, hint=hint)
        if taken:
            hint = "Every machine makes keys of its own: remove the copied ones and join again."
            raise EnrolmentError("another node has these keys", where=node.name, hint=hint)

    # --- Nodes ------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """All that were ever admitted, by name."""
        with self._database.reading() as db:
            return [Node(**row._mapping) for row in db.execute(select(nodes).order_by(nodes.c.name))]

    def node(self, name: str) -> Node | None:
        with self._database.reading() as db:
            row = db.execute(select(nodes).where(nodes.c.name == name)).one_or_none()
        return None if row is None else Node(**row._mapping)

    def revoke(self, name: str, because: str, now: datetime) -> None:
        """Admit the node no longer; one that was revoked before stays as it was.

        Raises:
            StorageError: there is no such node.
        """
        with self._database.writing() as db:
            self._check_known(db, nodes, name)
            still = update(nodes).where(nodes.c.name == name, nodes.c.revoked_at.is_(None))
            db.execute(still.values(revoked_at=now, revoked_because=because))

    def renewed(self, name: str, certificate: str) -> None:
        """Note the serial number of a node's new certificate. Raises StorageError for a node that is not known."""
        with self._database.writing() as db:
            self._check_known(db, nodes, name)
            db.execute(nodes.update().where(nodes.c.name == name).values(certificate=certificate))

    def set_fleet_ids(self, ids: Mapping[str, int | None]) -> None:
        """Remember what the SuperLink calls these nodes; None for one that it does not know."""
        with self._database.writing() as db:
            for name, number in ids.items():
                db.execute(update(nodes).where(nodes.c.name == name).values(fleet_id=number))

    def attend(self, name: str, instance: str, address: str, now: datetime) -> None:
        """The process `instance` of this node attends from now on, in place of any other.

        Raises:
            StorageError: there is no such node.
        """
        with self._database.writing() as db:
            self._check_known(db, nodes, name)
            here = {"instance": instance, "address": address, "seen_at": now}
            db.execute(update(nodes).where(nodes.c.name == name).values(here))

    def absent(self, name: str, instance: str, now: datetime) -> None:
        """That process attends no longer; nothing happens if another has taken its place."""
        with self._database.writing() as db:
            left = update(nodes).where(nodes.c.name == name, nodes.c.instance == instance)
            db.execute(left.values(instance=None, seen_at=now))

    def everyone_absent(self) -> None:
        """No node attends: what a service that has just started knows."""
        with self._database.writing() as db:
            db.execute(update(nodes).values(instance=None))

    # --- Runs -------------------------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        """Raises StorageError when a run of this name exists."""
        values = asdict(run) | {"folder": self._relative(run.folder)}
        with self._database.writing() as db:
            if db.execute(select(runs.c.name).where(runs.c.name == run.name)).first():
                raise StorageError("a run of this name exists already", where=run.name)
            db.execute(insert(runs).values(values))

    def runs(self, *states: RunState) -> list[Run]:
        """Runs in one of these states, or all; oldest first."""
        chosen = select(runs).order_by(runs.c.created_at, runs.c.name)
        with self._database.reading() as db:
            return [self._run(row) for row in db.execute(chosen.where(runs.c.state.in_(states)) if states else chosen)]

    def run(self, name: str) -> Run | None:
        with self._database.reading() as db:
            row = db.execute(select(runs).where(runs.c.name == name)).one_or_none()
        return None if row is None else self._run(row)

    def begin(self, name: str, flower_run: int, now: datetime) -> None:
        """The run works, as this run of the SuperLink: for the first time or again. One that has ended stays ended.

        Raises:
            StorageError: there is no such run.
        """
        started = func.coalesce(runs.c.started_at, now)
        self._change(name, state=RunState.RUNNING, flower_run=flower_run, started_at=started, detail="")

    def end(self, name: str, state: RunState, detail: str, now: datetime) -> None:
        """The run has ended, with a final state. One that has ended before stays as it was.

        Raises:
            StorageError: there is no such run.
        """
        self._change(name, state=state, detail=detail, finished_at=now)

    def say(self, name: str, detail: str) -> None:
        """What a queued or running run waits for. Raises StorageError when there is no such run."""
        self._change(name, detail=detail)

    def crashed(self, name: str) -> int:
        """Count a ServerApp that was lost; how many since the last finished round.

        Raises:
            StorageError: there is no such run.
        """
        with self._database.writing() as db:
            self._check_known(db, runs, name)
            more = update(runs).where(runs.c.name == name).values(crashes=runs.c.crashes + 1)
            return int(db.execute(more.returning(runs.c.crashes)).scalar_one())

    def add_round(self, run: str, record: RoundRecord) -> None:
        """A round has finished; a record of the same round is replaced. Raises StorageError: no such run."""
        with self._database.writing() as db:
            self._check_known(db, runs, run)
            self._put(db, rounds, run=run, number=record.round, record=json.dumps(asdict(record)))
            db.execute(update(runs).where(runs.c.name == run).values(crashes=0))

    def rounds(self, run: str) -> list[RoundRecord]:
        """The finished rounds in order, with number 0, the evaluation before the first."""
        mine = select(rounds.c.record).where(rounds.c.run == run).order_by(rounds.c.number)
        with self._database.reading() as db:
            return [RoundRecord(**json.loads(record)) for record in db.execute(mine).scalars()]

    def _change(self, name: str, **values: Any) -> None:
        """Set columns of a run that has not ended."""
        with self._database.writing() as db:
            self._check_known(db, runs, name)
            db.execute(update(runs).where(runs.c.name == name, runs.c.state.in_(_OPEN)).values(values))

    def _run(self, row: Row[Any]) -> Run:
        return Run(**{**row._mapping, "folder": self._base / row.folder})

    # --- Bundles ----------------------------------------------------------------------------------------------------

    def add_bundle(self, bundle: BundleRow) -> None:
        """Offer a bundle, or say where it lies now."""
        with self._database.writing() as db:
            self._put(db, bundles, **asdict(bundle) | {"folder": self._relative(bundle.folder)})

    def bundle(self, digest: str) -> BundleRow | None:
        with self._database.reading() as db:
            row = db.execute(select(bundles).where(bundles.c.digest == digest)).one_or_none()
        return None if row is None else BundleRow(**{**row._mapping, "folder": self._base / row.folder})

    def ship(self, run: str, digest: str) -> None:
        """Have the clients of the run fetch another bundle from now on."""
        with self._database.writing() as db:
            db.execute(update(runs).where(runs.c.name == run).values(backbone=digest))

    def may_fetch(self, digest: str) -> bool:
        """Whether a queued or running run has this bundle as its backbone."""
        wanted = exists().where(runs.c.backbone == digest, runs.c.state.in_(_OPEN))
        with self._database.reading() as db:
            return bool(db.execute(select(wanted)).scalar_one())

    # --- Notices ----------------------------------------------------------------------------------------------------

    def notify(self, node: str, text: str, now: datetime) -> None:
        """Leave a message for the people at a node. Raises StorageError: no such node."""
        with self._database.writing() as db:
            self._check_known(db, nodes, node)
            db.execute(insert(notices).values(node=node, text=text, noticed_at=now))

    def take_notices(self, node: str) -> list[str]:
        """What was left for this node, oldest first; each is given once."""
        mine = notices.c.node == node
        with self._database.reading() as db:  # asked often, and mostly for nothing: no reason to lock out who writes
            if not db.execute(select(exists().where(mine))).scalar_one():
                return []
        taking = delete(notices).where(mine).returning(notices.c.id, notices.c.text)
        with self._database.writing() as db:
            return [text for _, text in sorted(tuple(row) for row in db.execute(taking))]

    # --- The service ------------------------------------------------------------------------------------------------

    def beat(self, pid: int, now: datetime) -> None:
        """The service runs, as this process."""
        with self._database.writing() as db:
            last = db.execute(select(service)).one_or_none()
            # A number may be that of an earlier process: in a container it is always the same.
            same = last is not None and last.pid == pid and now - last.beat_at < ALIVE
            self._put(db, service, id=1, pid=pid, since=last.since if last and same else now, beat_at=now)

    def last_beat(self) -> tuple[int, datetime] | None:
        """The process that last was the service, and when it last said so."""
        with self._database.reading() as db:
            row = db.execute(select(service.c.pid, service.c.beat_at)).one_or_none()
        return None if row is None else (row.pid, row.beat_at)

    def serving_since(self, now: datetime) -> datetime | None:
        """When the service that runs now began; None when none does."""
        with self._database.reading() as db:
            row = db.execute(select(service.c.since, service.c.beat_at)).one_or_none()
        return row.since if row is not None and now - row.beat_at < ALIVE else None

    def rest(self) -> None:
        """The service stops: from now on none runs, and no node attends."""
        with self._database.writing() as db:
            db.execute(delete(service))
            db.execute(update(nodes).values(instance=None))

    # --- What several of them need ----------------------------------------------------------------------------------

    def _put(self, db: Connection, table: Table, **values: Any) -> None:
        """Add a row, or replace the one that has its primary key."""
        key = table.primary_key.columns.keys()
        rest = {name: value for name, value in values.items() if name not in key}
        if self._database.dialect == "sqlite":
            db.execute(sqlite.insert(table).values(values).on_conflict_do_update(index_elements=key, set_=rest))
        else:
            db.execute(postgresql.insert(table).values(values).on_conflict_do_update(index_elements=key, set_=rest))

    def _check_known(self, db: Connection, table: Table, name: str) -> None:
        if db.execute(select(table.c.name).where(table.c.name == name)).first():
            return
        known = db.execute(select(table.c.name)).scalars().all()
        kind = table.name.removesuffix("s")
        hint = did_you_mean(name, known) if known else f"There is no {kind} yet."
        raise StorageError(f"there is no {kind} {name!r}", hint=hint)

    def _relative(self, folder: Path) -> str:
        whole = folder.resolve()
        return str(whole.relative_to(self._base) if whole.is_relative_to(self._base) else whole)


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d at %H:%M} UTC"

"""The folder of one audit, for whoever makes it: what was asked, what was found so far, and the report in the end.

OUT/
    audit.json              what is audited; a resumed audit must be of the same
    notes/                  results that were made once
    federations/NAME/       run folders of simulated federations
    emulator/               the emulator that was made for the audit, where none was given
    report.json             signed
    report.html             the same for a person
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from farfield.protocols.audit.finding import Finding, Untried
from farfield.protocols.audit.page import page
from farfield.protocols.audit.promise import promise
from farfield.protocols.audit.provenance import code_digest, release, versions
from farfield.protocols.audit.report import Report, RoundSummary, seal
from farfield.protocols.audit.spending import Spending
from farfield.protocols.durable import write
from farfield.protocols.errors import AuditError

from .notes import Notes
from .subject import Subject

DEFAULT_KEY: Final = Path("~/.farfield/audit-key.pem")

REPORT: Final = "report.json"
PAGE: Final = "report.html"


@dataclass(frozen=True, slots=True)
class Published:
    """An audit that is done: what it says, and the files that say so."""

    report: Report
    file: Path
    page: Path


class AuditFolder:
    """One audit's folder, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = Notes(path / "notes")

    @classmethod
    def begin(cls, path: Path, about: Mapping[str, Any], *, resume: bool) -> AuditFolder:
        """The folder at `path`: a new one, or the one of the audit that is to go on.

        Args:
            about: what is audited, JSON-ready.

        Raises:
            AuditError: it exists and is not to be resumed, or is of another audit, or cannot be written.
        """
        file = path / "audit.json"
        if resume and not file.exists():
            raise AuditError("no audit to go on with", where=path, hint="Leave --resume out, or give its --out.")
        if not resume and path.exists() and any(path.iterdir()):
            raise AuditError("exists already", where=path, hint="Go on with --resume, or give another --out.")
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write(file, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
        before = _read(file)
        for key, value in about.items():
            if before.get(key) != value:
                raise AuditError(
                    f"an audit of another {key}: {_shown(before.get(key))}, not {_shown(value)}",
                    where=path,
                    hint="Give what it began with, or another --out.",
                )
        return cls(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working on this audit. Raises AuditError where one does."""
        with _writing(self.path):
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AuditError("another process works on this audit", where=self.path) from None
            yield

    @property
    def federations(self) -> Path:
        return self.path / "federations"

    def publish(self, report: Report, key: Ed25519PrivateKey) -> Published:
        """Write the signed report and its page."""
        sealed = seal(report, key)
        file, shown = self.path / REPORT, self.path / PAGE
        with _writing(self.path):
            write(file, sealed)
            write(shown, page(report, key.public_key().public_bytes_raw()).encode())
        return Published(report, file, shown)


def reported(
    subject: Subject,
    findings: Sequence[Finding],
    untried: Sequence[Untried],
    *,
    scope: Literal["federation", "client"],
    backbone: str,
    emulator: str | None,
    data: str,
    rounds: tuple[RoundSummary, ...] = (),
    ledger: Spending | None = None,
) -> Report:
    """The report of an audit that was made by this program, now. The arguments are the report's attributes."""
    plan = subject.plan
    return Report(
        made=datetime.now(UTC).replace(microsecond=0),
        farfield=release(),
        code=code_digest(),
        versions=versions(),
        scope=scope,
        plan=plan.canonical().decode(),
        plan_digest=plan.digest,
        backbone=backbone,
        emulator=emulator,
        seed=subject.seed,
        clients=len(subject.clients),
        data=data,
        rounds=rounds,
        promise=promise(plan),
        ledger=ledger,
        findings=tuple(findings),
        untried=tuple(untried),
    )


def auditor(path: Path) -> Ed25519PrivateKey:
    """The key in the file `path` (PEM) that signs reports; a new one, mode 0600, where there is none.

    Raises:
        AuditError: it holds no such key, or cannot be read or written.
    """
    path = path.expanduser()
    if not path.exists():
        made = Ed25519PrivateKey.generate()
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        return made
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise AuditError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=path) from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditError("no Ed25519 key without a password, as PEM", where=path, hint="Give another --key.")
    return key


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise AuditError(f"cannot be read: {error}", where=file, hint="Give another --out.") from None
    return document if isinstance(document, dict) else {}


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AuditError(
            f"cannot be written: {(error.strerror or str(error)).lower()}",
            where=error.filename or path,
            hint="Make room or choose another place; what was found so far is kept.",
        ) from None

"""`coordinator audit verify` without its console: what can be held against a report here."""

from __future__ import annotations

from pathlib import Path

from farfield.emulator import backbone, methods
from farfield.protocols.audit.report import opened
from farfield.protocols.audit.verify import Check, checks
from farfield.protocols.errors import AuditError, FarfieldError
from farfield.protocols.plan import restore

from . import plans
from .accounts import LEDGER
from .auditing import AUDITED


def verified(
    report: Path, plan: Path | None, folder: Path | None, ledger: Path | None, signer: str | None
) -> list[Check]:
    """Check the report in the file `report`.

    Args:
        plan: the file of the Plan that it should be about.
        folder: the backbone; found by the Plan's name where it is not given.
        ledger: found in the audit's own folder where it is not given.
        signer: the public key that must have signed it, hexadecimal.

    Raises:
        AuditError: it is no report, or was altered; or `signer` is no key.
    """
    try:
        sealed = opened(report.read_bytes(), report)
    except OSError as error:
        raise AuditError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=report) from None
    beside = report.parent / "federations" / AUDITED / LEDGER
    kinds = methods.registered()
    found = checks(
        sealed,
        kinds,
        key=None if signer is None else _key(signer),
        backbone=_fingerprint(sealed.report.plan, folder, plan),
        ledger=ledger or (beside if beside.exists() else None),
    )
    if plan is not None:
        wanted = plans.load(plan).digest
        same = wanted == sealed.report.plan_digest
        found.append(Check("Plan given", same, f"{plan} has the digest {wanted}"))
    return found


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise AuditError("not a public key: 64 hexadecimal digits were expected", where="--signer")
    return key


def _fingerprint(canonical: str, folder: Path | None, plan: Path | None) -> str | None:
    """That of the backbone here; None where it is not here."""
    try:
        if folder is None:
            named = restore(canonical.encode(), methods.registered()).model.backbone
            folder = backbone.resolve(named, (plan or Path()).absolute().parent)
        return backbone.fingerprint(folder) if folder.is_dir() else None
    except FarfieldError:
        return None

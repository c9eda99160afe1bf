"""What can be checked of a report by somebody who did not make it, one line for each thing."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from farfield.protocols.errors import FarfieldError, PrivacyError
from farfield.protocols.plan import TuningKinds, restore
from farfield.protocols.privacy.ledger import Ledger

from .promise import Promise, promise
from .provenance import code_digest, release
from .report import Report, Sealed
from .spending import Spending
from .wording import epsilon


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one check.

    Attributes:
        ok: None where there was nothing to hold it against.
        said: a clause for a person.
    """

    name: str
    ok: bool | None
    said: str


def checks(
    sealed: Sealed,
    tuning_kinds: TuningKinds,
    *,
    key: bytes | None = None,
    backbone: str | None = None,
    ledger: Path | None = None,
) -> list[Check]:
    """Check a report that `opened` found whole, so that its signature and the Plan's digest hold.

    Args:
        tuning_kinds: as `farfield.emulator.methods.registered()` gives them, to read the Plan.
        key: the raw public key of whoever should have signed it.
        backbone: the digest of the backbone that should have been attacked.
        ledger: the ledger's file. It is read and never changed.
    """
    report = sealed.report
    return [
        Check("signature", True, f"it was signed with the key {sealed.key.hex()}, and not altered since"),
        _signer(sealed.key, key),
        Check("Plan", True, f"the Plan in it has the digest {report.plan_digest}"),
        _code(report),
        _accounting(report, tuning_kinds),
        _backbone(report, backbone),
        _ledger(report, ledger),
    ]


def _signer(by: bytes, wanted: bytes | None) -> Check:
    if wanted is None:
        return Check(
            "signer", None, "no key was given to compare it with; ask whose it is, by another way than this file"
        )
    if by != wanted:
        return Check("signer", False, f"the key should be {wanted.hex()}")
    return Check("signer", True, "it is the key that was given")


def _code(report: Report) -> Check:
    if report.code == code_digest():
        return Check("code", True, f"this installation has the same sources, version {report.farfield}")
    made = f"version {report.farfield} with the digest {report.code} made it"
    here = f"this is {release()} with {code_digest()}, which may come to other figures"
    return Check("code", None, f"{made}, and {here}")  # an old report is no worse for a new version


def _accounting(report: Report, kinds: TuningKinds) -> Check:
    try:
        found = promise(restore(report.plan.encode(), kinds, where="the Plan in the report"))
    except FarfieldError as error:
        return Check("accounting", False, f"cannot be computed again: {error}")
    claimed = report.promise
    if found is None or claimed is None:
        if found is claimed:
            return Check("accounting", True, "the Plan promises no differential privacy, and the report claims none")
        what = "the Plan promises differential privacy, and the report has no promise of it"
        return Check("accounting", False, what if found else "the report claims what the Plan does not promise")
    if wrong := _differences(claimed, found):
        return Check("accounting", False, "; ".join(wrong))
    by = "" if claimed.accountant == found.accountant else f", by {found.accountant} here"
    return Check("accounting", True, f"{epsilon(found.epsilon, found.delta)} for one {found.unit}, as claimed{by}")


def _differences(claimed: Promise, found: Promise) -> list[str]:
    wrong = []
    for name in Promise.model_fields:
        said, here = getattr(claimed, name), getattr(found, name)
        if name == "accountant" or said == here:
            continue
        if isinstance(said, float) and isinstance(here, float) and math.isclose(said, here, rel_tol=1e-6):
            continue  # another machine, or another version of the accountant, rounds otherwise
        wrong.append(f"{name.replace('_', ' ')}: the report claims {said!r}, and the Plan comes to {here!r}")
    return wrong


def _backbone(report: Report, wanted: str | None) -> Check:
    if wanted is None:
        return Check("backbone", None, f"{report.backbone}: nothing was given to compare it with")
    if wanted == report.backbone:
        return Check("backbone", True, f"it is {wanted}")
    return Check("backbone", False, f"{report.backbone} was attacked, and not {wanted}")


def _ledger(report: Report, file: Path | None) -> Check:
    said = report.ledger
    if said is None:
        if file is None:
            return Check("ledger", None, "the report names none")
        return Check("ledger", False, "the report names none, and one was given")
    if file is None:
        return Check("ledger", None, f"its head is {said.head}: no ledger was given to look for it in")
    try:
        return _in_chain(said, file)
    except OSError as error:
        return Check("ledger", False, f"{file} cannot be read: {error.strerror or error}")
    except PrivacyError as error:
        return Check("ledger", False, f"{file} is damaged: {error.what}")


def _in_chain(said: Spending, file: Path) -> Check:
    """Whether the head is in the ledger, and what had been spent by then. Raises OSError and PrivacyError."""
    raw = file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:  # opening a ledger mends it, and this one is not ours
        copy = Path(folder) / "ledger.jsonl"
        copy.write_bytes(raw)
        after = len(Ledger(copy).entries)
        lines = copy.read_bytes().splitlines(keepends=True)
        upto = next((n for n, line in enumerate(lines, 1) if json.loads(line)["digest"] == said.head), 0)
        if not upto:
            return Check("ledger", False, f"none of its {after} lines has the digest {said.head}")
        before = Path(folder) / "before.jsonl"
        before.write_bytes(b"".join(lines[:upto]))
        spent = Ledger(before).total(said.population, said.delta, said.unit).epsilon
    if upto != said.entries:
        return Check("ledger", False, f"the head is line {upto}, and the report says that there were {said.entries}")
    found = spent if math.isfinite(spent) else None
    if not _close(found, said.epsilon):
        told, here = epsilon(said.epsilon, said.delta), epsilon(found, said.delta)
        return Check("ledger", False, f"the report says {told} was spent by one {said.unit}, and it comes to {here}")
    more = f", and {after - upto} lines were written since" if after > upto else ""
    return Check("ledger", True, f"{epsilon(found, said.delta)} spent by one {said.unit} up to its head{more}")


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6)

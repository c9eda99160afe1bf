"""The report of an audit: what was attacked, with what, what came of it, and a signature over all of that.

A report is one line of canonical JSON, so it has one spelling, and any change to a byte of it is found. Whoever signs
it vouches for it: the key says who that is, if it is compared with what they show elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator

from farfield.protocols import identity
from farfield.protocols.complaints import complaint
from farfield.protocols.errors import AuditError, TrustError

from .finding import Document, Finding, Untried
from .promise import Promise
from .spending import Spending

FORMAT: Final = "farfield-audit/1"

MOST_BYTES: Final = 1 << 24
"""Of a sealed report. The raw numbers of a whole audit are a tenth of it."""

_DOMAIN: Final = "audit report"
_COMPLAINT_CHARS: Final = 300
_HINT: Final = "Take the file as `audit` wrote it."


def _whole_seconds(moment: datetime) -> datetime:
    if moment.utcoffset() != UTC.utcoffset(None) or moment.microsecond:
        raise ValueError("not a time in UTC, in whole seconds")
    return moment.astimezone(UTC)


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Moment = Annotated[AwareDatetime, AfterValidator(_whole_seconds)]
_Count = Annotated[int, Field(ge=0)]


class RoundSummary(Document):
    """One round of the audited run.

    Attributes:
        round: its number, from 1.
        clients: how many updates were counted.
        dropped: how many clients were asked and are not among these.
        problems: what went wrong, without the names of clients.
    """

    round: Annotated[int, Field(ge=1)]
    clients: _Count
    dropped: _Count = 0
    problems: tuple[str, ...] = ()


class Report(Document):
    """One audit.

    Of the data there is a name only, such as "the standard library's prose" or "a folder of 8 clients". A path would
    tell how somebody's machine is laid out. A digest would let whoever has a guess at the data, such as last year's
    version of it or a list of a few possible records, find out whether it is right.

    Attributes:
        made: when, in UTC and whole seconds.
        farfield, code, versions: the program's version, the digest of its sources (`code_digest`), and its libraries'.
        scope: what was attacked: a whole federation, or one client's update before it is sent.
        plan: the Plan's canonical text, and its SHA-256.
        backbone, emulator: digests of the bundles, or fingerprints of folders.
        seed: what every choice of the audit follows from. Noise does not.
        clients: how many the audited run had, those that attacks planted not counted.
        promise: None where the Plan has no differential privacy.
        ledger: None where there is none.
    """

    format: Literal["farfield-audit/1"] = FORMAT
    made: _Moment
    farfield: str
    code: _Digest
    versions: dict[str, str]
    scope: Literal["federation", "client"]
    plan: str
    plan_digest: _Digest
    backbone: Annotated[str, Field(min_length=1)]
    emulator: str | None = None
    seed: int
    clients: Annotated[int, Field(ge=1)]
    data: str
    rounds: tuple[RoundSummary, ...]
    promise: Promise | None
    ledger: Spending | None
    findings: tuple[Finding, ...]
    untried: tuple[Untried, ...] = ()

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Self:
        if hashlib.sha256(self.plan.encode()).hexdigest() != self.plan_digest:
            raise ValueError("the Plan in it is not the one whose digest it names")
        names = [one.attack for one in self.findings] + [one.attack for one in self.untried]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"it says twice what came of the attack {twice[0]!r}")
        return self

    def canonical(self) -> bytes:
        """Sorted, compact UTF-8 JSON with every default written out. Raises ValueError for what JSON cannot say."""
        return _canonical(self)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A report whose signature holds, and the raw Ed25519 public key (32 bytes) that it was signed with."""

    report: Report
    key: bytes


def seal(report: Report, key: Ed25519PrivateKey) -> bytes:
    """The file of a report.

    Raises:
        AuditError: it holds what JSON cannot, as raw numbers that are not finite, or is too large for anyone to open.
    """
    try:
        content = report.canonical()
    except ValueError as error:
        raise AuditError(f"cannot be written as JSON: {error}", where="the report") from None
    public, value = key.public_key().public_bytes_raw().hex(), identity.sign(key, _DOMAIN, content).hex()
    raw = _canonical(_File(report=report, signature=_Signature(algorithm="Ed25519", key=public, value=value)))
    _check_size(raw, "the report")
    return raw


def opened(raw: bytes, where: object) -> Sealed:
    """The report in `raw`, if it is whole, and signed with the key that it names.

    Args:
        where: what an error message calls it.

    Raises:
        AuditError: too large, not JSON, of another format, malformed, or altered after it was signed.
    """
    _check_size(raw, where)
    document = _document(raw, where)
    _check_format(document, where)
    try:
        file = _File.model_validate(document)
        whole = _canonical(file) == raw
    except ValidationError as error:
        raise _malformed(error, where) from None
    except (ValueError, RecursionError):
        raise AuditError("not a report: it holds what no report has", where=where, hint=_HINT) from None
    if not whole:
        raise AuditError("spelled differently than it was signed", where=where, hint=_HINT)
    key = bytes.fromhex(file.signature.key)
    try:
        public = Ed25519PublicKey.from_public_bytes(key)
        identity.verify(public, bytes.fromhex(file.signature.value), _DOMAIN, file.report.canonical())
    except (TrustError, ValueError):
        raise AuditError(
            "altered after it was signed, or never signed with the key that it names", where=where, hint=_HINT
        ) from None
    return Sealed(file.report, key)


class _Signature(Document):
    algorithm: Literal["Ed25519"]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    value: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class _File(Document):
    report: Report
    signature: _Signature


def _canonical(document: Document) -> bytes:
    value = document.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check_size(raw: bytes, where: object) -> None:
    if len(raw) > MOST_BYTES:
        raise AuditError(f"too large: {len(raw):,} bytes, and {MOST_BYTES:,} are allowed", where=where)


def _document(raw: bytes, where: object) -> object:
    """JSON, strictly: no key twice in an object, no NaN and no infinity."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for key, value in pairs:
            if key in known:
                raise AuditError(f"the key {_short(repr(key))} stands twice in one object", where=where, hint=_HINT)
            known[key] = value
        return known

    def no_number(text: str) -> float:
        raise AuditError(f"{text} is no number of JSON", where=where, hint=_HINT)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError):
        raise AuditError("not JSON", where=where, hint="A report is the file that `audit --json` wrote.") from None


def _check_format(document: object, where: object) -> None:
    report = document.get("report") if isinstance(document, dict) else None
    form = report.get("format") if isinstance(report, dict) else None
    if not isinstance(form, str) or not form.startswith("farfield-audit/"):
        raise AuditError("not the report of an audit", where=where, hint=f"One names its format, {FORMAT!r}.")
    if form != FORMAT:
        raise AuditError(
            f"in the format {_short(repr(form))}, and this version of Farfield reads {FORMAT!r}",
            where=where,
            hint="Verify it with the version that made it, or a newer one.",
        )


def _malformed(error: ValidationError, where: object) -> AuditError:
    """The first complaint, as one short line: what it quotes may come from anywhere."""
    what, hint = complaint(error, _known, whole="the report")
    return AuditError(f"not a report: {_short(what)}", where=where, hint=hint or _HINT)


def _known(path: list[str]) -> Iterable[str]:
    """The keys that the part of a report at `path` has; none where it is free."""
    at: object = _File
    for name in path:
        if name.isdigit() or not (isinstance(at, type) and issubclass(at, Document)):
            continue
        at = _part(at.model_fields[name].annotation) if name in at.model_fields else None
    return at.model_fields if isinstance(at, type) and issubclass(at, Document) else ()


def _part(annotation: object) -> object:
    """The Document in an annotation such as `tuple[Finding, ...]` or `Promise | None`."""
    for one in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(one, type) and issubclass(one, Document):
            return one
    return None


def _short(text: str) -> str:
    line = "".join(one if one.isprintable() else "?" for one in text)
    return line if len(line) <= _COMPLAINT_CHARS else f"{line[:_COMPLAINT_CHARS]}…"

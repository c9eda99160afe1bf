"""What the database holds, as values. Every `datetime` is aware; the database gives them back in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path


class RunState(Enum):
    """Where a run stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that was admitted.

    Attributes:
        name: chosen at enrolment, unique for ever (`farfield.protocols.identity.NAME`).
        fleet_key: public key for the SuperLink, an OpenSSH line.
        signing_key: raw Ed25519 public key, 32 bytes.
        sealing_key: raw X25519 public key, 32 bytes.
        certificate: serial number of its newest TLS certificate, in hexadecimal.
        fleet_id: the SuperLink's number for it, while that SuperLink lives.
        instance: random id of the process that attends now; None when none does.
        address: where it attends from, or last did.
        seen_at: when it last came or went.
    """

    name: str
    fleet_key: bytes
    signing_key: bytes
    sealing_key: bytes
    certificate: str
    enrolled_at: datetime
    revoked_at: datetime | None = None
    revoked_because: str | None = None
    fleet_id: int | None = None
    instance: str | None = None
    address: str | None = None
    seen_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a Plan.

    Attributes:
        plan: the Plan's canonical bytes.
        backbone: digest of the bundle that clients fetch.
        folder: the run folder; absolute.
        detail: why it failed, or what it waits for, for a person.
        flower_run: the SuperLink's number for it, while that SuperLink lives.
        crashes: ServerApps lost since the last finished round.
    """

    name: str
    plan: bytes
    plan_digest: str
    backbone: str
    folder: Path
    state: RunState
    detail: str
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    flower_run: int | None = None
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class BundleRow:
    """A bundle that clients may be told to fetch: its digest, what it is, its folder (absolute), its manifest."""

    digest: str
    kind: str
    folder: Path
    manifest: bytes

"""`coordinator audit` without its console: from a Plan's file to a signed report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from farfield.edge_client.audit import Attack, Owner, Subject, registered
from farfield.edge_client.audit.conduct import Progress as AttackProgress
from farfield.edge_client.audit.conduct import chosen, conduct
from farfield.edge_client.audit.folder import AuditFolder, auditor
from farfield.edge_client.audit.subject import Say
from farfield.emulator import backbone, build, layout
from farfield.emulator.bench import Bench
from farfield.emulator.bundle import OWNER_ONLY
from farfield.emulator.layout import is_emulator
from farfield.protocols.audit.report import Report, Rounds, Spending, code_digest, reported
from farfield.protocols.errors import PlanError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Ledger

from . import plans
from .accounts import LEDGER
from .audited import Simulated
from .owner import check_emulator
from .runs import RoundRecord, RunFolder
from .simulate import check_enough
from .simulation import Fleet, sources

AUDITED = "audited"
"""The federation that is the Plan as it is."""


class Progress(AttackProgress, build.Progress, Protocol):
    """What an audit reports to."""

    def on_folder(self, folder: Path) -> None: ...
    def on_preparing(self, done: int, clients: int) -> None: ...
    def on_client(self, number: int, activity: str, done: int, clients: int) -> None: ...
    def on_round(self, record: RoundRecord) -> None: ...

    @property
    def say(self) -> Say: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        attacks: by name; None is those that are made by default.
        out: the audit's folder.
        resume: whether to go on with the audit that is there.
        seed: what every choice follows from. None takes it from the Plan's digest, so that nobody can have tried
            several until one was kind.
        key: the file of the key that signs the report.
        emulator, public: as for a simulation.
    """

    plan: Path
    out: Path
    key: Path
    clients: int | None = None
    data: Path | None = None
    attacks: Sequence[str] | None = None
    resume: bool = False
    seed: int | None = None
    emulator: Path | None = None
    public: Path | None = None


@dataclass(frozen=True, slots=True)
class Audited:
    """An audit that is done: what was found, and the files that say so."""

    report: Report
    file: Path
    page: Path


def audit(request: Request, progress: Progress) -> Audited:
    """Make an audit, or go on with one, to its signed report.

    Raises:
        FarfieldError: anything the user has to put right; what was found so far stays in the audit's folder.
    """
    attacks = chosen(request.attacks)
    plan = plans.load(request.plan)
    clients = sources(request.clients, request.data)
    check_enough(plan, len(clients), request.plan)
    model = backbone.resolve(plan.model.backbone, request.plan.absolute().parent)
    backbone.check(model)
    _check_delivery(plan, request, model)
    fingerprint, key = backbone.fingerprint(model), auditor(request.key)
    seed = int(plan.digest[:12], 16) if request.seed is None else request.seed
    about: dict[str, Any] = {
        "Plan": plan.digest,
        "backbone": fingerprint,
        "number of clients": len(clients),
        "data": str(request.data.absolute()) if request.data else None,
        "seed": seed,
        "set of attacks": [attack.name for attack in attacks],
        "version of Farfield": code_digest(),
    }
    folder = AuditFolder.begin(request.out, about, resume=request.resume)
    with folder.held():
        progress.on_folder(folder.path)
        owner = _owner(plan, request, folder, model, progress)
        delivered = model if owner is None else owner.emulator
        bench = Bench(plan, delivered)
        initial = bench.adapter()
        fleet = Fleet(plan, bench, clients)
        fleet.check(progress)
        subject = Subject(
            plan=plan,
            folder=delivered,
            bench=bench,
            initial=initial,
            seed=seed,
            clients={name: partial(fleet.data, name) for name in fleet.names},
            prepare=fleet.planted,
            federation=Simulated(folder.federations, bench, initial, (model, fingerprint)),
            notes=folder.notes,
            say=progress.say,
            owner=owner,
        )
        findings, untried = conduct(subject, attacks, progress)
        report = reported(
            plan,
            backbone=fingerprint,
            emulator=None if owner is None else layout.read(owner.emulator).digest,
            seed=seed,
            data=_described(request, len(clients)),
            rounds=_rounds(folder, len(clients)),
            spending=_spending(plan, folder),
            findings=findings,
            untried=untried,
        )
        return Audited(report, *folder.publish(report, key))

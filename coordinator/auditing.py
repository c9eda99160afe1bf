"""`coordinator audit` without its console: from a Plan's file to a signed report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from farfield.edge_client.audit import Owner, Subject
from farfield.edge_client.audit.conduct import Progress as Attacks
from farfield.edge_client.audit.conduct import chosen, conduct
from farfield.edge_client.audit.folder import AuditFolder, Published, auditor, reported
from farfield.edge_client.audit.subject import Say
from farfield.emulator import backbone, build
from farfield.emulator.bench import Bench
from farfield.emulator.bundle import OWNER_ONLY
from farfield.emulator.layout import is_emulator
from farfield.protocols.audit.provenance import code_digest
from farfield.protocols.audit.report import RoundSummary
from farfield.protocols.audit.spending import Spending, spending
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

AUDITED: Final = "audited"
"""The federation that is the Plan as it is."""


class Progress(Attacks, Protocol):
    """What an audit reports to."""

    def on_folder(self, folder: Path) -> None: ...

    @property
    def say(self) -> Say: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        out: the audit's folder.
        key: the file of the key that signs the report.
        attacks: by name; None is those that are made by default.
        resume: whether to go on with the audit that is there.
        seed: what every choice follows from. None takes it from the Plan's digest, so that nobody can have tried
            several until one was kind.
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


def audit(request: Request, progress: Progress, building: build.Progress) -> Published:
    """Make an audit, or go on with one, to its signed report.

    Args:
        building: told how an emulator is made, where there is none yet.

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
        "data": str(request.data.absolute()) if request.data else "the standard library",
        "seed": seed,
        "choice of attacks": [attack.name for attack in attacks],
        "version of Farfield": code_digest(),
    }
    folder = AuditFolder.begin(request.out, about, resume=request.resume)
    with folder.held():
        progress.on_folder(folder.path)
        owner = _owner(plan, request, folder, model, building)
        delivered = model if owner is None else owner.emulator
        bench = Bench(plan, delivered)
        initial = bench.adapter()
        fleet = Fleet(plan, bench, clients)
        fleet.check(_Reading(progress.say))
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
            subject,
            findings,
            untried,
            scope="federation",
            backbone=fingerprint,
            emulator=None if owner is None else backbone.fingerprint(owner.emulator),
            data=f"a folder of {len(clients)} clients" if request.data else "prose of Python's standard library",
            rounds=_rounds(folder, fleet.names),
            ledger=_spending(plan, folder),
        )
        return folder.publish(report, key)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Shows how the clients' data is read."""

    say: Say

    def on_preparing(self, done: int, clients: int) -> None:
        self.say("reading the clients' data", done, clients)

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None: ...

    def on_round(self, record: RoundRecord) -> None: ...


def _check_delivery(plan: Plan, request: Request, model: Path) -> None:
    """Raises PlanError where the federation cannot be one, or an audit does not follow it."""
    if plan.delivery.kind == "adapter":
        if (model / OWNER_ONLY).exists():
            raise PlanError(
                f'delivery.kind = "adapter" gives clients the backbone, which is marked {OWNER_ONLY}',
                where=request.plan,
                hint='Use delivery.kind = "emulator".',
            )
        if request.emulator or request.public:
            raise PlanError('--emulator and --public are for a Plan with delivery.kind = "emulator"')
    elif plan.delivery.redistill_every or plan.emulator.turns > 1:
        raise PlanError(
            "an audit does not follow an emulator that changes in the middle of a run",
            where=request.plan,
            hint="Leave delivery.redistill_every and emulator.turns out, and audit that Plan.",
        )


def _owner(plan: Plan, request: Request, folder: AuditFolder, model: Path, building: build.Progress) -> Owner | None:
    """The backbone's owner where clients get an emulator of it, which is made now where it is not there yet."""
    if plan.delivery.kind == "adapter":
        return None
    emulator = request.emulator or folder.path / "emulator"
    if request.emulator is None and not is_emulator(emulator):
        build.build(plan, model, emulator, build.Request(data=request.public), building)
    check_emulator(plan, emulator, backbone.fingerprint(model))
    return Owner(model, emulator, request.public)


def _rounds(folder: AuditFolder, names: Sequence[str]) -> tuple[RoundSummary, ...]:
    """What the audited run's rounds came to, if any attack had it run."""
    path = folder.federations / AUDITED
    if not (path / "run.json").exists():
        return ()
    return tuple(
        RoundSummary(
            round=record.round,
            clients=record.clients,
            dropped=len(record.problems),
            problems=tuple(sorted({_unnamed(problem, names) for problem in record.problems.values()})),
        )
        for record in RunFolder.open(path).records()
        if record.round
    )


def _unnamed(problem: str, names: Sequence[str]) -> str:
    """What went wrong, without the names of clients."""
    return re.sub("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)), "a client", problem)


def _spending(plan: Plan, folder: AuditFolder) -> Spending | None:
    ledger = folder.federations / AUDITED / LEDGER
    return spending(Ledger(ledger), plan) if ledger.exists() else None

"""`coordinator simulate` without its console: from a Plan's file to a finished run folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from farfield.emulator import backbone, build, methods
from farfield.emulator.bundle import OWNER_ONLY
from farfield.emulator.layout import is_emulator
from farfield.emulator.methods import TuningMethod
from farfield.protocols.errors import PlanError, RunError
from farfield.protocols.plan import Plan

from . import engine, plans
from .baseline import centralised, compared
from .engine import Resources
from .owner import BackboneOwner, check_emulator, check_pluggable, keep_text
from .results import Result, conclude, save_adapter
from .runs import RoundRecord, RunFolder, RunInfo
from .simulation import Faults, Fleet, Observer, Simulation, sources


class Progress(Observer, build.Progress, Protocol):
    """What a simulation, the making of its emulator and its yardstick report to."""

    def on_folder(self, folder: Path) -> None: ...
    def on_start(self, folder: Path, info: RunInfo, done: list[RoundRecord], rounds: int) -> None: ...
    def on_baseline(self, done: int, steps: int, loss: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for besides the Plan.

    Attributes:
        resume: an existing run's folder, or its name below `runs`.
        emulator: a folder that `coordinator emulator build` wrote; None is one that is made for this run.
        public: text that is nobody's secret, to make the emulator with and to judge it; see `emulator.text.read`.
        flower: what each client has in Flower's simulation engine; None is the engine of this process.
        mixed: whether clients take the Plan's own way to tune and its alternatives in turn.
    """

    plan: Path
    clients: int | None = None
    data: Path | None = None
    runs: Path = Path("runs")
    resume: str | None = None
    faults: Faults | None = None
    compare: bool = False
    flower: Resources | None = None
    emulator: Path | None = None
    public: Path | None = None
    mixed: bool = False


def simulate(request: Request, progress: Progress) -> Result:
    """Run or resume a simulation to its end.

    Raises:
        FarfieldError: anything the user has to put right; what was finished stays in the run folder.
    """
    began = time.monotonic()
    if request.flower:
        engine.check()
    plan = plans.load(request.plan)
    folder, info = _opened(request, plan) if request.resume else (None, None)
    faults = Faults(info.dropout, info.stragglers) if info else request.faults or Faults()
    if request.flower and faults != Faults():
        raise RunError(
            "--dropout and --stragglers are for the engine of this process; Flower's has none of them",
            where=folder.path if folder else "",
            hint="Leave --engine flower out.",
        )
    assert isinstance(plan.tuning, TuningMethod)
    if request.flower and plan.tuning.sharing.local:
        raise RunError(
            "each client of this Plan keeps a part of its adapter at home, and Flower's engine gives it none",
            where=request.plan,
            hint="Leave --engine flower out.",
        )
    clients = sources(info.clients if info else request.clients, _data(request, info))
    check_enough(plan, len(clients), request.plan)
    model_folder = backbone.resolve(plan.model.backbone, request.plan.absolute().parent)
    backbone.check(model_folder)
    fingerprint = backbone.fingerprint(model_folder)
    if info and fingerprint != info.backbone_fingerprint:
        raise RunError("the backbone has changed since this run began", where=model_folder, hint="Start a new run.")
    _check_delivery(plan, request, model_folder)

    from farfield.emulator.bench import Bench

    name = info.run if info else f"{time.strftime('%Y%m%d-%H%M%S')}-{request.plan.stem}-{secrets.token_hex(2)}"
    data = str(request.data.absolute()) if request.data else None
    new = RunInfo(
        run=name,
        plan_digest=plan.digest,
        backbone=str(model_folder),
        backbone_fingerprint=fingerprint,
        clients=len(clients),
        data=data,
        dropout=faults.dropout,
        stragglers=faults.stragglers,
        mixed=request.mixed,
    )
    ways = alternatives(plan) if (info or new).mixed else []

    @lru_cache((1 + plan.emulator.turns) * (1 + len(ways)))  # emulators and backbone stay loaded
    def at(path: Path, local: Plan | None = None) -> Bench:
        return Bench(plan, path, local=local)

    def others(path: Path) -> list[Bench]:
        return [at(path, way) for way in ways]

    bench = None if plan.delivery.kind == "emulator" else at(model_folder)
    if bench is not None:
        fleet = Fleet(plan, bench, clients, request.runs / name / "local", others(model_folder))
        fleet.check(progress)
    if info is None:
        if plan.delivery.kind == "emulator":
            made = request.emulator or request.runs / name / "emulator"
            new = replace(new, emulator=str(made.absolute()))
        info, folder = new, RunFolder.create(request.runs / name, new, request.plan.read_text(encoding="utf-8"))
    assert folder is not None
    with folder.held():
        progress.on_folder(folder.path)
        if bench is None:
            made_now = _emulator(plan, request, folder, info, progress)
            bench = at(made_now)
            fleet = Fleet(plan, bench, clients, folder.local_folder, others(made_now))
            fleet.check(progress)
        initial = bench.adapter()
        done = folder.records()
        progress.on_start(folder.path, info, done, plan.training.rounds)
        owner = None
        if info.emulator:
            owner = BackboneOwner(plan, folder, info, lambda path: fleet.use(at(path), others(path)), progress, at)
        if request.flower:
            last = engine.go(plan, folder, fleet, request.flower, progress, initial, owner)
        else:
            last = Simulation(plan, folder, fleet, faults, progress, owner).go(initial)
        save_adapter(folder, at(model_folder), last)
        yardstick, offsite = None, None
        if request.compare and info.emulator:
            offsite = compared(plan, model_folder, clients, last, _Quietly(progress))
        elif request.compare:
            steps = sum(record.steps for record in folder.records())
            yardstick = centralised(plan, bench, fleet, initial, steps, _counted(progress, steps))
        return conclude(folder, last, len(clients), time.monotonic() - began, yardstick, offsite)


def check_enough(plan: Plan, clients: int, where: Path) -> None:
    """Raises PlanError where so few clients could do no round of the Plan, which is that of the file `where`."""
    if plan.cohort.minimum > clients:
        raise PlanError(
            f"cohort.minimum = {plan.cohort.minimum}, but there are {clients} clients: no round could ever count",
            where=where,
        )
    if plan.aggregation.groups is not None and plan.smallest_round > clients:
        raise PlanError(
            f"{plan.aggregation.groups} groups of at least {plan.smallest_cohort} clients take {plan.smallest_round}, "
            f"and there are {clients}",
            where=where,
            hint="Use more clients, or lower aggregation.groups.",
        )
    if plan.smallest_cohort > clients:
        raise PlanError(
            f'protection.kind = "secagg" takes {plan.smallest_cohort} clients, and there are {clients}: '
            "a sum of fewer hides nobody",
            where=where,
            hint='Use more clients, or protection.kind = "sealed".',
        )


@dataclass(frozen=True, slots=True)
class _Quietly:
    """Shows what is done for the yardstick, and not its rounds."""

    progress: Progress

    def on_preparing(self, done: int, clients: int) -> None: ...

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None:
        self.progress.on_client(number, f"{activity} on the backbone, for comparison", done, clients)

    def on_round(self, record: RoundRecord) -> None: ...


def _check_delivery(plan: Plan, request: Request, model_folder: Path) -> None:
    """Raises PlanError or RunError where what is to be delivered cannot be, before any work."""
    if plan.delivery.kind == "adapter":
        if (model_folder / OWNER_ONLY).exists():
            raise PlanError(
                f'delivery.kind = "adapter" gives clients the backbone, which is marked {OWNER_ONLY}',
                where=request.plan,
                hint='Use delivery.kind = "emulator".',
            )
        if request.emulator or request.public:
            raise RunError('--emulator and --public are for a Plan with delivery.kind = "emulator"')
        return
    check_pluggable(plan)
    if request.flower and (plan.delivery.redistill_every or plan.emulator.turns > 1):
        raise RunError(
            "Flower's engine cannot change the emulator in the middle of a run",
            hint="Leave --engine flower out, or delivery.redistill_every and emulator.turns.",
        )


def _emulator(plan: Plan, request: Request, folder: RunFolder, info: RunInfo, progress: Progress) -> Path:
    """The folder of the run's emulator, made now where it is this run's own and not there yet."""
    assert info.emulator is not None
    emulator = Path(info.emulator)
    if emulator == folder.emulator_folder.absolute() and not is_emulator(emulator):
        build.build(plan, Path(info.backbone), emulator, build.Request(data=request.public), progress)
    check_emulator(plan, emulator, info.backbone_fingerprint)
    if not folder.text.exists():
        keep_text(plan, info, folder, request.public)
    return emulator


def _opened(request: Request, plan: Plan) -> tuple[RunFolder, RunInfo]:
    """The run to resume, if it is one of this Plan and these clients."""
    assert request.resume is not None
    path = Path(request.resume)
    folder = RunFolder.open(path if path.is_dir() else request.runs / request.resume)
    info = folder.info
    if info.plan_digest != plan.digest:
        raise RunError(
            f"this run belongs to another Plan: {info.plan_digest[:12]}…, not {plan.digest[:12]}…",
            where=folder.path,
            hint=f"Its own Plan is {folder.path / 'plan.toml'}; a changed Plan is a new run.",
        )
    if request.clients not in (None, info.clients):
        raise RunError(f"this run has {info.clients} clients, not {request.clients}", where=folder.path)
    if request.data is not None and str(request.data.absolute()) != info.data:
        raise RunError(
            f"this run's data is {info.data or 'the standard library'}, not {request.data}",
            where=folder.path,
            hint="Leave --data out when you resume.",
        )
    if request.mixed and not info.mixed:
        raise RunError(
            "this run's clients all do what the Plan says", where=folder.path, hint="Leave --mixed out when you resume."
        )
    if request.faults not in (None, Faults(info.dropout, info.stragglers)):
        raise RunError(
            f"this run has --dropout {info.dropout} --stragglers {info.stragglers}",
            where=folder.path,
            hint="Leave the two options out when you resume.",
        )
    return folder, info


def alternatives(plan: Plan) -> list[Plan]:
    """What clients may work by instead of the Plan, in its order. Raises PlanError where there is nothing."""
    if not plan.tuning.alternatives:
        raise PlanError("--mixed has clients take the Plan's alternatives, and tuning.alternatives lists none")
    return [plan.alternative(number, methods.registered()) for number in range(len(plan.tuning.alternatives))]


def _data(request: Request, info: RunInfo | None) -> Path | None:
    if info is None:
        return request.data
    return Path(info.data) if info.data else None


def _counted(progress: Progress, steps: int) -> Callable[[float], None]:
    """An `on_step` that numbers its calls."""
    done = 0

    def on_step(loss: float) -> None:
        nonlocal done
        done += 1
        progress.on_baseline(done, steps, loss)

    return on_step

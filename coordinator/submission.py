"""`coordinator run`: from a Plan's file to a run that the service will do, and watching it.

The run is a row in the database and a folder below the home. The service takes it from there; whether somebody watches
makes no difference to it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from farfield.emulator import backbone, bundle
from farfield.protocols.errors import PlanError, RunError, StorageError

from . import plans
from .accounts import accounts
from .home import Home
from .owner import check_emulator, check_pluggable, keep_text
from .runs import RoundRecord, RunFolder, RunInfo
from .storage import BundleRow, Run, RunState, Store

FINAL = frozenset({RunState.FINISHED, RunState.FAILED, RunState.CANCELLED})


class Watcher(Protocol):
    """Is told how a run goes on."""

    def on_state(self, run: Run, serving: bool) -> None: ...
    def on_round(self, record: RoundRecord) -> None: ...


def submit(
    path: Path, home: Home, store: Store, now: datetime, emulator: Path | None = None, public: Path | None = None
) -> Run:
    """Check the Plan and its backbone, and put the run into the queue.

    Args:
        emulator: what clients get instead of the backbone, where the Plan says so.
        public: the owner's own text, by which adapter and emulator are judged; None is what the emulator was made with.

    Raises:
        PlanError, BackboneError: what has to be put right before anything could run.
        EmulatorError, DataError: the emulator is missing or was made for another Plan, or the text cannot be used.
        BundleError: the backbone is its owner's only.
        PrivacyError: it would pass the budget of its population.
    """
    plan = plans.load(path)
    if plan.protection.kind == "none":
        raise PlanError(
            "protection.kind = 'none' would let everyone on the way read the updates",
            where=path,
            hint='A service runs "secagg" and "sealed" Plans; "none" is for simulations.',
        )
    if (account := accounts(plan, "", home.path, home.budget)) is not None:
        account.begin(0)
    folder = backbone.resolve(plan.model.backbone, path.absolute().parent).resolve()
    backbone.check(folder)
    fingerprint = backbone.fingerprint(folder)
    if (emulator is None) != (plan.delivery.kind == "adapter"):
        raise PlanError(
            f"delivery.kind = {plan.delivery.kind!r}" + (" ships an emulator" if emulator is None else " ships none"),
            where=path,
            hint="Give the folder that `coordinator emulator build` wrote with --emulator."
            if emulator is None
            else "Leave --emulator out.",
        )
    if emulator is not None:
        emulator = emulator.resolve()
        check_pluggable(plan)
        check_emulator(plan, emulator, fingerprint)
    shipped = folder if emulator is None else emulator
    manifest = bundle.describe(shipped, "backbone" if emulator is None else "emulator")
    name = f"{now.astimezone():%Y%m%d-%H%M%S}-{path.stem}-{secrets.token_hex(2)}"
    info = RunInfo(name, plan.digest, str(folder), fingerprint, emulator=str(emulator) if emulator else None)
    made = RunFolder.create(home.runs / name, info, path.read_text(encoding="utf-8"))
    if emulator is not None:
        keep_text(plan, info, made, public)
    store.add_bundle(BundleRow(manifest.digest, manifest.kind, shipped, manifest.canonical()))
    run = Run(name, plan.canonical(), plan.digest, manifest.digest, made.path, RunState.QUEUED, "", now)
    store.add_run(run)
    return run


def watch(name: str, store: Store, watcher: Watcher, sleep: Callable[[float], None] = time.sleep) -> Run:
    """Tell `watcher` what happens until the run has ended, and return it as it then is.

    Raises:
        StorageError: the run is gone from the database.
        RunError: it failed or was cancelled; says why.
    """
    shown, told = -1, None
    while True:
        run = store.run(name)
        if run is None:
            raise StorageError(f"no run {name!r}")
        for record in store.rounds(name):
            if record.round > shown:
                shown = record.round
                watcher.on_round(record)
        serving = store.serving_since(datetime.now(UTC)) is not None
        if (run.state, run.detail, serving) != told:
            told = (run.state, run.detail, serving)
            watcher.on_state(run, serving)
        if run.state is RunState.FINISHED:
            return run
        if run.state in FINAL:
            why = f": {run.detail}" if run.detail else ""
            raise RunError(f"{run.state.value}{why}", where=f"run {name}", hint=f"Its log is {run.folder / 'run.log'}.")
        sleep(0.25)

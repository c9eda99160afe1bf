"""`edge-client audit` without its console: what would one's own update give away, before it is sent?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from farfield.emulator import backbone, methods
from farfield.emulator.bench import Bench
from farfield.emulator.layout import is_emulator
from farfield.protocols import plan as plans
from farfield.protocols.audit.provenance import code_digest
from farfield.protocols.seeds import derive

from . import data, sources
from .audit import Subject
from .audit.conduct import chosen, conduct
from .audit.console import AuditConsole
from .audit.folder import AuditFolder, Published, auditor, reported
from .data import ClientData
from .records import Record

CLIENT = "this client"
"""What the only client of such an audit is called."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        data: a file, a folder, or `builtin:stdlib/I/N`.
        out: the audit's folder.
        key: the file of the key that signs the report.
        attacks: by name; None is those that are made by default.
        resume: whether to go on with the audit that is there.
        backbone: the folder of the model, or of the emulator that this client was sent; None is where the Plan says.
    """

    plan: Path
    data: str
    out: Path
    key: Path
    attacks: Sequence[str] | None = None
    resume: bool = False
    backbone: Path | None = None


def audit(request: Request, progress: AuditConsole) -> Published:
    """Make an audit of this machine's own first update under a Plan, or go on with one.

    Nothing leaves this machine, and the report has no data in it.

    Raises:
        FarfieldError: anything the user has to put right; what was found so far stays in the audit's folder.
    """
    attacks = chosen(request.attacks)
    plan = plans.load(request.plan, methods.registered(), None)
    source = sources.data_source(_absolute(request.data))
    model = request.backbone or backbone.resolve(plan.model.backbone, request.plan.absolute().parent)
    if not is_emulator(model):
        backbone.check(model)
    fingerprint, key = backbone.fingerprint(model), auditor(request.key)
    about: dict[str, Any] = {
        "Plan": plan.digest,
        "backbone": fingerprint,
        "data": request.data,
        "choice of attacks": [attack.name for attack in attacks],
        "version of Farfield": code_digest(),
    }
    folder = AuditFolder.begin(request.out, about, resume=request.resume)
    with folder.held():
        progress.on_folder(folder.path)
        bench = Bench(plan, model)

        def prepare(_: str, planted: Sequence[Record] = ()) -> ClientData:
            seed = derive(plan.training.seed, "held-out", CLIENT)
            read = sources.records(source, plan.data, plan.model.task, plan.model.labels)
            return data.prepare(read, bench.tokenizer, plan.data, plan.model.task, seed, request.data, planted)

        prepare(CLIENT)  # so that what is wrong with the data is said before any work is done
        subject = Subject(
            plan=plan,
            folder=model,
            bench=bench,
            initial=bench.adapter(),
            seed=int(plan.digest[:12], 16),
            clients={CLIENT: partial(prepare, CLIENT)},
            prepare=prepare,
            federation=None,
            notes=folder.notes,
            say=progress.say,
        )
        findings, untried = conduct(subject, attacks, progress)
        emulated = is_emulator(model)
        report = reported(
            subject,
            findings,
            untried,
            scope="client",
            backbone="not known: this client has an emulator" if emulated else fingerprint,
            emulator=fingerprint if emulated else None,
            data="one client's own data",
        )
        return folder.publish(report, key)


def _absolute(text: str) -> str:
    """Data as settings name it, where a person may give a path from where they stand."""
    return text if text.startswith("builtin:") else str(Path(text).expanduser().absolute())

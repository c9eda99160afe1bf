"""Plans as the coordinator reads them: with every tuning method and aggregation rule that is installed."""

from __future__ import annotations

from pathlib import Path

from farfield.emulator import backbone, methods
from farfield.protocols import plan
from farfield.protocols.plan import Plan

from . import aggregation


def load(path: Path) -> Plan:
    """The Plan in the file `path`. Raises PlanError."""
    return plan.load(path, methods.registered(), aggregation.traits())


def parse(text: str, where: object = "Plan") -> Plan:
    """The Plan that `text` describes. Raises PlanError."""
    return plan.parse(text, methods.registered(), aggregation.traits(), where=where)


def fits(checked: Plan, path: Path) -> str:
    """What to say of the Plan's method, and its alternatives, in its backbone; `path` is that of the Plan.

    Raises:
        BackboneError, TuningError, EmulatorError: one of them does not fit.
    """
    folder = backbone.resolve(checked.model.backbone, path.absolute().parent)
    if not folder.exists():
        return f"not known: {folder} is not on this machine"
    from farfield.emulator.rehearsal import rehearse

    others = range(len(checked.tuning.alternatives))
    for one in (checked, *(checked.alternative(number, methods.registered()) for number in others)):
        rehearse(one, folder)
    return f"{checked.tuning.kind!r}{' and its alternatives fit' if others else ' fits'} the backbone"

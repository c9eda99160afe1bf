"""Plans as the coordinator reads them: with every tuning method and aggregation rule that is installed."""

from __future__ import annotations

from pathlib import Path

from farfield.emulator import methods
from farfield.protocols import plan
from farfield.protocols.plan import Plan

from . import aggregation


def load(path: Path) -> Plan:
    """The Plan in the file `path`. Raises PlanError."""
    return plan.load(path, methods.registered(), aggregation.traits())


def parse(text: str, where: object = "Plan") -> Plan:
    """The Plan that `text` describes. Raises PlanError."""
    return plan.parse(text, methods.registered(), aggregation.traits(), where=where)

"""What a ledger says after an audited run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from farfield.protocols.privacy.ledger import Ledger

from .finding import Document, Finite

if TYPE_CHECKING:
    from farfield.protocols.plan import Plan


class Spending(Document):
    """What was spent of the privacy of one unit of a population, by all runs in a ledger.

    Attributes:
        population: whose budget it is.
        unit: one of whom `epsilon` at `delta` is about; None where no finite ε is known.
        head: SHA-256 of the ledger's last line, which stands for all of them.
        entries: how many lines there are.
    """

    population: str
    unit: Literal["example", "client"]
    epsilon: Finite | None
    delta: Annotated[float, Field(gt=0, lt=1)]
    head: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    entries: Annotated[int, Field(ge=1)]


def spending(ledger: Ledger, plan: Plan) -> Spending | None:
    """What `ledger` says of the Plan's unit and population, at its δ; None where the Plan has no differential privacy,
    or nothing was ever spent.
    """
    privacy = plan.privacy
    if privacy.kind == "none" or not ledger.entries:
        return None
    spent = ledger.total(privacy.population, privacy.delta, privacy.kind)
    return Spending(
        population=privacy.population,
        unit=privacy.kind,
        epsilon=spent.epsilon if math.isfinite(spent.epsilon) else None,
        delta=privacy.delta,
        head=ledger.head,
        entries=len(ledger.entries),
    )

"""`edge-client ledger`: what runs have spent of the privacy of this machine's data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from .home import Home
from .spending import OWN


def show(home: Path, console: Console, *, as_json: bool) -> None:
    """Print the ledger in the edge client's home, checked line by line.

    Raises:
        PrivacyError: it is damaged.
    """
    from farfield.protocols.privacy.ledger import Ledger
    from farfield.protocols.privacy.mechanism import document

    opened = Home.open(home)
    consent = opened.settings.consent
    found = Ledger(opened.ledger) if opened.ledger.exists() else None
    entries = found.entries if found else ()
    totals = {unit: found.total(OWN, consent.delta, unit) for unit in found.units(OWN)} if found else {}
    if as_json:
        print(
            json.dumps(
                {
                    "ledger": str(opened.ledger),
                    "head": found.head if found else None,
                    "limit": consent.max_epsilon,
                    "spent": {unit: asdict(total) for unit, total in totals.items()},
                    "entries": [asdict(entry) | {"mechanism": document(entry.mechanism)} for entry in entries],
                },
                indent=2,
            )
        )
        return
    if not totals:
        console.print("Nothing was spent yet: this machine was in no run that promises privacy.")
        return
    limit = "no limit is set" if consent.max_epsilon is None else f"of the {consent.max_epsilon:g} that you allow"
    for unit, total in totals.items():
        whom = "one record" if unit == "example" else "all of the data"
        text = f"ε = {total.epsilon:.4g} at δ = {total.delta:g} is spent of the privacy of {whom}, {limit}."
        console.print(text, highlight=False, soft_wrap=True)
    for run in dict.fromkeys(entry.run for entry in entries):
        rounds = [entry.round for entry in entries if entry.run == run]
        console.print(f"  {run}: {len(rounds)} rounds, the last was {rounds[-1]}", highlight=False, markup=False)
    console.print(f"All {len(entries)} entries: {opened.ledger}", highlight=False, markup=False, soft_wrap=True)

"""`coordinator ledger`: what runs have spent of their populations' privacy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from .administration import DEFAULT_HOME, HomeOption, JsonOption, print_json, print_table, say

if TYPE_CHECKING:
    from farfield.protocols.privacy.accounting import Spent
    from farfield.protocols.privacy.ledger import Budget, Ledger

DELTA: Final = 1e-5
"""At which δ totals are shown where no budget says another."""

app = typer.Typer()


@app.command()
def ledger(
    run: Annotated[
        Path | None, typer.Option(help="The folder of a simulated run, which has a ledger of its own.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """What was spent of each population's privacy, checked line by line."""
    from farfield.protocols.privacy.ledger import Ledger

    from .accounts import LEDGER
    from .home import Home
    from .runs import RunFolder

    if run is not None:
        path, budget = RunFolder.open(run).path / LEDGER, None
    else:
        opened = Home.open(home)
        path, budget = opened.path / LEDGER, opened.budget
    found = Ledger(path) if path.exists() else None
    if as_json:
        print_json(_document(path, found, budget))
        return
    console = Console()
    if found is None:
        say(console, "Nothing was spent yet: no run has promised privacy.")
        return
    rows = []
    limit = "no limit" if budget is None else f"of {budget.epsilon:g}"
    for population, unit, total in _totals(found, budget):
        counted = [entry for entry in found.entries if (entry.population, entry.mechanism.unit) == (population, unit)]
        runs = len({entry.run for entry in counted})
        spent = f"{total.epsilon:.4g} {limit}"
        rows.append([population, unit, spent, f"{total.delta:g}", str(len(counted)), str(runs)])
    print_table(console, ("POPULATION", "FOR ONE", "ε SPENT", "δ", "ROUNDS", "RUNS"), rows)
    say(console, f"\n{len(found.entries)} entries, each bound to the one before; the last is {found.head[:16]}….")
    say(console, f"All of them: {path}")


def _totals(found: Ledger, budget: Budget | None) -> Iterator[tuple[str, str, Spent]]:
    for population in found.populations:
        for unit in found.units(population):
            yield population, unit, found.total(population, budget.delta if budget else DELTA, unit)


def _document(path: Path, found: Ledger | None, budget: Budget | None) -> dict[str, Any]:
    from farfield.protocols.privacy.mechanism import document

    return {
        "ledger": str(path),
        "head": found.head if found else None,
        "budget": None if budget is None else asdict(budget),
        "populations": [
            {"population": population, "unit": unit, **asdict(total)}
            for population, unit, total in (_totals(found, budget) if found else ())
        ],
        "entries": [
            asdict(entry) | {"mechanism": document(entry.mechanism)} for entry in (found.entries if found else ())
        ],
    }

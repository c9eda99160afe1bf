"""`coordinator ledger`: what runs have spent of their populations' privacy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from .administration import DEFAULT_HOME, HomeOption, JsonOption, print_json, print_table, say

if TYPE_CHECKING:
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
    if not path.exists():
        if as_json:
            print_json({"ledger": str(path), "head": None, "populations": [], "entries": []})
        else:
            say(Console(), "Nothing was spent yet: no run has promised privacy.")
        return
    found = Ledger(path)
    delta = budget.delta if budget else DELTA
    if as_json:
        print_json(_document(found, budget, delta))
        return
    console = Console()
    rows = []
    for population in found.populations:
        total = found.total(population, delta)
        rounds = sum(entry.population == population for entry in found.entries)
        runs = len({entry.run for entry in found.entries if entry.population == population})
        limit = "no limit" if budget is None else f"of {budget.epsilon:g}"
        rows.append([population, f"{total.epsilon:.4g} {limit}", f"{delta:g}", str(rounds), str(runs)])
    print_table(console, ("POPULATION", "ε SPENT", "δ", "ROUNDS", "RUNS"), rows)
    say(console, f"\n{len(found.entries)} entries, each bound to the one before; the last is {found.head[:16]}….")
    say(console, f"All of them: {path}")


def _document(found: Ledger, budget: Budget | None, delta: float) -> dict[str, Any]:
    from dataclasses import asdict

    from farfield.protocols.privacy.mechanism import document

    return {
        "ledger": str(found.path),
        "head": found.head,
        "budget": None if budget is None else asdict(budget),
        "populations": [{"population": name, **asdict(found.total(name, delta))} for name in found.populations],
        "entries": [
            {
                "time": entry.time,
                "population": entry.population,
                "run": entry.run,
                "round": entry.round,
                "plan": entry.plan,
                "mechanism": document(entry.mechanism),
                "note": entry.note,
            }
            for entry in found.entries
        ],
    }

"""The commands of a backbone's owner: `coordinator emulator build`, `inspect` and `leakage`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from farfield.emulator import backbone
from farfield.protocols.plan import Plan

from . import plans
from .runs import writing

if TYPE_CHECKING:
    from farfield.emulator.build import Report
    from farfield.emulator.distill import Check
    from farfield.emulator.search import Candidate

app = typer.Typer(help="Make and judge emulators: stand-ins for a backbone that may not leave.", no_args_is_help=True)

PlanArgument = Annotated[Path, typer.Argument(help="The Plan, a TOML file.")]


@app.command()
def build(
    plan: PlanArgument,
    out: Annotated[Path, typer.Argument(help="A new folder, or one where this command was stopped.")],
    budget_mb: Annotated[
        float | None,
        typer.Option(min=0.001, help="Search for the best stand-in of at most so many megabytes (10^6 bytes)."),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="How many blocks of the middle remain.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Public text, a file or a folder; the builtin backbone has Python's standard library."),
    ] = None,
) -> None:
    """Build the emulator that a Plan describes, from its backbone and public text."""
    from farfield.emulator.build import Request
    from farfield.emulator.build import build as make

    from .emulator_console import BuildConsole, print_report

    if budget_mb is not None and keep is not None:
        raise typer.BadParameter("give --budget-mb or --keep, not both")
    loaded = plans.load(plan)
    console = Console()
    request = Request(keep, None if budget_mb is None else int(budget_mb * 1e6), data)
    try:
        with BuildConsole(console) as progress:
            report = make(loaded, _backbone(loaded, plan), out, request, progress)
    except KeyboardInterrupt:
        print("Stopped. What was done is kept; the same command goes on with it.", file=sys.stderr)
        raise typer.Exit(130) from None
    print_report(console, report, out)


@app.command()
def inspect(
    emulator: Annotated[Path, typer.Argument(help="An emulator's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an emulator holds, its size, and what a client needs to train on it."""
    from .emulator_console import print_inspection

    from farfield.emulator.inspection import inspected

    found = inspected(emulator)
    if as_json:
        print(json.dumps(found.document(), indent=2))
    else:
        print_inspection(Console(), found)


def _backbone(plan: Plan, path: Path) -> Path:
    return backbone.resolve(plan.model.backbone, path.absolute().parent)

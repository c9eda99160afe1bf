"""The commands of a backbone's owner: `coordinator emulator build`, `inspect` and `leakage`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farfield.emulator import backbone
from farfield.protocols.plan import Plan

from . import plans

app = typer.Typer(help="Make and judge emulators: stand-ins for a backbone that may not leave.", no_args_is_help=True)

PlanArgument = Annotated[Path, typer.Argument(help="The Plan, a TOML file.")]
EmulatorArgument = Annotated[Path, typer.Argument(help="An emulator's folder.")]


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
    from farfield.emulator import build as building

    from .emulator_console import TRADEOFF, print_report, reporting
    from .plot import plot_tradeoff

    if budget_mb is not None and keep is not None:
        raise typer.BadParameter("give --budget-mb or --keep, not both")
    loaded = plans.load(plan)
    console = Console()
    request = building.Request(keep, None if budget_mb is None else int(budget_mb * 1e6), data)
    with _stopping("What was done is kept; the same command goes on with it."), reporting(console) as progress:
        report = building.build(loaded, _backbone(loaded, plan), out, request, progress)
    if report.candidates:
        with building.writing(out):
            plot_tradeoff(report.candidates, out / TRADEOFF)
    print_report(console, report, out)


@app.command()
def inspect(
    emulator: EmulatorArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an emulator holds, its size, and what a client needs to train on it."""
    from farfield.emulator.inspection import inspected

    from .emulator_console import print_inspection

    found = inspected(emulator)
    if as_json:
        print(json.dumps(found.document(), indent=2))
    else:
        print_inspection(Console(), found)


@app.command()
def leakage(
    emulator: EmulatorArgument,
    plan: PlanArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="Public text to train and judge with; else what the emulator was built with."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of tuning, and of the attack.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None,
) -> None:
    """Measure what the owner of a backbone gives away with an emulator of it."""
    from farfield.emulator import build as building
    from farfield.emulator import layout, text
    from farfield.emulator import leakage as measuring

    from .emulator_console import print_leakage, reporting

    loaded = plans.load(plan)
    if json_file is not None:  # before the work, not after hours of it
        partial = json_file.with_name(f"{json_file.name}.partial")
        with building.writing(json_file):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            partial.unlink()
    folder = _backbone(loaded, plan)
    console = Console()
    with _stopping("Nothing was written; the same command begins anew."), reporting(console) as progress:
        layout.read(emulator).check(loaded, emulator)
        kept = emulator / building.TEXT
        if data is None and kept.exists():
            public = text.PublicText.load(kept)
        else:
            progress.on_stage("reading public text")
            documents = text.read(data, loaded.model.backbone)
            public = building.prepared(loaded, documents, backbone.load_tokenizer(folder))
        found = measuring.measure(loaded, folder, emulator, public, steps, progress)
    print_leakage(console, found)
    if json_file is not None:
        with building.writing(json_file):
            partial.write_text(json.dumps(found.document(), indent=2) + "\n", encoding="utf-8")
            partial.replace(json_file)


@contextmanager
def _stopping(kept: str) -> Iterator[None]:
    """Say on Ctrl-C what has become of the work."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped. {kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def _backbone(plan: Plan, path: Path) -> Path:
    return backbone.resolve(plan.model.backbone, path.absolute().parent)

"""The `coordinator` command."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farfield.protocols.errors import FarfieldError, RunError

from . import administration, audit, emulators, ledger, operation, roster

app = typer.Typer(
    help="Farfield's coordinator: federated fine-tuning of models on data that may not move.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Work with Plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
app.add_typer(roster.app, name="roster")
app.add_typer(emulators.app, name="emulator")
app.add_typer(audit.app, name="audit")
app.add_typer(operation.app)
app.add_typer(administration.app)
app.add_typer(ledger.app)


class Engine(StrEnum):
    """What a simulation runs on."""

    IN_PROCESS = "in-process"
    FLOWER = "flower"


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="The Plan, a TOML file.")],
    clients: Annotated[int | None, typer.Option(min=1, help="How many clients to simulate.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="One file or folder per client; without it, the clients hold prose of Python's standard library."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run (its folder, or its name below --runs).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability that a client vanishes from a round.")
    ] = None,
    stragglers: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability that a client answers too late.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also train on the pooled data with as many steps; with an emulator, also run on the backbone itself.",
        ),
    ] = False,
    emulator: Annotated[
        Path | None,
        typer.Option(help="An emulator to ship, as `emulator build` wrote it; without it, one is built for the run."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="Public text to build an emulator with and to judge it by; a file or a folder."),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="Have clients take the Plan's own way to tune and its tuning.alternatives in turn, by their names.",
        ),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            help="One client after another in this process, or Flower's simulation engine: several at once, on this "
            "machine's cores and GPUs or on the Ray cluster that RAY_ADDRESS names. The result is the same."
        ),
    ] = Engine.IN_PROCESS,
    client_cpus: Annotated[
        float | None,
        typer.Option(min=0.1, help="With --engine flower: cores for each client at work.", show_default="1"),
    ] = None,
    client_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="With --engine flower: GPUs for each client at work.", show_default="0"),
    ] = None,
) -> None:
    """Run a federation on this machine, with the messages and the training of a real one."""
    from .simulation import Faults, bound_memory

    bound_memory()
    from .console import SimulationConsole, print_result
    from .engine import Resources
    from .runs import writing
    from .simulate import Request, simulate

    resources = None
    if engine is Engine.FLOWER:
        resources = Resources(1.0 if client_cpus is None else client_cpus, client_gpus or 0.0)
    elif client_cpus is not None or client_gpus is not None:
        raise RunError("--client-cpus and --client-gpus are for Flower's engine", hint="Add --engine flower.")
    faults = None if dropout is None and stragglers is None else Faults(dropout or 0.0, stragglers or 0.0)
    console = Console()
    request = Request(plan, clients, data, runs, resume, faults, compare, resources, emulator, public, mixed)
    progress = SimulationConsole(console)
    if json_file is not None:  # before the work, not after hours of it
        with writing(json_file):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.open("a").close()
    try:
        with progress:
            result = simulate(request, progress)
    except KeyboardInterrupt:
        again = " --engine flower" if resources else ""
        kept = (
            f"Finished rounds are kept; go on with: coordinator simulate {plan} --resume {progress.folder}{again}"
            if progress.folder
            else "Nothing had begun yet; give the same command again."
        )
        print(f"Stopped. {kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    print_result(console, result)
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(json.dumps(result.document(), indent=2) + "\n", encoding="utf-8")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder, or its name in the coordinator's home.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Fold the adapter into the backbone: a Hugging Face folder.")
    ] = False,
    client: Annotated[
        str | None, typer.Option(help="Whose adapter, where each simulated client has one of its own (local_b).")
    ] = None,
    home: administration.HomeOption = administration.DEFAULT_HOME,
) -> None:
    """Write a run's adapter in peft's format, or merged into its backbone."""
    from .export import export

    within = home.expanduser() / "runs" / run
    number = export(within if not run.exists() and within.is_dir() else run, out, merged=merged, client=client)
    what = "Model with the adapter of round" if merged else "Adapter of round"
    Console().print(f"{what} {number} written to {out}", highlight=False, soft_wrap=True)


@plan_app.command("check")
def plan_check(plan: Annotated[Path, typer.Argument(help="The Plan, a TOML file.")]) -> None:
    """Validate a Plan, print its digest and what it will do, and whether its method fits its backbone."""
    from . import plans
    from .console import print_plan

    loaded = plans.load(plan)
    print_plan(Console(), loaded, plans.fits(loaded, plan))


def main() -> None:
    """Entry point: an error that the user can put right is one line on stderr and status 2; Ctrl-C is status 130."""
    try:
        app(standalone_mode=True)
    except FarfieldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

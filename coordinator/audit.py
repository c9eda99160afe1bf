"""`coordinator audit`: attack one's own federation, and check what somebody else's audit says."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

DEFAULT_KEY = Path("~/.farfield/audit-key.pem")


class _Group(TyperGroup):
    """Takes a first word that names no command for an argument of `default`: `audit PLAN` is `audit run PLAN`."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Attack one's own federation, and publish what was found: `coordinator audit PLAN.toml --clients 8`.",
    no_args_is_help=True,
)

KeyOption = Annotated[
    Path, typer.Option(help="The key that signs the report, Ed25519 as PEM; made where there is none.")
]


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The Plan, a TOML file.")],
    clients: Annotated[int | None, typer.Option(min=1, help="How many clients to simulate.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="One file or folder per client; without it, the clients hold prose of Python's standard library."
        ),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="Which attacks to make, with commas between; `coordinator audit attacks` lists them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The audit's folder.", show_default="audits/ and the Plan's name")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the signed report to this file too.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the audit in the folder.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="What every choice of the audit follows from.",
            show_default="from the Plan's digest, so that nobody can have tried several until one was kind",
        ),
    ] = None,
    emulator: Annotated[
        Path | None,
        typer.Option(help="The emulator that clients get, as `emulator build` wrote it; without it, one is built."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="Public text to build an emulator with and to attack it with; a file or a folder."),
    ] = None,
    key: KeyOption = DEFAULT_KEY,
) -> None:
    """Make an audit of a Plan: simulate its federation on this machine, attack it, and write a signed report."""
    from .simulation import bound_memory

    bound_memory()
    from farfield.edge_client.audit.console import AuditConsole, print_audit

    from .auditing import Request, audit
    from .emulator_console import BuildLines
    from .runs import writing

    console = Console()
    folder = out or Path("audits") / plan.stem
    names = None if attacks is None else [name.strip() for name in attacks.split(",") if name.strip()]
    request = Request(plan, folder, key, clients, data, names, resume, seed, emulator, public)
    progress = AuditConsole(console)
    if json_file is not None:  # before the work, not after minutes of it
        with writing(json_file):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.open("a").close()
    try:
        with progress:
            made = audit(request, progress, BuildLines(console, progress.say, indent=4))
    except KeyboardInterrupt:
        again = shlex.join(["coordinator", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
        kept = f"What was found is kept; go on with: {again}" if progress.folder else "Nothing had begun yet."
        print(f"Stopped. {kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_file is not None:
        with writing(json_file):
            json_file.write_bytes(made.file.read_bytes())
    print_audit(console, made)


@app.command("attacks")
def list_attacks() -> None:
    """List the attacks, who could make them, and what they cost."""
    from farfield.edge_client.audit.console import print_attacks

    print_attacks(Console())


@app.command()
def verify(
    report: Annotated[Path, typer.Argument(help="A report, report.json.")],
    plan: Annotated[Path | None, typer.Option(help="The Plan that it should be about; compared by digest.")] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="The backbone's folder, if it is not where the Plan says.")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="The ledger that the audited run wrote; found beside the report, if it is there."),
    ] = None,
    signer: Annotated[
        str | None, typer.Option("--signer", help="The public key that must have signed it, hexadecimal.")
    ] = None,
) -> None:
    """Check a report's signature, its digests, its accounting and its ledger; status 1 if something does not hold."""
    from farfield.edge_client.audit.console import print_checks

    from .verifying import verified

    held = print_checks(Console(), verified(report, plan, backbone, ledger, signer))
    raise typer.Exit(0 if held else 1)


@app.command("key")
def show_key(key: KeyOption = DEFAULT_KEY) -> None:
    """Print the public key that signs reports here, hexadecimal; whoever has it can tell them from others."""
    from farfield.edge_client.audit.folder import auditor

    print(auditor(key).public_key().public_bytes_raw().hex())

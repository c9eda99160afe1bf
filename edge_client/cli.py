"""The `edge-client` command."""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from farfield.protocols.errors import DeviceError, EnrolmentError, FarfieldError, HomeError
from farfield.protocols.terminal import size

from .home import Home, enrolled, forget
from .lock import held
from .readable import days_left
from .resident_state import State
from .settings import SETTINGS

app = typer.Typer(
    help="Farfield's edge client: trains models on data that stays on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_HOME: Final = Path("~/.farfield/edge-client")

REVOKED: Final = 77
"""What `start` ends with when the coordinator has revoked the node: there is no use in starting it again."""

HomeOption = Annotated[
    Path, typer.Option("--home", envvar="FARFIELD_EDGE_HOME", help="Where keys, settings and the cache are kept.")
]


@app.command()
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The coordinator's enrolment service.")],
    token: Annotated[
        str,
        typer.Option(
            envvar="FARFIELD_TOKEN",
            help="The invitation; '-' reads it from the standard input, which keeps it out of the shell's history.",
        ),
    ],
    data: Annotated[str, typer.Option(help="The data: a file, a folder, or builtin:stdlib/I/N for a demonstration.")],
    name: Annotated[str | None, typer.Option(help="What this node is called; the machine's name if absent.")] = None,
    home: HomeOption = DEFAULT_HOME,
    no_start: Annotated[bool, typer.Option("--no-start", help="Only enrol.")] = False,
) -> None:
    """Enrol this machine with a coordinator, once, and stay to take part in its runs."""
    from . import enrol

    home, name = _place(home), name or default_name()
    text = sys.stdin.readline() if token == "-" else token  # noqa: S105 - a sign, not a secret
    console = _console()
    console.print(f"Enrolling at {address} as {name} …")
    try:
        joined = enrol.join(address, text, data, home, name, datetime.now(UTC))
    except KeyboardInterrupt:
        print(
            f"Stopped; nothing is kept here. If the token is refused as used when you try again, have {name} revoked "
            "and ask for a new one.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    console.print(f"Enrolled. Settings and consent: {home / SETTINGS}")
    if no_start:
        console.print(f"Take part with: {_command('start', home)}")
    else:
        _stay(joined, console)


@app.command()
def start(home: HomeOption = DEFAULT_HOME) -> None:
    """Take part in the runs of the coordinator that this machine has enrolled with."""
    _stay(Home.open(_place(home)), _console())


@app.command()
def status(
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say who this node is, and what it does."""
    opened = Home.open(_place(home))
    settings, state, holder = opened.settings, opened.state(), opened.holder()
    keys = opened.keys()
    until = keys.node_certificate().not_valid_after_utc
    signing = keys.signing_key().public_key().public_bytes_raw()
    used = opened.cached_bytes()
    if as_json:
        document = {
            "home": str(opened.path),
            "node": settings.node.name,
            "coordinator": settings.coordinator.model_dump(),
            "signing_key": signing.hex(),
            "data": settings.data.path,
            "running": holder is not None,
            "pid": holder or None,
            "state": state.document() if state else None,
            "certificate_until": until.isoformat(),
            "cache_bytes": used,
            "cache_max_bytes": settings.cache.max_bytes,
        }
        print(json.dumps(document, indent=2))
        return
    server, now = settings.coordinator, datetime.now(UTC)
    lines = {
        "node": settings.node.name,
        "coordinator": f"{server.host}, fleet port {server.fleet_port}, federation port {server.federation_port}",
        "process": _process(state, holder, now, opened.path),
        "last problem": (state.last_error if state else None) or "none",
        "certificate": f"valid until {until:%Y-%m-%d} ({days_left(until, now)})",
        "signing key": signing.hex(),
        "data": settings.data.path,
        "cache": f"{size(used)} of {size(settings.cache.max_bytes)}",
        "home": str(opened.path),
    }
    console = _console()
    for label, value in lines.items():
        console.print(f"{label:<13} {value}")


@app.command()
def ledger(
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what runs have spent of the privacy of this machine's data."""
    from . import ledger as ledgers

    ledgers.show(_place(home), _console(), as_json=as_json)


@app.command()
def leave(
    home: HomeOption = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Forget the federation here even if the coordinator cannot be told.")
    ] = False,
) -> None:
    """Withdraw this node from its federation, and remove its keys and its cache."""
    path, console = _place(home), _console()
    if not enrolled(path):
        raise HomeError("no edge client has enrolled here", where=path, hint="There is nothing to leave.")
    if not yes:
        _confirm(f"Remove keys and cache of {path}? The node cannot come back under its name.")
    with held(path):
        told = _withdraw(path, force)
        forget(path)
    console.print(
        "Left." if told else "Forgotten here. If the coordinator still counts the node, have it revoked there."
    )
    console.print(f"Your settings, with the consent, stay in {path / SETTINGS}")


@app.command()
def doctor(
    home: HomeOption = DEFAULT_HOME,
    plan: Annotated[
        Path | None, typer.Option(help="Say instead how this machine would work by the Plan in this file.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="How much memory it may take for that, such as 4GB; what is free and allowed, if absent."),
    ] = None,
) -> None:
    """Check all that taking part depends on, and say what to do about what is wrong; status 1 if something is."""
    if plan is not None:
        from .outlook import show

        show(plan, memory, _place(home), _console())
        return
    if memory is not None:
        raise DeviceError("--memory goes with --plan", hint="Give the Plan that is to fit into it.")
    from .doctor import examine

    raise typer.Exit(1 if examine(_place(home), _console()) else 0)


@app.command()
def audit(
    plan: Annotated[Path, typer.Option(help="The Plan that this machine is asked to work by, a TOML file.")],
    data: Annotated[str, typer.Option(help="The data: a file, a folder, or builtin:stdlib/I/N for a demonstration.")],
    out: Annotated[
        Path | None, typer.Option(help="The audit's folder.", show_default="audits/ and the Plan's name")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="Which attacks to make, with commas between.")] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(help="The model's folder, or that of the emulator, if it is not where the Plan says."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the audit in the folder.")] = False,
    key: Annotated[
        Path, typer.Option(help="The key that signs the report, Ed25519 as PEM; made where there is none.")
    ] = Path("~/.farfield/audit-key.pem"),
) -> None:
    """Attack what this machine would send in its first round under a Plan, before it sends it. Nothing leaves it."""
    from .audit.console import AuditConsole, print_audit
    from .auditing import Request, audit

    folder = out or Path("audits") / f"{plan.stem}-own"
    names = None if attacks is None else [name.strip() for name in attacks.split(",") if name.strip()]
    console = _console()
    progress = AuditConsole(console)
    try:
        with progress:
            made = audit(Request(plan, data, folder, key, names, resume, backbone), progress)
    except KeyboardInterrupt:
        again = f"edge-client audit --plan {plan} --data {data} --out {folder} --resume"
        print(f"Stopped. What was found is kept; go on with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    print_audit(console, made)


def default_name() -> str:
    """The machine's name, as far as a node may be called so, and four characters by chance that make it unique."""
    host = re.sub(r"[^A-Za-z0-9._+-]+", "-", socket.gethostname().partition(".")[0]).strip("._+-")[:59]
    return f"{host or 'node'}-{secrets.token_hex(2)}"


def _place(home: Path) -> Path:
    return home.expanduser().absolute()


def _stay(home: Home, console: Console) -> None:
    from .resident import stay  # brings Flower and more with it, which no other command needs

    try:
        stay(home, console)
    except KeyboardInterrupt:
        print(f"Stopped. Go on with: {_command('start', home.path)}", file=sys.stderr)
        raise typer.Exit(130) from None
    except EnrolmentError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(REVOKED) from None


def _withdraw(path: Path, force: bool) -> bool:
    """Whether the coordinator took this node's leave; with `force` it need not have."""
    from . import enrol

    try:
        enrol.withdraw(Home.open(path))
    except FarfieldError as error:
        if not force:
            hint = "Nothing was removed. --force forgets the federation here without telling the coordinator."
            raise type(error)(error.what, where=error.where, hint=f"{error.hint} {hint}".strip()) from None
        print(f"The coordinator was not told: {error}", file=sys.stderr)
        return False
    return True


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise HomeError("this wants to be confirmed", hint="Give --yes.")
    try:
        if not typer.confirm(question):
            raise typer.Exit(1)
    except typer.Abort:
        raise typer.Exit(130) from None


def _process(state: State | None, holder: int | None, now: datetime, path: Path) -> str:
    if holder is None:
        seen = f"; it last wrote at {state.updated:%Y-%m-%d %H:%M} UTC" if state else ""
        return f"none runs{seen}. Start it with: {_command('start', path)}"
    who = f"running ({holder})" if holder else "running"
    if state is None or (holder and state.pid != holder):
        return f"{who}, starting"
    link = "connected" if state.connected else "not connected"
    work = f", {state.activity}" if state.activity else ""
    where = f" (run {state.run}, round {state.round})" if state.run else ""
    age = (now - state.updated).total_seconds()
    return f"{who}, {link} since {state.since:%Y-%m-%d %H:%M} UTC{work}{where}; as of {age:.0f} s ago"


def _command(name: str, path: Path) -> str:
    default = DEFAULT_HOME.expanduser()
    return f"edge-client {name}" if path == default else f"edge-client {name} --home {path}"


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: an error that the user can put right is one line on stderr and status 2; Ctrl-C is status 130."""
    try:
        app(standalone_mode=True)
    except FarfieldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The `edge-client` command."""

from __future__ import annotations

import importlib
import json
import platform
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from farfield.protocols.errors import DataError, EnrolmentError, FarfieldError, HomeError, ServiceError, did_you_mean

from .consent import PROGRAM_BYTES, Consent
from .home import Home, enrolled, forget
from .keys import KEYS
from .lock import held
from .resident_state import State
from .settings import SETTINGS, toml
from .sources import records

app = typer.Typer(
    help="Farfield's edge client: trains models on data that stays on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_HOME: Final = Path("~/.farfield/edge-client")

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
    used = _cache_bytes(opened)
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
        "certificate": f"valid until {until:%Y-%m-%d} ({_days(until, now)})",
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
def doctor(home: HomeOption = DEFAULT_HOME) -> None:
    """Check all that taking part depends on, and say what to do about what is wrong; status 1 if something is."""
    path, console, problems = _place(home), _console(), 0
    checks: list[tuple[str, Callable[[], str]]] = [("software", _check_software), ("memory", _check_memory)]
    try:
        opened = Home.open(path)
    except FarfieldError as error:
        checks.append(("home", _raising(error)))
    else:
        server = opened.settings.coordinator
        ports = {
            "enrolment": server.enrolment_port,
            "fleet": server.fleet_port,
            "federation": server.federation_port,
        }
        checks += [
            ("home", lambda: f"{path}, closed to others"),
            ("keys", lambda: _check_keys(opened)),
            *((f"{service} port", lambda port=port: _check_port(opened, port)) for service, port in ports.items()),
            ("federation", lambda: _check_federation(opened)),
            ("data", lambda: _check_data(opened)),
            ("disk", lambda: _check_disk(opened)),
            ("consent", lambda: _check_consent(opened.settings.consent)),
        ]
    for number, (name, check) in enumerate(checks, 1):
        try:
            console.print(f"{number:>2}. {name:<15} ok       {check()}")
        except FarfieldError as error:
            problems += 1
            console.print(f"{number:>2}. {name:<15} PROBLEM  {error}")
    console.print("Everything is in order." if not problems else f"Problems: {problems}.")
    raise typer.Exit(1 if problems else 0)


def default_name() -> str:
    """The machine's name, as far as a node may be called so, and four characters by chance that make it unique."""
    host = re.sub(r"[^A-Za-z0-9._+-]+", "-", socket.gethostname().partition(".")[0]).strip("._+-")[:59]
    return f"{host or 'node'}-{secrets.token_hex(2)}"


def size(count: float) -> str:
    """A number of bytes as a person reads it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _place(home: Path) -> Path:
    return home.expanduser().absolute()


def _stay(home: Home, console: Console) -> None:
    from .resident import stay  # brings Flower and more with it, which no other command needs

    try:
        stay(home, console)
    except KeyboardInterrupt:
        print(f"Stopped. Go on with: {_command('start', home.path)}", file=sys.stderr)
        raise typer.Exit(130) from None


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


def _days(until: datetime, now: datetime) -> str:
    days = (until - now).days
    return f"{days} days left" if days >= 0 else "EXPIRED"


def _cache_bytes(home: Home) -> int:
    used = 0
    for file in home.cache.rglob("*"):
        try:
            used += file.stat().st_size if file.is_file() else 0
        except OSError:  # the resident process has just removed it
            continue
    return used


def _raising(error: FarfieldError) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


def _check_software() -> str:
    hint = "Install it as the README says, torch first."
    packages = ("torch", "transformers", "peft", "flwr", "grpcio")
    try:
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError, PackageNotFoundError) as error:
        raise ServiceError(f"a library cannot be used: {error}", hint=hint) from None
    gpu = f"GPU {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no GPU, so the CPU trains"
    return f"Python {platform.python_version()}, {versions}; {gpu}"


def _check_memory() -> str:
    available = available_memory()
    if available is None:
        return "how much is free cannot be seen here"
    if available < 2 * PROGRAM_BYTES:
        raise ServiceError(
            f"{size(available)} are free, and the program alone takes {size(PROGRAM_BYTES)}",
            hint="Stop something else, or give this container more.",
        )
    return f"{size(available)} free"


def available_memory() -> int | None:
    """Bytes that a process here may still take: what the machine has free, or what its container (cgroup 2) leaves."""
    try:
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, another version of cgroups, or "max"
        return free
    return max(0, min(free, limit - used))


def _check_keys(home: Home) -> str:
    from . import enrol

    keys, now = home.keys(), datetime.now(UTC)
    certificate = keys.node_certificate()
    keys.fleet_key()
    keys.identity()
    name, authority = home.settings.node.name, keys.authority_certificate()
    try:
        enrol.check_certificate(
            certificate, keys.tls_key().public_key(), name, authority, now, f"{home.path / KEYS}/tls.pem"
        )
    except FarfieldError as error:
        hint = "See to the clock, or to node.name in the settings; if both are right, leave and join again."
        raise EnrolmentError(error.what, where=error.where, hint=hint) from None
    until = certificate.not_valid_after_utc
    return f"{name}, certificate valid until {until:%Y-%m-%d} ({_days(until, now)}) by this clock"


def _check_port(home: Home, port: int) -> str:
    from . import enrol

    server = enrol.Address(home.settings.coordinator.host, port)
    enrol.authenticate(server, home.keys().authority_certificate(), _PATIENCE)
    return f"{server} answers, and is the coordinator that this machine has enrolled with"


_PATIENCE: Final = 5.0
"""Seconds that a check waits for a server."""


def _check_federation(home: Home) -> str:
    import grpc

    from . import enrol

    health: Any = importlib.import_module("grpc_health.v1.health_pb2")  # comes without types
    stubs: Any = importlib.import_module("grpc_health.v1.health_pb2_grpc")

    server = enrol.Address(home.settings.coordinator.host, home.settings.coordinator.federation_port)
    with enrol.channel(server, home.keys()) as channel:
        try:
            reply = stubs.HealthStub(channel).Check(health.HealthCheckRequest(), timeout=_PATIENCE)
        except grpc.RpcError as error:
            code, details = enrol.status(error)
            hint = "If the ports above are in order, the coordinator has revoked this node: ask whoever runs it."
            raise ServiceError(f"does not serve this node ({code.name}: {details})", where=server, hint=hint) from None
    if reply.status != health.HealthCheckResponse.SERVING:
        raise ServiceError("is not ready", where=server, hint="Try again in a minute, or ask whoever runs it.")
    return f"{server} takes this node's certificate and is healthy"


_COUNTED: Final = 1000
"""How many records `doctor` reads."""


def _check_data(home: Home) -> str:
    from farfield.protocols.plan import Data

    from . import enrol

    enrol.check_data(home.settings.data.path)
    source = home.settings.data.source
    try:
        count = sum(1 for _ in islice(records(source, Data(), "causal-lm", None), _COUNTED))
    except DataError as error:
        if "in the Plan" not in error.hint:
            raise
        return f"{source} can be read, but a Plan must name its columns: {error.what}"
    return f"{source} can be read: {f'the first {count}' if count == _COUNTED else f'all {count}'} records"


def _check_disk(home: Home) -> str:
    free, most = shutil.disk_usage(home.path).free, home.settings.cache.max_bytes
    room = f"{size(free)} free; the cache holds {size(_cache_bytes(home))} of {size(most)}"
    if free < _LEAST_DISK:
        raise HomeError(room, where=home.path, hint="Make room, or lower cache.max_bytes.")
    return room


_LEAST_DISK: Final = 1_000_000_000


def _check_consent(consent: Consent) -> str:
    from farfield.emulator.methods import registered

    for method in consent.methods:
        if method not in registered():
            raise HomeError(
                f"consent.methods: there is no tuning method {method!r}", hint=did_you_mean(method, registered())
            )
    limits = {name: value for name, value in consent if value not in (None, (), "")}
    if consent.max_epsilon is None:
        del limits["delta"]
    return ", ".join(f"{name} = {toml(value)}" for name, value in limits.items())


def main() -> None:
    """Entry point: an error that the user can put right is one line on stderr and status 2; Ctrl-C is status 130."""
    try:
        app(standalone_mode=True)
    except FarfieldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""`edge-client doctor`: all that taking part depends on, checked one after another."""

from __future__ import annotations

import importlib
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from farfield.protocols.errors import DataError, EnrolmentError, FarfieldError, HomeError, ServiceError, did_you_mean
from farfield.protocols.terminal import size

from .consent import PROGRAM_BYTES, Consent
from .device import available_memory
from .home import Home
from .keys import KEYS
from .readable import days_left
from .settings import toml
from .sources import records

_PATIENCE: Final = 5.0
"""Seconds that a check waits for a server."""

_COUNTED: Final = 1000
"""How many records are read."""

_LEAST_DISK: Final = 1_000_000_000


def examine(path: Path, console: Console) -> int:
    """Check the home at `path` and what it needs, print a line for each check, and return how many found a problem."""
    problems = 0
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
    return problems


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
    return f"{name}, certificate valid until {until:%Y-%m-%d} ({days_left(until, now)}) by this clock"


def _check_port(home: Home, port: int) -> str:
    from . import enrol

    server = enrol.Address(home.settings.coordinator.host, port)
    enrol.authenticate(server, home.keys().authority_certificate(), _PATIENCE)
    return f"{server} answers, and is the coordinator that this machine has enrolled with"


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


def _check_data(home: Home) -> str:
    from farfield.protocols.sections import Data

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
    room = f"{size(free)} free; the cache holds {size(home.cached_bytes())} of {size(most)}"
    if free < _LEAST_DISK:
        raise HomeError(room, where=home.path, hint="Make room, or lower cache.max_bytes.")
    return room


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

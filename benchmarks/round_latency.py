"""Seconds for a round with our resident edge client, beside a stock Flower SuperNode that does the same empty work.

    python benchmarks/round_latency.py [--megabytes 1 --megabytes 40] [--rounds 15] [--json FILE]

One SuperLink, one ServerApp, and two clients of each kind, all processes of their own on loopback in a temporary
folder; TLS and node authentication are on. The ServerApp drives training rounds through our `GridCarrier`, in turn with
the resident and with the stock clients. Both kinds call the same `ClientApp`, which verifies the signed task, answers
with the adapter that it was sent as its update, and seals and signs that: nothing is loaded and nothing is trained, so
that what differs is the client's runtime alone. A round counts from the question who is there to the aggregate, which
must equal the adapter. The first round of each kind at each size is not counted.

A stock client polls every 3 s. A pause of 0 to 3 s, drawn anew before each round, lets its polls fall anywhere, as work
of any length would; it does not count. A client's processes are counted as they make their first answer ready.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from farfield.edge_client.flower import make_app
from farfield.edge_client.home import Home as ClientHome
from farfield.protocols.envelope import Charter, Member, close_reply, open_task
from farfield.protocols.errors import FarfieldError, ServiceError
from farfield.protocols.identity import Token, signer_key
from farfield.protocols.messages import Reply, Train, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import parse

if TYPE_CHECKING:
    from farfield.coordinator.flower import Present
    from farfield.coordinator.home import Home
    from farfield.coordinator.storage import Store
    from farfield.coordinator.superlink import SuperLink

# What clients and the ServerApp need is imported above, and no more: a stock client imports this file for each task.

KINDS = {"resident": ("resident-1", "resident-2"), "stock": ("stock-1", "stock-2")}
SEED, TENSORS, WANTED, PAUSE_SECONDS, ROUND_SECONDS = 3, 48, 8.0, 3.0, 120.0
RUN = "round-latency"
PLAN = f"""
[model]
backbone = "none"
[tuning]
kind = "lora"
[training]
rounds = 1
steps = 1
[cohort]
minimum = 2
round_seconds = {ROUND_SECONDS}
"""


# Both kinds of client


class Echo:
    """A participant whose update is the adapter that it was sent. Notes in its home that a process has made it."""

    def __init__(self, home: ClientHome) -> None:
        keys = home.keys()
        self._node, self._identity = home.settings.node.name, keys.identity()
        self._authority = keys.authority_certificate()
        with (home.path / "processes").open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")

    def answer(self, parcel: Parcel) -> Parcel:
        opened = open_task(parcel, self._node, self._trusted, self._identity.sealing, time.time())
        assert isinstance(opened.task.work, Train)
        outcome = Trained(opened.task.work.adapter, examples=1, targets=1, steps=1, loss=1.0)
        return close_reply(Reply.to(opened.task, outcome), opened, self._identity.signing)

    def _trusted(self, signer: bytes) -> Ed25519PublicKey:
        return signer_key(x509.load_der_x509_certificate(signer), self._authority, datetime.now(UTC))


@cache
def _echo(home: str) -> Echo:
    return Echo(ClientHome.open(Path(home)))


client = make_app(lambda context: _echo(str(context.node_config["home"])))


def _stay(path: Path) -> None:
    """A resident client, as `edge-client start` runs it, with another participant."""
    from rich.console import Console

    from farfield.edge_client.resident import Resident

    home = ClientHome.open(path)
    resident = Resident(home, Console(stderr=True))
    resident.participant = Echo(home)  # type: ignore[assignment]
    with home.held():
        resident.stay()


# The ServerApp


@dataclass(frozen=True, slots=True)
class Timed:
    """One round."""

    megabytes: float
    number: int
    kind: str
    seconds: float


server = ServerApp()


@server.main()
def conduct(grid: Grid, context: Context) -> None:
    from farfield.coordinator.aggregation.mean import WeightedMean
    from farfield.coordinator.conductor import Traffic
    from farfield.coordinator.flower import GridCarrier
    from farfield.coordinator.home import Home
    from farfield.coordinator.rounds import TrainingRound
    from farfield.emulator import methods

    config = {key: str(value) for key, value in context.run_config.items()}
    home, draw = Home.open(Path(config["home"])), random.Random(SEED)
    plan = parse(PLAN, methods.registered(), None)
    rule, charter = WeightedMean(plan.aggregation), Charter(RUN, plan.canonical(), "", 0, "")
    carrier = GridCarrier(grid, _Roll(home.store()), plan, charter, home.authority().signer())
    everyone = sum(map(len, KINDS.values()))
    carrier.gather(everyone)
    number = 0
    with Path(config["results"]).open("a", encoding="ascii", buffering=1) as results:
        for megabytes in map(float, config["megabytes"].split()):
            for counted in range(-1, int(config["rounds"])):
                for kind, cohort in KINDS.items():
                    number += 1
                    adapter = _adapter(megabytes, number)
                    time.sleep(draw.uniform(0.0, PAUSE_SECONDS))
                    began, traffic = time.monotonic(), Traffic()
                    assert set(cohort) <= set(carrier.gather(everyone))
                    round_ = TrainingRound(plan, RUN, number, adapter, cohort, rule, carrier.now())
                    carrier.carry(round_, "training", traffic)
                    aggregate = round_.result()
                    seconds = time.monotonic() - began
                    assert aggregate is not None, traffic.problems
                    assert set(aggregate.clients) == set(cohort)
                    assert all(np.array_equal(aggregate.update[name], adapter[name]) for name in adapter)
                    if counted >= 0:
                        print(json.dumps(asdict(Timed(megabytes, number, kind, seconds))), file=results)


class _Roll:
    """All nodes of the database. (A stock client cannot attend.)"""

    def __init__(self, store: Store) -> None:
        self._store = store

    def present(self) -> Mapping[str, Present]:
        from farfield.coordinator.flower import Present

        return {
            node.name: Present(node.fleet_id, Member.of(node.signing_key, node.sealing_key), "")
            for node in self._store.nodes()
            if node.fleet_id is not None
        }

    def revoked(self, node: str) -> bool:
        return False

    def say(self, detail: str) -> None:
        pass

    def tell(self, node: str, text: str) -> None:
        pass


def _adapter(megabytes: float, number: int) -> dict[str, np.typing.NDArray[np.float32]]:
    """Other values in each round: Flower stores what it has seen once."""
    values, draw = int(megabytes * 1e6 / 4 / TENSORS), np.random.default_rng(number)
    return {f"layer.{index:02d}.weight": draw.random(values, np.float32) for index in range(TENSORS)}


# The rest of the federation

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    megabytes: Annotated[list[float] | None, typer.Option(min=0.01, help="Size of an update. [default: 1]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, of each kind at each size.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    sizes = megabytes or [1.0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    before = os.getloadavg()[0]
    with TemporaryDirectory(prefix="farfield-rounds-") as name:
        folder = Path(name)
        with ExitStack() as stack:
            timed = _measure(folder, stack, sizes, rounds)
        processes = {
            kind: sum(len((folder / one / "processes").read_text().split()) for one in names)
            for kind, names in KINDS.items()
        }
    tasks = len(sizes) * (rounds + 1) * 2
    machine = (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"flwr {version('flwr')}; load {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"
    )
    print(f"{machine}; two clients, {rounds} rounds of each kind, in turn\n")
    print("| update | client | seconds a round, median | least to most | stock / resident |\n|---|---|---|---|---|")
    ratios = {}
    for size in sizes:
        found = {kind: [one.seconds for one in timed if (one.megabytes, one.kind) == (size, kind)] for kind in KINDS}
        ratios[size] = median(found["stock"]) / median(found["resident"])
        for kind, seconds in found.items():
            ratio = f"{ratios[size]:.1f}" if kind == "stock" else ""
            print(
                f"| {size:g} MB | {kind} | {median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {ratio} |"
            )
    for kind, count in processes.items():
        print(f"\n{kind}: {count} processes for {tasks} tasks, {count / tasks:.2f} a task", end="")
    print()
    if 1.0 in ratios:
        verdict = "PASS" if ratios[1.0] >= WANTED else "SHORT"
        print(f"\n{verdict}: at 1 MB {ratios[1.0]:.1f} times less time a round; {WANTED:g} times or more is wanted")
    if json_file is not None:
        document = {
            "machine": machine,
            "ratios": {f"{size:g}": ratio for size, ratio in ratios.items()},
            "tasks": tasks,
            "processes": processes,
            "rounds": [asdict(one) for one in timed],
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _measure(folder: Path, stack: ExitStack, sizes: list[float], rounds: int) -> list[Timed]:
    """All rounds that count. What is started ends with `stack`."""
    from farfield.coordinator.home import Home
    from farfield.coordinator.superlink import SuperLink, SuperLinkSettings, bundle

    enrolment, federation, fleet, control, *runtimes = (f"127.0.0.1:{port}" for port in _free_ports(6))
    home = Home.create(
        folder / "coordinator",
        ["localhost"],
        datetime.now(UTC),
        enrolment=enrolment,
        federation=federation,
        fleet=fleet,
        control=control,
    )
    store, keys = home.store(), home.path / "keys"
    stack.callback(store.close)
    stack.enter_context(_services(home, store))
    settings = SuperLinkSettings(
        fleet=fleet,
        control=control,
        authority=keys / "ca.pem",
        certificate=keys / "server.pem",
        key=keys / "server.key",
        home=home.superlink,
        log=home.logs / "superlink.log",
    )
    link = stack.enter_context(SuperLink(settings))
    started = {}
    for name in KINDS["resident"]:
        path = _enrol(folder, home, store, link, name)
        started[name] = stack.enter_context(
            _process(folder, name, [sys.executable, __file__, "--resident", str(path)], {})
        )
    for name, runtime in zip(KINDS["stock"], runtimes, strict=True):
        path = _enrol(folder, home, store, link, name)
        started[name] = stack.enter_context(_stock(folder, path, name, fleet, runtime))
    results = folder / "results.jsonl"
    results.touch()
    config = {
        "home": str(home.path),
        "results": str(results),
        "megabytes": " ".join(map(str, sizes)),
        "rounds": str(rounds),
    }
    code = {"round_latency.py": Path(__file__).read_bytes()}
    run = link.start_app(bundle(RUN, "round_latency:server", "round_latency:client", config, code), config)
    limit = time.monotonic() + 120 + len(sizes) * (rounds + 1) * 2 * 40
    shown = 0
    while (ended := link.ended(run)) is None and time.monotonic() < limit:
        gone = [name for name, process in started.items() if process.poll() is not None]
        if gone:
            raise _failed(folder, f"{gone[0]} ended")
        lines = results.read_text(encoding="ascii").splitlines()
        print(*lines[shown:], sep="\n", end="\n" if lines[shown:] else "", file=sys.stderr)
        shown = len(lines)
        time.sleep(1.0)
    timed = [Timed(**json.loads(line)) for line in results.read_text(encoding="ascii").splitlines()]
    if len(timed) != len(sizes) * rounds * len(KINDS):
        raise _failed(folder, f"the ServerApp stopped after {len(timed)} rounds: {ended or 'no more time'}")
    return timed


def _enrol(folder: Path, home: Home, store: Store, link: SuperLink, name: str) -> Path:
    """A new node, known to the SuperLink; its home."""
    from farfield.edge_client.enrol import join

    token, now = Token(secrets.token_bytes(16), home.authority().fingerprint), datetime.now(UTC)
    store.invite([hashlib.sha256(token.secret).digest()], now, timedelta(minutes=10))
    # The data is never opened.
    joined = join(
        f"localhost:{home.settings.service.enrolment.port}",
        token.text(),
        "builtin:stdlib/1/2",
        folder / name,
        name,
        now,
    )
    node = store.node(name)
    assert node is not None
    store.set_fleet_ids({name: link.register(node.fleet_key)})
    return joined.path


@contextmanager
def _services(home: Home, store: Store) -> Iterator[None]:
    """Enrolment and the federation service, in a thread of this process."""
    from farfield.coordinator import listening

    service, authority = home.settings.service, home.authority()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    starting = listening.start(
        authority.server_credentials(),
        store,
        authority,
        enrolment_address=str(service.enrolment),
        federation_address=str(service.federation),
        advertised=(service.fleet.port, service.federation.port),
        now=lambda: datetime.now(UTC),
    )
    services = asyncio.run_coroutine_threadsafe(starting, loop).result(timeout=30)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(services.stop(grace=1.0), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _stock(folder: Path, home: Path, name: str, fleet: str, runtime: str) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperNode as Flower ships it, with this node's key, which it reads in OpenSSH's format."""
    key = home / "keys" / "fleet.openssh"
    key.touch(mode=0o600)
    fleet_key = ClientHome.open(home).keys().fleet_key()
    key.write_bytes(fleet_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    command = [
        *(str(Path(sys.executable).parent / "flower-supernode"), "--superlink", fleet),
        *("--root-certificates", str(home / "keys" / "ca.pem"), "--auth-supernode-private-key", str(key)),
        *("--host", runtime.partition(":")[0], "--port", runtime.partition(":")[2]),
        *("--node-config", f'home="{home}"'),
    ]
    flower = folder / f"{name}-flower"
    flower.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    env = {"FLWR_HOME": str(flower), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path}
    with _process(folder, name, command, env) as process:
        yield process


@contextmanager
def _process(folder: Path, name: str, command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):  # what a SuperNode started ends by itself, but later
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failed(folder: Path, what: str) -> ServiceError:
    """The error, after the ends of all logs."""
    for log in (folder / "coordinator" / "logs" / "superlink.log", *folder.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"--- {log.name}", *lines[-30:], sep="\n", file=sys.stderr)
    return ServiceError(what)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resident"]:
        _stay(Path(sys.argv[2]))
    else:
        try:
            app()
        except FarfieldError as error:
            sys.exit(f"error: {error}")

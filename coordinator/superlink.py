"""The SuperLink: Flower's relay between nodes and rounds, as a child process, and the calls made to its Control API.

    with SuperLink(settings) as link:
        link.register(key)          a node's public key; the id by which Flower knows the node
        link.start_run(home, run)   a ServerApp in a process of its own

It keeps its state in memory: the coordinator's database is the only truth, and after a crash of the SuperLink the nodes
are registered and the runs begun anew. Its Control and Runtime APIs know no users, so whoever may open a socket on this
machine could start code as the coordinator; here they answer processes of the coordinator's own user only. Telemetry
and the check for updates are off.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from farfield.protocols.errors import ServiceError

from .neighbours import SameUser

_APP: Final = """\
[project]
name = "{name}"
version = "{version}"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.39,<1.40"]

[tool.flwr.app]
publisher = "farfield"
fab-format-version = 1
flwr-version-target = "1.39.0"

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
{config}
"""


@dataclass(frozen=True, slots=True)
class SuperLinkSettings:
    """What the SuperLink is started with.

    Attributes:
        fleet: address that nodes connect to; `control`: loopback address of its Control and Runtime APIs.
        authority, certificate, key: PEM files; the certificate must also be valid for 127.0.0.1.
        home: Flower's folder.
    """

    fleet: str
    control: str
    authority: Path
    certificate: Path
    key: Path
    home: Path
    log: Path


class SuperLink:
    """A running SuperLink. Ends with this object, and with this process however that ends."""

    def __init__(self, settings: SuperLinkSettings) -> None:
        """Start it, and wait until it answers.

        Raises:
            ServiceError: one of its ports is taken; or it ended at once, or did not answer, and its log says why.
        """
        self._settings = settings
        self._log = settings.log.open("ab")
        self._process = subprocess.Popen(  # noqa: S603 - this program, with paths of its own settings
            [
                *(sys.executable, "-m", "farfield.coordinator.superlink"),
                *("--ssl-ca-certfile", str(settings.authority)),
                *("--ssl-certfile", str(settings.certificate), "--ssl-keyfile", str(settings.key)),
                *("--fleet-api-address", settings.fleet),
                *("--host", settings.control.rpartition(":")[0], "--port", settings.control.rpartition(":")[2]),
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
            ],
            env=os.environ | self._environment(),
            cwd=settings.home,
            stdin=subprocess.PIPE,  # whose end tells the child that this process is gone
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the service, which then stops this in order
        )
        try:
            self._wait_until_it_answers(seconds=60)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Stop it, with all that it started: politely, then not."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._log.close()

    def register(self, key: bytes) -> int:
        """Make a node's public key (OpenSSH) known; the id that Flower gives the node.

        Raises:
            ServiceError: the SuperLink is gone, or the key is registered already.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        pem = load_ssh_public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with self._control() as control:
            return int(control.RegisterNode(RegisterNodeRequest(public_key=pem)).node_id)

    def unregister(self, fleet_id: int) -> None:
        """Forget a node: from now on its key is worth nothing. Raises ServiceError."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._control() as control:
            control.UnregisterNode(UnregisterNodeRequest(node_id=fleet_id))

    def start_run(self, home: Path, run: str) -> int:
        """Start a ServerApp that conducts `run`; the id by which Flower knows it. Raises ServiceError."""
        config = {"home": str(home), "run": run}
        return self.start_app(
            bundle("farfield", "farfield.coordinator.flower:app", "farfield.edge_client.flower:app", config), config
        )

    def start_app(self, app: bytes, config: Mapping[str, str]) -> int:
        """Start the ServerApp of a `bundle`; the id by which Flower knows the run. Raises ServiceError."""
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest

        request = StartRunRequest(override_config=user_config_to_proto(dict(config)))
        request.fab.content = app
        with self._control() as control:
            return int(control.StartRun(request).run_id)

    def stop_run(self, flower_run: int) -> None:
        """End a run's ServerApp. Raises ServiceError, also when it has ended already."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._control() as control:
            control.StopRun(StopRunRequest(run_id=flower_run))

    def ended(self, flower_run: int) -> str | None:
        """Why the run's ServerApp is no more, or None while it lives. Raises ServiceError."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._control() as control:
            runs = control.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict
        status = runs[flower_run].status
        return f"{status.sub_status}: {status.details}".strip(": ") if status.status == "finished" else None

    def _environment(self) -> dict[str, str]:
        return {
            "FLWR_HOME": str(self._settings.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOG_LEVEL": "WARNING",  # a line for every call would be 160 MB a day
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            # The SuperLink starts its helpers by name, and they belong to this environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }

    def _wait_until_it_answers(self, seconds: float) -> None:
        trusted = ssl.create_default_context(cafile=str(self._settings.authority))
        limit = time.monotonic() + seconds
        with httpx.Client(verify=trusted, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < limit and self.alive:
                try:
                    client.get(f"https://{self._settings.control}/health").raise_for_status()
                    return
                except httpx.HTTPError:
                    time.sleep(0.05)
        if self.alive:
            raise ServiceError("the SuperLink did not answer", where=self._settings.log, hint="Its log says why.")
        for address in (self._settings.fleet, self._settings.control):
            if not _may_listen(address):
                hint = "Is another coordinator running? Else choose another address in coordinator.toml."
                raise ServiceError("the SuperLink cannot listen there", where=address, hint=hint)
        reason = f"the SuperLink ended with status {self._process.returncode}"
        raise ServiceError(reason, where=self._settings.log, hint="Its log says why.")

    @contextmanager
    def _control(self) -> Iterator[Any]:
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        client = ControlHttpClient.from_server_address(
            self._settings.control,
            insecure=False,
            root_certificates=self._settings.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="coordinator")],
        )
        try:
            yield client
        except httpx.HTTPStatusError as error:
            raise ServiceError(f"the SuperLink refused: {error.response.text}") from None
        except httpx.HTTPError as error:
            raise ServiceError(f"the SuperLink does not answer ({type(error).__name__})") from None
        finally:
            client.close()


def bundle(
    name: str, server: str, client: str, config: Iterable[str], modules: Mapping[str, bytes] | None = None
) -> bytes:
    """A Flower app.

    Args:
        server, client: its objects, as MODULE:NAME.
        config: keys of what it is started with.
        modules: the code that it brings, by file name; without, it names modules of this installation.
    """
    from importlib.metadata import distribution

    from flwr.cli.build import build_fab_from_files

    keys = "\n".join(f'{key} = ""' for key in config)
    text = _APP.format(name=name, version=distribution("farfield").version, server=server, client=client, config=keys)
    files: dict[str, bytes | Path] = {"pyproject.toml": text.encode(), "LICENSE": b"Apache-2.0\n", **(modules or {})}
    return build_fab_from_files(files)[0]


def _may_listen(address: str) -> bool:
    """Whether HOST:PORT is of this machine, and nobody listens there."""
    host, _, port = address.rpartition(":")
    try:
        family, *_, name = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            probe.bind(name)
    except OSError:
        return False
    return True


def _end_with_parent() -> None:
    """The parent holds the other end of stdin; when it is gone, by whatever cause, this process has to go."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock the interpreter would want when it ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> None:
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    _end_with_parent()
    extensions.get_middleware = lambda: (Middleware(SameUser),)
    flower_superlink()


if __name__ == "__main__":
    _main()

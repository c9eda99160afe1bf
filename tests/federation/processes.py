"""A whole federation in real processes on loopback: the commands that people type, in a folder of the test's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from farfield.coordinator.home import Home
from farfield.coordinator.storage import Run, RunState, Store

BIN = Path(sys.executable).parent
PATIENCE = 300.0
"""Seconds that anything may take on a slow machine with other things to do; no test waits for it to pass."""


class Process:
    """A command that runs, with its output in a file."""

    def __init__(self, arguments: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=log.parent
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def says(self, text: str, times: int = 1) -> Process:
        """Wait until the output holds `text`."""

        def said() -> bool:
            assert self.status is None or self.output.count(text) >= times, self.output
            return self.output.count(text) >= times

        eventually(said, lambda: f"{text!r} in:\n{self.output}")
        return self

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self, seconds: float = 30.0) -> int:
        """SIGTERM, and the exit status; it has `seconds` for it."""
        if self.status is None:
            self.send(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = PATIENCE) -> int:
        return self._process.wait(seconds)


class Federation:
    """One coordinator and its edge clients. Ends with `closed`, which also sees that nothing is left running."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self._stack = path, stack
        self.home = path / "coordinator"
        self.ports = dict(zip(("enrolment", "federation", "fleet", "control"), free_ports(4), strict=True))
        self.service: Process | None = None
        options = [f"--{name}-port={port}" for name, port in self.ports.items()]
        self.command("coordinator", "init", self.home, "--hostname", "localhost", *options)

    def command(self, name: str, *arguments: object, status: int = 0, **env: str) -> str:
        """Run a command to its end, which must be `status`; its output, and its errors after it."""
        done = subprocess.run(
            [str(BIN / name), *map(str, arguments)],
            capture_output=True, text=True, timeout=PATIENCE, env=environment(**env), cwd=self.path,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *arguments: object, log: str, **env: str) -> Process:
        process = Process([str(BIN / name), *map(str, arguments)], self.path / f"{log}.log", environment(**env))
        self._stack.callback(_ended, process)
        return process

    def serve(self, **env: str) -> Process:
        before = self.service.output.count("Serving as") if self.service else 0
        self.service = self.start("coordinator", "serve", "--home", self.home, log="serve", **env)
        return self.service.says("Serving as", before + 1)

    def invite(self, count: int = 1, *options: str) -> list[str]:
        out = self.command("coordinator", "invite", "--home", self.home, "--count", count, *options)
        return [line for line in out.splitlines() if line.startswith("farfield1.")]

    def join(self, name: str, data: object, *, connected: bool = True, **env: str) -> Process:
        """A new client that stays."""
        (token,) = self.invite()
        client = self.start(
            "edge-client", "join", f"localhost:{self.ports['enrolment']}", "--data", data, "--name", name,
            "--home", self.path / name, log=name, FARFIELD_TOKEN=token, **env,
        )  # fmt: skip
        return client.says("Connected to") if connected else client

    def enrol(self, name: str, data: object) -> Path:
        """A new client that does not start yet; its home."""
        (token,) = self.invite()
        address = f"localhost:{self.ports['enrolment']}"
        home = self.path / name
        self.command(
            "edge-client", "join", address, "--data", data, "--name", name, "--home", home, "--no-start",
            FARFIELD_TOKEN=token,
        )  # fmt: skip
        return home

    def rejoin(self, name: str, *, connected: bool = True, **env: str) -> Process:
        """Start a client that has joined before."""
        log = self.path / f"{name}.log"
        before = log.read_text().count("Connected to") if log.exists() else 0
        client = self.start("edge-client", "start", "--home", self.path / name, log=name, **env)
        return client.says("Connected to", before + 1) if connected else client

    def submit(self, plan: Path) -> str:
        """Have the service run a Plan; the run's name."""
        return self.command("coordinator", "run", plan, "--home", self.home, "--detach").strip()

    @contextmanager
    def store(self) -> Iterator[Store]:
        store = Home.open(self.home).store()
        try:
            yield store
        finally:
            store.close()

    def run(self, name: str) -> Run:
        with self.store() as store:
            run = store.run(name)
        assert run is not None
        return run

    def rounds(self, name: str) -> int:
        """The number of the last finished round; -1 before the first evaluation."""
        with self.store() as store:
            return max((record.round for record in store.rounds(name)), default=-1)

    def reaches(self, name: str, number: int) -> None:
        eventually(lambda: self.rounds(name) >= number, lambda: self._explain(name))

    def finishes(self, name: str) -> Run:
        final = {RunState.FINISHED, RunState.FAILED, RunState.CANCELLED}
        eventually(lambda: self.run(name).state in final, lambda: self._explain(name))
        run = self.run(name)
        assert run.state is RunState.FINISHED, self._explain(name)
        return run

    def detail(self, name: str, text: str) -> None:
        """Wait until the run says `text` of itself."""
        eventually(lambda: text in self.run(name).detail, lambda: self._explain(name))

    def log(self, name: str) -> str:
        """The run's own log."""
        path = self.run(name).folder / "run.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def descendants(self) -> dict[int, str]:
        """Processes of this federation that live: those that name its folder, and those that these started."""
        return _processes(str(self.path))

    def _explain(self, name: str) -> str:
        service = self.service.output if self.service else ""
        return f"{self.run(name)}\n{self.log(name)}\n{service}"


@contextmanager
def federation(path: Path) -> Iterator[Federation]:
    with ExitStack() as stack:
        made = Federation(path, stack)
        yield made
        stack.close()
        eventually(lambda: not made.descendants(), lambda: f"left running: {made.descendants()}")


def _processes(marker: str) -> dict[int, str]:
    """Command lines, by process, of those that mention `marker` in their command line or environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            line = (folder / "cmdline").read_bytes()
            if line and marker.encode() in line + (folder / "environ").read_bytes():
                found[int(folder.name)] = line.replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found


def _ended(process: Process) -> None:
    if process.status is None:
        process.end()


def eventually(true: Callable[[], bool], explain: Callable[[], str], seconds: float = PATIENCE) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, explain()
        time.sleep(0.05)


def environment(**more: str) -> dict[str, str]:
    """One thread for each process: many run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **more}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens at now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def result(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    return document

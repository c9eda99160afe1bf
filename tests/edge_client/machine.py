"""A machine on which the `edge-client` command is typed, in processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from test_enrol import Coordinator

COMMAND = [sys.executable, "-m", "farfield.edge_client.cli"]


@dataclass(frozen=True)
class Machine:
    """A folder with data, and what is typed there."""

    path: Path

    @classmethod
    def with_notes(cls, path: Path) -> Machine:
        (path / "notes.jsonl").write_text('{"text": "Seen by nobody."}\n{"text": "Nor this."}\n')
        return cls(path)

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FARFIELD_")}
        return inherited | {"FARFIELD_EDGE_HOME": str(self.home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *words: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words],
            cwd=self.path,
            env=self.environment | environment,
            input=text,
            capture_output=True,
            text=True,
        )

    def join(self, coordinator: Coordinator, *more: str) -> subprocess.CompletedProcess[str]:
        token = coordinator.invite()
        done = self.run(
            "join", coordinator.address, "--token", "-", "--data", "notes.jsonl", "--no-start", *more, text=f"{token}\n"
        )
        assert token not in done.stdout + done.stderr
        return done


def went_well(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line that says what is wrong, status 2, and nothing else on stderr."""
    assert done.returncode == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stdout

"""The federation of toys (tiny.py) between processes: its Plans, and what its simulation comes to."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

from processes import environment
from tiny import plan_text, write_backbone, write_clients

from farfield.coordinator.runs import RunFolder

CLIENTS = tuple(f"client-{number:03}.jsonl" for number in range(3))


def place(folder: Path) -> Path:
    """`folder`, with `backbone/`, and `data/` of the three clients."""
    write_backbone(folder / "backbone")
    write_clients(folder / "data", len(CLIENTS))
    return folder


def plan(toy: Path, rounds: int, steps: int, minimum: int, seconds: float = 300.0) -> Path:
    """A Plan for those in `place`; its path."""
    file = toy / f"plan-{rounds}-{steps}-{minimum}-{seconds:g}.toml"
    cohort = {"minimum": minimum, "round_seconds": seconds}
    file.write_text(
        plan_text(
            training={"rounds": rounds, "steps": steps, "optimizer": "sgd", "learning_rate": 0.01}, cohort=cohort
        ),
        encoding="utf-8",
    )
    return file


@cache
def simulated(toy: Path, rounds: int, steps: int) -> RunFolder:
    """The run folder of the simulation of all three."""
    runs = toy / f"simulated-{rounds}-{steps}"
    arguments = ["simulate", plan(toy, rounds, steps, minimum=3), "--data", toy / "data", "--runs", runs]
    command = [sys.executable, "-m", "farfield.coordinator.cli", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment())
    (run,) = runs.iterdir()
    return RunFolder.open(run)

"""The federation of toys (tiny.py) between processes: its Plans, and what its simulation comes to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from processes import environment
from tiny import plan_text, write_backbone, write_clients

from farfield.coordinator import bounds, plans
from farfield.coordinator.runs import RunFolder
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import fixedpoint

FOUR = tuple(f"client-{number:03}.jsonl" for number in range(4))
CLIENTS = FOUR[:3]

WEIGHT_LIMIT = 64
"""Near the toys' numbers of examples: weights are sent as fractions of it, so rounding errors grow with it."""


def place(folder: Path, clients: int = len(CLIENTS), layers: int = 2) -> Path:
    """`folder`, with `backbone/`, and `data/` of so many clients."""
    write_backbone(folder / "backbone", layers)
    write_clients(folder / "data", clients)
    return folder


def plan(
    toy: Path,
    rounds: int,
    steps: int,
    minimum: int,
    seconds: float = 300.0,
    protection: str = "sealed",
    **sections: Mapping[str, Any],
) -> Path:
    """A Plan for those in `place`; its path.

    Args:
        sections: more keys, and other ones.
    """
    named = "-".join([protection, *sections])
    file = toy / f"plan-{rounds}-{steps}-{minimum}-{seconds:g}-{named}.toml"
    usual: dict[str, dict[str, Any]] = {
        "training": {"rounds": rounds, "steps": steps, "optimizer": "sgd", "learning_rate": 0.01},
        "cohort": {"minimum": minimum, "round_seconds": seconds},
        "protection": {"kind": protection, "weight_limit": WEIGHT_LIMIT},
    }
    keys = {name: {**usual.get(name, {}), **sections.get(name, {})} for name in usual | sections}
    file.write_text(plan_text(**keys), encoding="utf-8")
    return file


@cache
def simulated(toy: Path, rounds: int, steps: int, protection: str = "sealed", clients: int = len(CLIENTS)) -> RunFolder:
    """The run folder of the simulation of all."""
    runs = toy / f"simulated-{rounds}-{steps}-{protection}-{clients}"
    file = plan(toy, rounds, steps, minimum=clients, protection=protection)
    arguments = ["simulate", file, "--data", toy / "data", "--runs", runs]
    command = [sys.executable, "-m", "farfield.coordinator.cli", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment())
    (run,) = runs.iterdir()
    return RunFolder.open(run)


def equal(ours: RunFolder, theirs: RunFolder, clients: int = len(CLIENTS)) -> None:
    """The same rounds, each with the same adapter after it; only the order of sums may differ, and what was rounded."""
    assert ours.rounds() == theirs.rounds()
    plan = plans.load(ours.path / "plan.toml")
    for number in ours.rounds():
        mine, other = ours.load(number).adapter, theirs.load(number).adapter
        allowed = 1e-6 + number * rounding(plan, theirs, clients)
        for name, array in other.items():
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=allowed, err_msg=f"round {number}, {name}")


def rounding(plan: Plan, run: RunFolder, clients: int) -> float:
    """By how much a round's mean may differ from that of another run of the same Plan, by rounding in both.

    A client's value w·v/weight_limit goes up or down to a level of limit/L: it is wrong by one level at most. The sum
    of n is wrong by n levels, and the mean by n·limit/L·weight_limit/Σw. Two runs are wrong independently, and the next
    round begins from what differs; with steps of 0.01 it hardly grows there, for which there is another factor of 2.
    """
    if plan.protection.kind != "secagg":
        return 0.0
    widest = max(bounds.first(plan, run.load(0).adapter).ranges.values())
    _, levels = fixedpoint.choose_modulus(clients, plan.protection.bits)
    least_weight = 8  # no toy has fewer training examples
    return 2 * 2 * widest / levels * plan.protection.weight_limit / least_weight

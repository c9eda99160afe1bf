"""Secure aggregation and privacy between real processes: what comes out, what it survives, and what nobody can find."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import federation, result
from toy import CLIENTS, equal, place, plan, simulated

from farfield.coordinator.runs import RunFolder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("toy"), 4)


def test_a_secure_run_comes_to_what_its_simulation_comes_to(toy: Path, tmp_path: Path) -> None:
    with federation(tmp_path) as running:
        running.serve()
        for name in CLIENTS:
            running.join(name, toy / "data" / name)
        run = running.submit(plan(toy, rounds=2, steps=5, minimum=3, protection="secagg"))
        done = running.finishes(run)
        print(running.log(run))
        sealed = running.finishes(running.submit(plan(toy, rounds=2, steps=5, minimum=3)))
    print([one["seconds"] for one in result(done)["rounds"]], [one["seconds"] for one in result(sealed)["rounds"]])
    assert [one["clients"] for one in result(done)["rounds"]] == [3, 3]
    equal(RunFolder.open(done.folder), simulated(toy, 2, 5, "secagg", len(CLIENTS)))

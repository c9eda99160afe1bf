"""That the benchmark runs, and drives both sides as they are meant to be. What it measures here says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

VALUES = 2000


def test_it_runs_both_sides_and_says_of_each_requirement_whether_it_is_met(tmp_path: Path) -> None:
    """It fails by itself where a sum is not exact, or Flower's mean is not the mean."""
    script = Path(__file__).parents[2] / "benchmarks" / "secure_aggregation.py"
    small = ["--values", str(VALUES), "--neighbours", "4", "--clients", "7", "--dropped", "1", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *small, "--json", str(tmp_path / "figures.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| client, 4 neighbours |" in done.stdout
    assert "| server, 7 clients, 1 dropped, 6 neighbours |" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    ((ours,), (theirs,)) = figures["clients"]["4"]
    label = 32
    assert ours["vector_bytes"] == 3 * VALUES + label
    assert theirs["vector_bytes"] > 8 * VALUES
    assert all(one["clock"] > 0 for one in (ours["took"], theirs["took"], *figures["server"]))
    said = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith(("met:", "MISSED:"))]
    assert said == ["met" if one["met"] else "MISSED" for one in figures["verdicts"]]
    assert len(said) == 5

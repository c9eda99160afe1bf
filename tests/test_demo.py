"""What the demo promises, measured with its own Plan and command: minutes, so not part of the default run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_learns_nearly_as_much_as_on_pooled_data(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("coordinator")), "simulate", "examples/quickstart.toml"]
    options = ["--clients", "8", "--compare", "--runs", str(tmp_path), "--json", str(tmp_path / "result.json")]
    subprocess.run([*command, *options], check=True, cwd=Path(__file__).parent.parent)
    result = json.loads((tmp_path / "result.json").read_text())
    before, central = result["eval_loss_before"], result["centralised"]["eval_loss"]
    assert result["centralised"]["steps"] == sum(record["steps"] for record in result["rounds"])
    assert 1 - central / before >= 0.10
    assert (before - result["eval_loss_after"]) / (before - central) >= 0.85
    assert sum(record["seconds"] for record in result["rounds"]) < 180

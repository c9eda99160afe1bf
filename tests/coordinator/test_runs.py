import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from farfield.coordinator.runs import Checkpoint, RoundRecord, RunFolder, RunInfo
from farfield.coordinator.server_optimizer import Moments
from farfield.protocols.errors import RunError

INFO = RunInfo("r", "ab" * 32, "folder", "cd" * 32, 8, None, 0.0, 0.0)


def checkpoint(number: int) -> Checkpoint:
    record = RoundRecord(number, 3, 1.5, 1.25, 0.5, 10, 20, 0.1, 6, {"ann": "gone"})
    array = np.full((2, 3), number, np.float32)
    return Checkpoint(record, {"w/x": array}, Moments({"w/x": array + 1}, {"w/x": array + 2}))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", INFO, "# plan\n")


def test_a_checkpoint_comes_back_as_it_was(folder: RunFolder) -> None:
    folder.save(checkpoint(7))
    loaded = folder.load(7)
    assert loaded.record == checkpoint(7).record
    for ours, theirs in (
        (loaded.adapter, checkpoint(7).adapter),
        (loaded.moments.first, checkpoint(7).moments.first),
        (loaded.moments.second, checkpoint(7).moments.second),
    ):
        assert list(ours) == list(theirs)
        np.testing.assert_array_equal(ours["w/x"], theirs["w/x"])


def test_resuming_repairs_metrics_that_a_crash_left_behind(folder: RunFolder) -> None:
    for number in range(3):
        folder.save(checkpoint(number))
    metrics = folder.path / "metrics.jsonl"
    whole = metrics.read_text()
    assert [json.loads(line)["round"] for line in whole.splitlines()] == [1, 2]
    metrics.write_text(whole[: len(whole) // 2 + 9])
    (folder.path / "checkpoints" / "round-0003.safetensors.partial").write_bytes(b"half a check")
    last = folder.resume()
    assert last is not None
    assert last.record.round == 2
    assert metrics.read_text() == whole


def test_the_folder_remembers_what_the_run_is(folder: RunFolder) -> None:
    again = RunFolder.open(folder.path)
    assert again.info == INFO
    assert again.plan_text == "# plan\n"
    assert again.resume() is None


def test_what_is_no_run_or_is_damaged_is_said(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="exists already"):
        RunFolder.create(folder.path, INFO, "")
    folder.save(checkpoint(1))
    path = folder.path / "checkpoints" / "round-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"round-0001.safetensors: cannot be read"):
        folder.load(1)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run.json: damaged"):
        _ = RunFolder.open(folder.path).info


def test_one_process_at_a_time(folder: RunFolder) -> None:
    with folder.held():
        code = f"""
from pathlib import Path
from farfield.coordinator.runs import RunFolder
try:
    with RunFolder.open(Path({str(folder.path)!r})).held():
        print("held")
except Exception as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another process is working on this run" in done.stdout

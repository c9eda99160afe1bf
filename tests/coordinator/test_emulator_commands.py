"""The commands of a backbone's owner as a person runs them: stopped, killed, short of disk, and misused."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import Ended, Launcher, Place, launcher, write_backbone

from farfield.coordinator.emulator_console import BuildLines
from farfield.emulator.distill import Check

DELIVERY = {"kind": "emulator", "first": 1, "last": 1}
DISTILLATION = {"steps": 4, "check_every": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def command() -> Iterator[Launcher]:
    with launcher() as started:
        yield started


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), layers=6)


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    place = Place.make(tmp_path, backbone)
    place.plan(delivery=DELIVERY, distillation=DISTILLATION)
    return place


BUILD = ("emulator", "build", "plan.toml", "out", "--data", "data")


def done(ended: Ended) -> str:
    assert (ended.status, ended.err) == (0, "")
    return ended.out


def refused(ended: Ended, *parts: str) -> None:
    """One line that says what is wrong, status 2, and nothing else on stderr."""
    assert ended.status == 2, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert part in ended.err


def bundled(place: Place, out: str = "out") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (place.path / out).iterdir() if file.is_file()}


def test_build_inspect_and_leakage(place: Place, command: Launcher) -> None:
    said = done(command.run(place, *BUILD))
    for part in ("distilling", "distilled 4 steps:", "of the middle's", "of the backbone's", "emulator leakage out"):
        assert part in said
    assert not (place.path / "out/build/tradeoff.png").exists()

    said = done(command.run(place, "emulator", "inspect", "out"))
    for part in ("made from 1, 4 of the blocks 1 to 4", "LlamaForCausalLM", "estimated", "Not counted: activations"):
        assert part in said
    document = json.loads(done(command.run(place, "emulator", "inspect", "out", "--json")))
    assert document["digest"] in said
    assert document["layout"]["middle"] == [1, 4]

    said = done(
        command.run(place, "emulator", "leakage", "out", "plan.toml", "--steps", "2", "--json", "found/leakage.json")
    )
    measured = json.loads((place.path / "found/leakage.json").read_text())
    assert [file.name for file in (place.path / "found").iterdir()] == ["leakage.json"]
    for sentence in measured["verdict"]:
        assert sentence in said
    assert measured["budget"]["tokens"] == 2 * 2 * 16
    for loss in ("backbone", "emulator", "emulator_tuned", "plug_in", "backbone_tuned", "attacked", "floor"):
        assert f"{measured['losses'][loss]:.4f}" in said
    assert measured["disclosed"]["outer"]["given"] == 1
    assert measured["disclosed"]["error"] > 0, "distillation has moved the blocks"


def test_a_budget_shows_what_was_compared(place: Place, command: Launcher) -> None:
    said = done(command.run(place, *BUILD, "--budget-mb", "0.025"))
    found = json.loads((place.path / "out/build/search.json").read_text())
    for number, one in enumerate(found, 1):
        assert f"{number}/{len(found)} " in said
        assert f"{one['fidelity']['agreement']:.3f}" in said
    assert "holds all of the middle, and keeps nothing back" in said
    assert (place.path / "out/build/tradeoff.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads(done(command.run(place, "emulator", "inspect", "out", "--json")))["stand_in_bytes"] <= 25_000


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_goes_on(ending: int, place: Place, command: Launcher) -> None:
    place.plan(delivery=DELIVERY, distillation=DISTILLATION | {"steps": 60, "check_every": 2, "patience": 1000})
    out = place.path / "out"
    running = command.start(place, *BUILD)
    running.kill_when(lambda: (out / "build/distillation-0.safetensors").exists(), ending)
    ended = running.end()
    assert not (out / "emulator.json").exists()
    if ending == signal.SIGINT:
        assert ended.status == 130
        assert ended.err == "Stopped. What was done is kept; the same command goes on with it.\n"
    else:
        assert ended.status == -signal.SIGKILL
    said = done(command.run(place, *BUILD))
    assert "distilled 0 steps" not in said
    done(command.run(place, "emulator", "build", "plan.toml", "other", "--data", "data"))
    assert bundled(place) == bundled(place, "other")


def test_a_full_disk_is_said_and_gone_on_from(place: Place, command: Launcher) -> None:
    refused(command.run(place, *BUILD, largest_file=40_000), "cannot be written", "file too large", "Make room")
    assert not (place.path / "out/emulator.json").exists()
    done(command.run(place, *BUILD))


def test_leakage_that_is_stopped_leaves_nothing(place: Place, command: Launcher) -> None:
    done(command.run(place, *BUILD))
    before = bundled(place)
    arguments = ("emulator", "leakage", "out", "plan.toml", "--steps", "100000", "--json", "leakage.json")
    running = command.start(place, *arguments)
    running.kill_when(
        lambda: any("tuning the emulator" in one.read_text() for one in place.path.glob("command-*.out")), signal.SIGINT
    )
    ended = running.end()
    assert (ended.status, ended.err) == (130, "Stopped. Nothing was written; the same command begins anew.\n")
    assert not list(place.path.glob("leakage.json*"))
    assert bundled(place) == before


def test_what_cannot_be_is_refused_in_one_line(place: Place, command: Launcher) -> None:
    done(command.run(place, *BUILD))
    refused(command.run(place, *BUILD), "out", "holds a finished emulator")
    refused(command.run(place, "emulator", "inspect", "data"), "data", "there is no emulator.json")
    refused(command.run(place, "emulator", "inspect", "nowhere"), "nowhere", "there is no emulator.json")
    place.plan(delivery=DELIVERY, distillation=DISTILLATION | {"steps": 5})
    refused(command.run(place, "emulator", "leakage", "out", "plan.toml"), "made for another Plan")
    place.plan()
    refused(command.run(place, "emulator", "build", "plan.toml", "new"), "the Plan wants no emulator")
    ended = command.run(place, *BUILD, "--keep", "1", "--budget-mb", "1")
    assert ended.status == 2
    assert "not both" in ended.err


def test_square_brackets_are_no_markup(place: Place, command: Launcher) -> None:
    said = done(command.run(place, "emulator", "build", "plan.toml", "odd [red] out", "--data", "data"))
    assert "coordinator emulator leakage odd [red] out PLAN.toml" in said


def test_lines_where_there_is_no_terminal_and_a_bar_where_there_is() -> None:
    shown: list[str] = []
    for terminal in (False, True):
        console = Console(file=StringIO(), force_terminal=terminal, width=80)
        lines = BuildLines(console, lambda text, done, total: shown.append(f"{text} {done}/{total}"), indent=4)
        lines.on_stage("distilling")
        lines.on_step(1, 8, 2.5)
        lines.on_check(Check(2, 0.25, 1.5))
        file = console.file
        assert isinstance(file, StringIO)
        said = file.getvalue()
        assert ("    distilling\n" in said) is not terminal
        assert "    distilled 2 steps: 25.0% of the stream wrong, loss alone 1.5000\n" in said
    assert shown == ["emulator: distilling 0/1", "emulator: distilling (loss 2.500) 1/8"] * 2

"""Building an emulator: what is written and when, whatever interrupts it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import Notes, built, plan_of, shipped, write_all
from safetensors.torch import save_file

from farfield.emulator import backbone as backbones
from farfield.emulator import build as building
from farfield.emulator import bundle, distill, stored
from farfield.emulator.assemble import tensors
from farfield.emulator.layout import LAYOUT, is_emulator, read
from farfield.emulator.text import PublicText
from farfield.protocols.errors import BundleError, DataError, EmulatorError, FarfieldError

COMPRESSED = {"emulator": {"blocks": 2, "low_rank": 0.5, "quantization": "nf4"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone's folder and a file of public text."""
    return write_all(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, made: tuple[Path, Path]) -> dict[str, bytes]:
    """The files of the emulator that nothing has interrupted."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    built(plan_of(**COMPRESSED), made[0], out, made[1])
    return shipped(out)


def test_an_emulator_from_end_to_end(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    plan, out, notes = plan_of(), tmp_path / "out", Notes()
    report = built(plan, folder, out, data, notes=notes)
    record = read(out)
    assert record.layout == report.layout
    assert record.layout.origins == (0, 1, 4, 5)
    assert record.plan == plan.emulator_digest
    assert record.distilled == report.checks[-1].step
    model, _ = stored.load(out, task="causal-lm", dtype="float32")
    assert building.all_bytes(model) == report.emulator_bytes
    assert 2 * report.emulated_bytes == report.middle_bytes < report.backbone_bytes
    assert report.emulator_bytes == report.backbone_bytes - report.middle_bytes + report.emulated_bytes
    assert [one.step for one in notes.checks] == [0, 2, 4]
    assert tuple(notes.checks) == report.checks
    assert min(one.hidden for one in notes.checks[1:]) < notes.checks[0].hidden
    assert report.before.hidden == pytest.approx(notes.checks[0].hidden, rel=1e-4)
    assert report.fidelity.hidden < report.before.hidden
    public = PublicText.load(out / building.TEXT)
    assert len(public.train) > len(public.held_out) > 0
    assert json.loads((out / "build/report.json").read_text())["emulated_bytes"] == report.emulated_bytes
    assert not (out / "build/distillation-0.safetensors").exists()
    bundled = {file.path for file in bundle.describe(out, "emulator").files}
    assert LAYOUT in bundled
    assert bundled <= set(shipped(out))


EVENTS = 13
"""How often such a build tells of itself, and can be interrupted by the one that it tells."""

FEW = {0, 4, 7, 9, 12}
"""Before the text, between distilling's measures, in the middle of its steps, and before anything is written."""


@pytest.mark.parametrize(
    "last", [pytest.param(last, marks=[] if last in FEW else pytest.mark.slow) for last in range(EVENTS + 1)]
)
def test_it_goes_on_after_any_interruption(
    last: int, made: tuple[Path, Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder, data = made
    plan, out = plan_of(**COMPRESSED), tmp_path / "out"
    try:
        built(plan, folder, out, data, notes=Notes(last))
    except KeyboardInterrupt:
        assert not is_emulator(out)
        built(plan, folder, out, data)
    else:
        assert last == EVENTS, "every note of a build should have been a place to stop at"
    assert shipped(out) == undisturbed


def test_what_is_distilled_is_not_distilled_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    out, notes = tmp_path / "out", Notes()
    whole = Notes()
    built(plan_of(), folder, tmp_path / "other", data, notes=whole)
    until = len(whole.stages) - 1 + 3 + 2  # all stages but the last, three checks but the last, steps 1 and 2
    with pytest.raises(KeyboardInterrupt):
        built(plan_of(), folder, out, data, notes=Notes(until))
    built(plan_of(), folder, out, data, notes=notes)
    assert notes.steps == [3, 4]
    assert "reading public text" in whole.stages
    assert "reading public text" not in notes.stages


@pytest.mark.parametrize("file", ["model.safetensors", LAYOUT])
def test_it_goes_on_where_it_was_killed_between_files(
    file: str,
    made: tuple[Path, Path],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, data = made
    plan, out = plan_of(**COMPRESSED), tmp_path / "out"
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == out / file:
            assert not is_emulator(out), "the record comes last"
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            built(plan, folder, out, data)
    assert not is_emulator(out)
    assert len(shipped(out)) == (len(undisturbed) - 1 if file == LAYOUT else len(shipped(out)))
    built(plan, folder, out, data)
    assert shipped(out) == undisturbed


@pytest.mark.parametrize("left", [[], ["build"], ["build", "build/request.json.partial"]])
def test_a_folder_in_which_nothing_was_begun_is_as_good_as_a_new_one(
    left: list[str], made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text("{") if "." in name else (out / name).mkdir()
    built(plan_of(distillation={"steps": 0}), made[0], out, made[1])
    assert is_emulator(out)


@pytest.mark.parametrize("left", ["notes.txt", "build/notes.txt", "config.json"])
def test_a_folder_of_something_else_is_refused(left: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / left).parent.mkdir(parents=True)
    (out / left).write_text("mine")
    with pytest.raises(EmulatorError, match="exists and is not empty"):
        built(plan_of(), made[0], out, made[1])
    assert [one.relative_to(out).as_posix() for one in out.rglob("*") if one.is_file()] == [left]


def test_a_finished_emulator_is_not_touched(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    built(plan_of(distillation={"steps": 0}), made[0], out, made[1])
    before = shipped(out)
    with pytest.raises(EmulatorError, match="holds a finished emulator"):
        built(plan_of(distillation={"steps": 0}), made[0], out, made[1])
    assert shipped(out) == before


@pytest.mark.parametrize(
    ("sections", "asked"),
    [
        ({"distillation": {"steps": 5}}, {}),
        ({"training": {"seed": 6}}, {}),
        ({}, {"keep": 1}),
        ({}, {"budget": 10**9}),
        ({}, {"data": "other"}),
    ],
)
def test_what_was_begun_is_not_gone_on_with_otherwise(
    sections: dict[str, Any], asked: dict[str, Any], made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = made
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        built(plan_of(), folder, out, data, notes=Notes(0))
    given = {"data": data.parent if "data" in asked else data} | {key: asked[key] for key in asked if key != "data"}
    with pytest.raises(EmulatorError, match="begun here for another Plan, backbone, text or limit"):
        built(plan_of(**sections), folder, out, **given)
    # What decides nothing of an emulator may change.
    built(plan_of(training={"learning_rate": 0.5}), folder, out, data)


def test_keep_and_the_plan_must_not_differ(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    with pytest.raises(EmulatorError, match=r"--keep 3, but the Plan says emulator\.blocks = 2"):
        built(plan_of(emulator={"blocks": 2}), folder, tmp_path / "one", data, keep=3)
    with pytest.raises(EmulatorError, match="5 blocks are to remain, and the middle has 4"):
        built(plan_of(), folder, tmp_path / "two", data, keep=5)
    uniform = plan_of(emulator={"select": "uniform"}, distillation={"steps": 0})
    built(uniform, folder, tmp_path / "three", data, keep=3)
    assert read(tmp_path / "three").layout.middle == (1, 3, 4)


def test_a_plan_without_an_emulator_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_of(delivery={"kind": "adapter"})
    with pytest.raises(EmulatorError, match="the Plan wants no emulator"):
        built(plan, made[0], tmp_path / "out", made[1])
    with pytest.raises(EmulatorError, match="leave nothing between them"):
        built(plan_of(delivery={"first": 3, "last": 3}), made[0], tmp_path / "out", made[1])


def test_too_little_text_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(DataError, match="too few windows"):
        built(plan_of(), made[0], tmp_path / "out", tmp_path / "short.txt")


def test_a_budget_is_kept(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    budget = 20_000
    notes = Notes()
    report = built(plan_of(distillation={"steps": 0}), folder, tmp_path / "out", data, budget=budget, notes=notes)
    assert report.candidates
    assert {one.choice for one in report.candidates} == {one.choice for one in notes.candidates}
    assert all(one.size <= budget for one in report.candidates)
    assert report.emulated_bytes <= budget
    assert report.choice == report.candidates[0].choice
    assert report.emulated_bytes == report.candidates[0].size
    with pytest.raises(EmulatorError, match=r"no stand-in of 100 bytes can be made\. The smallest takes [\d,]+:"):
        built(plan_of(), folder, tmp_path / "small", data, budget=100)


@pytest.mark.parametrize("last", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_a_search_goes_on_after_an_interruption(  # of its candidates, and of the distillation behind it
    last: int, made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = made
    plan = plan_of()
    reports = []
    for out, stop in ((tmp_path / "one", None), (tmp_path / "two", last)):
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                built(plan, folder, out, data, budget=6_000, notes=Notes(stop))
        reports.append(built(plan, folder, out, data, budget=6_000))
    assert reports[0] == reports[1]
    assert shipped(tmp_path / "one") == shipped(tmp_path / "two")


@pytest.mark.parametrize("what", ["search", "checkpoint", "report", "weights"])
def test_a_disk_that_refuses_leaves_what_can_be_gone_on_with(
    what: str, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = made
    out = tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    places: dict[str, tuple[object, str]] = {
        "search": (building, "search"),
        "checkpoint": (distill, "save_file"),
        "report": (stored, "save"),
        "weights": (shutil, "rmtree"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[what], full)
        with pytest.raises(BundleError, match="no space left on device") as caught:
            built(plan_of(), folder, out, data, budget=6_000)
    assert isinstance(caught.value, FarfieldError)
    assert "Make room" in str(caught.value)
    assert not is_emulator(out)
    built(plan_of(), folder, out, data, budget=6_000)
    assert is_emulator(out)


def test_the_middle_is_not_in_the_bundle_beyond_what_the_choice_says(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Tensors are looked for by their values, wherever they may lie."""
    folder, data = made
    out = tmp_path / "out"
    built(plan_of(**COMPRESSED), folder, out, data)
    whole = backbones.load_model(folder, task="causal-lm", dtype="float32")
    part, record = stored.load(out, task="causal-lm", dtype="float32")
    held = {one.numpy().tobytes() for one in tensors(part).values() if one.dtype is torch.float32}
    matrices = {
        name: tensor.numpy().tobytes()
        for name, tensor in tensors(whole).items()
        if tensor.ndim == 2 and name.startswith("model.layers.")
    }
    there = {int(name.split(".")[2]) for name, raw in matrices.items() if raw in held}
    assert there == {0, 5} == set(record.layout.split.outer)


def test_an_error_of_safetensors_is_said_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be written"), building.writing(tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "such" / "folder.safetensors")

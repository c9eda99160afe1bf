"""What an emulator gives away, as a finding: one that holds the whole middle is a leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import audits
import pytest
import tiny

from farfield.coordinator import plans
from farfield.edge_client.audit import Owner, Subject, emulator
from farfield.edge_client.audit.emulator import Emulator
from farfield.edge_client.audit.notes import Notes
from farfield.emulator import build as building
from farfield.emulator.bench import Bench

TEXT = " ".join(
    f"the heron stood in {number} reeds and the reeds bent over {number + 7} pools" for number in range(300)
)


class Quiet(tiny.Silent):
    """Watches a build and says nothing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of six blocks, and public text."""
    folder = tmp_path_factory.mktemp("emulator")
    tiny.write_backbone(folder / "backbone", layers=6)
    (folder / "public.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "STEPS", 4)


def owned(place: Path, name: str, **sections: Any) -> Subject:
    """The subject of a Plan that ships the emulator in `name`, which is built; its owner has the backbone."""
    asked: dict[str, Any] = {
        "delivery": {"kind": "emulator", "first": 1, "last": 1},
        "distillation": {"steps": 0, "batch_size": 4},
    }
    (place / f"{name}.toml").write_text(tiny.plan_text(**asked, **sections), encoding="utf-8")
    plan = plans.load(place / f"{name}.toml")
    out = place / name
    if not out.exists():
        building.build(plan, place / "backbone", out, building.Request(None, None, place / "public.txt"), Quiet())
    bench = Bench(plan, out)
    said: list[str] = []
    return Subject(
        plan=plan,
        folder=out,
        bench=bench,
        initial=bench.adapter(),
        seed=1,
        clients={},
        prepare=lambda name, planted: pytest.fail("no data are wanted"),
        federation=None,
        notes=Notes(place / f"{name}-notes"),
        say=lambda what, done, total: said.append(what),
        owner=Owner(place / "backbone", out, None),
    )


def test_it_is_for_owners_of_a_backbone_that_stays_at_home(place: Path, tmp_path: Path) -> None:
    assert "clients get the backbone itself" in str(Emulator().unfit(audits.subject(tmp_path)))
    subject = owned(place, "half", emulator={"select": "uniform", "blocks": 2})
    assert Emulator().unfit(subject) is None
    assert "only the owner of the backbone" in str(Emulator().unfit(replace(subject, owner=None)))


def test_an_emulator_with_the_whole_middle_is_a_leak(place: Path) -> None:
    finding = Emulator().run(owned(place, "whole", emulator={"select": "uniform", "blocks": 4}))
    assert finding.verdict == "leak"
    assert finding.found[0].startswith("This emulator protects nothing: 100% of the middle's parameters are in it.")
    figures = {figure.name: figure for figure in finding.figures}
    assert figures["the middle's parameters that are in the emulator"].value == 1
    assert figures["the backbone's parameters that are in the emulator"].value == 1


def test_an_emulator_of_a_few_blocks(place: Path) -> None:
    subject = owned(place, "half", emulator={"select": "uniform", "blocks": 2})
    finding = Emulator().run(subject)
    figures = {figure.name: figure for figure in finding.figures}
    share = figures["the middle's parameters that are in the emulator"].value
    assert share is not None and 0 < share < 0.6
    made: Any = finding.data
    assert finding.verdict == ("leak" if made["protects nothing"] else "no leak found")
    assert finding.found == tuple(made["verdict"])
    assert made["budget"] == {"steps": 4, "batch_size": 4, "length": 16, "learning_rate": 3e-3, "tokens": 256}
    assert "4 steps of 4 × 16 tokens" in finding.limits[0]
    assert [row[1] for row in finding.tables[0].rows] == [
        f"{made['losses'][name]:.4f}"
        for name in ("floor", "emulator", "emulator_tuned", "attacked", "backbone", "plug_in", "backbone_tuned")
    ]
    assert finding.plots[0].series[0].y[2] == made["losses"]["attacked"]
    for name in ("clients", "private", "safe"):
        assert name not in finding.found[0]
    Path(subject.owner.emulator / building.TEXT).unlink()  # type: ignore[union-attr]
    assert Emulator().run(subject) == finding, "what was measured is kept"

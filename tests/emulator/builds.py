"""What tests of whole emulators share: a small backbone, public text, a Plan, and a progress that takes notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import plan_text, write_backbone

from farfield.emulator.build import Report, Request, build
from farfield.emulator.distill import Check
from farfield.emulator.methods import registered
from farfield.emulator.search import Candidate
from farfield.protocols import plan as plans
from farfield.protocols.plan import Plan

DEPTH = 6

SECTIONS: dict[str, dict[str, Any]] = {
    "delivery": {"kind": "emulator", "first": 1, "last": 1},
    "distillation": {"steps": 4, "check_every": 2, "batch_size": 2},
}


def plan_of(**sections: dict[str, Any]) -> Plan:
    """The tiny Plan with an emulator of the four blocks between the first and the last."""
    every = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in SECTIONS | sections}
    return plans.parse(plan_text(**every), registered(), None)


def write_text(file: Path, lines: int = 60) -> Path:
    """Sentences, each a document."""
    animals, places = ("cat", "dog", "owl", "fox"), ("mat", "sea", "moon")
    sentences = (
        f"the {animals[n % 4]} sat on the {places[n % 3]} and saw {n} of the {n % 5} stars" for n in range(lines)
    )
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in sentences), encoding="utf-8")
    return file


def write_all(folder: Path) -> tuple[Path, Path]:
    """A backbone and public text, below `folder`."""
    return write_backbone(folder / "backbone", DEPTH), write_text(folder / "text.jsonl")


class Notes:
    """Takes notes of a build; may be told to end it at the moment of some note."""

    def __init__(self, last: int | None = None) -> None:
        self.stages: list[str] = []
        self.candidates: list[Candidate] = []
        self.steps: list[int] = []
        self.checks: list[Check] = []
        self._left = last

    def _note(self) -> None:
        if self._left is not None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1

    def on_stage(self, what: str) -> None:
        self.stages.append(what)
        self._note()

    def on_candidate(self, candidate: Candidate, done: int, count: int) -> None:
        assert done == len(self.candidates) + 1 <= count
        self.candidates.append(candidate)
        self._note()

    def on_step(self, done: int, steps: int, loss: float) -> None:
        self.steps.append(done)
        self._note()

    def on_check(self, check: Check) -> None:
        self.checks.append(check)
        self._note()


def built(plan: Plan, backbone: Path, out: Path, data: Path, *, notes: Notes | None = None, **asked: Any) -> Report:
    return build(plan, backbone, out, Request(data=data, **asked), notes or Notes())


def shipped(out: Path) -> dict[str, bytes]:
    """The files of the bundle."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}

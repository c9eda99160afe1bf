"""An audit's subject over the toy federation of `tiny.py`, with real rounds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny

from farfield.coordinator import plans
from farfield.coordinator.audited import Simulated
from farfield.edge_client import data, records
from farfield.edge_client.audit import Subject
from farfield.edge_client.audit.notes import Notes
from farfield.edge_client.data import ClientData
from farfield.emulator.bench import Bench
from farfield.protocols.seeds import derive


def quiet(what: str, done: int, total: int) -> None:
    """Shows nothing."""


def subject(
    folder: Path, clients: int = 4, records_each: int = 12, seed: int = 1, **sections: dict[str, Any]
) -> Subject:
    """A subject whose backbone, data, Plan and notes lie in `folder`; asked for again it goes on with the same ones.

    Args:
        sections: keys of the Plan in place of `tiny.PLAN`'s.
    """
    backbone, people = folder / "backbone", folder / "clients"
    if not backbone.exists():
        tiny.write_backbone(backbone)
        tiny.write_clients(people, clients, records_each)
    (folder / "plan.toml").write_text(tiny.plan_text(**sections), encoding="utf-8")
    plan = plans.load(folder / "plan.toml")
    bench = Bench(plan, backbone)
    initial = bench.adapter()

    def prepare(name: str, planted: Sequence[records.Record] = ()) -> ClientData:
        path = people / name
        read = records.read(path, plan.data, plan.model.task, plan.model.labels)
        split = derive(plan.training.seed, "held-out", name)
        return data.prepare(read, bench.tokenizer, plan.data, plan.model.task, split, path, planted)

    names = sorted(path.name for path in people.iterdir())
    return Subject(
        plan=plan,
        folder=backbone,
        bench=bench,
        initial=initial,
        seed=seed,
        clients={name: partial(prepare, name) for name in names},
        prepare=prepare,
        federation=Simulated(folder / "federations", bench, initial, (backbone, "tiny")),
        notes=Notes(folder / "notes"),
        say=quiet,
    )

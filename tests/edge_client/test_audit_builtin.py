"""What canaries and planted secrets give away of the built-in backbone, tuned as examples/quickstart.toml says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import audits
import pytest

from farfield.coordinator import plans
from farfield.coordinator.audited import Simulated
from farfield.coordinator.simulation import sources
from farfield.edge_client import data, records
from farfield.edge_client.audit import Subject
from farfield.edge_client.audit.attack import registered
from farfield.edge_client.audit.conduct import conduct
from farfield.edge_client.audit.notes import Notes
from farfield.edge_client.data import ClientData
from farfield.emulator import backbone
from farfield.emulator.bench import Bench
from farfield.protocols.audit.finding import Finding
from farfield.protocols.seeds import derive

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.toml"


class Silent:
    def on_attack(self, attack: Any, number: int, attacks: int) -> None: ...
    def on_finding(self, finding: Finding) -> None: ...
    def on_untried(self, untried: Any) -> None: ...


def quickstart(folder: Path) -> Subject:
    """As it is, with the eight clients of the demonstration."""
    plan = plans.load(QUICKSTART)
    model = backbone.resolve(plan.model.backbone, QUICKSTART.parent)
    bench = Bench(plan, model)
    initial = bench.adapter()
    own = {source.name: source for source in sources(8, None)}

    def prepare(name: str, planted: Sequence[records.Record] = ()) -> ClientData:
        texts = [records.Text(text) for text in own[name].texts]
        split = derive(plan.training.seed, "held-out", name)
        return data.prepare(texts, bench.tokenizer, plan.data, plan.model.task, split, name, planted)

    return Subject(
        plan=plan,
        folder=model,
        bench=bench,
        initial=initial,
        seed=1,
        clients={name: partial(prepare, name) for name in own},
        prepare=prepare,
        federation=Simulated(folder / "federations", bench, initial, (model, "builtin")),
        notes=Notes(folder / "notes"),
        say=audits.quiet,
    )


@pytest.mark.slow
def test_an_unprotected_run_gives_planted_records_and_secrets_away(tmp_path: Path) -> None:
    subject = quickstart(tmp_path)
    attacks = [registered()[name] for name in ("canaries", "exposure")]
    (canaries, exposure), _ = conduct(subject, attacks, Silent())
    figures = {one.name: one for one in (*canaries.figures, *exposure.figures)}
    assert canaries.verdict == exposure.verdict == "leak"
    area = figures["AUC, both kinds"]
    assert area.interval is not None and area.interval.low is not None and area.interval.low > 0.5
    often, never = figures["exposure, planted 64 times"], figures["exposure, never planted"]
    assert often.value is not None and never.value is not None and often.value > 8 > 4 > never.value

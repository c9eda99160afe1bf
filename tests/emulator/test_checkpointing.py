"""With checkpointing every method learns what it learns without; one that cannot is refused when its Plan is read."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plan_text, write_backbone

from farfield.coordinator import plans
from farfield.edge_client.data import TokenExample
from farfield.edge_client.train import train
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols.errors import PlanError
from farfield.protocols.tensors import State


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def update(kind: str, backbone: Path, *, checkpointing: bool) -> State:
    ranked = "rank" in registered()[kind].model_fields and kind != "mezo"  # which has one over LoRA only
    tuning: dict[str, Any] = {"kind": kind, "rank": 2 if ranked else None}
    optimizer = "adamw" if registered()[kind].model_validate({"kind": kind}).by_gradient else "sgd"
    training = {"checkpointing": checkpointing, "optimizer": optimizer, "learning_rate": 1e-3}
    plan = plans.parse(plan_text(tuning=tuning, training=training))
    bench = Bench(plan, backbone)
    ids = array("i", range(2, 14))
    examples = [TokenExample(ids, ids), TokenExample(ids[::-1], ids[::-1])]
    start, settings = bench.adapter(), plan.training
    done = train(bench.tuned, start, examples, settings, pad_id=bench.pad_id, seed=1, steps=2, first_step=0, horizon=2)
    return dict(done.update)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", sorted(registered()))
def test_checkpointing_changes_nothing_but_memory(kind: str, backbone: Path) -> None:
    if not registered()[kind].model_validate({"kind": kind}).checkpoints:
        with pytest.raises(PlanError, match=r"leave training\.checkpointing out"):
            update(kind, backbone, checkpointing=True)
        return
    plain, checked = (update(kind, backbone, checkpointing=one) for one in (False, True))
    assert any(value.any() for value in plain.values()) and plain.keys() == checked.keys()
    for name, value in plain.items():
        torch.testing.assert_close(torch.from_numpy(checked[name]), torch.from_numpy(value), rtol=1e-4, atol=1e-6)

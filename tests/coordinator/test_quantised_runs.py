"""Runs on a backbone of few bits: secure aggregation, export, and an emulator of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import Place, Silent, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.export import export
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.emulator.bench import Bench
from farfield.emulator.layers import RoundedLinear

hf: Any = transformers
IDS = torch.tensor([[5, 40, 41, 42, 43, 44, 45, 46], [90, 80, 70, 60, 50, 40, 30, 20]])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def run_of(place: Place, public: Path | None = None, **sections: dict[str, Any]) -> RunFolder:
    keys: dict[str, Any] = {
        "training": {"rounds": 2, "steps": 2, "learning_rate": 0.05},
        "protection": {"kind": "secagg"},
    }
    plan = place.plan(**(keys | sections))
    request = Request(plan, data=place.path / "data", runs=place.path / "runs", public=public)
    return RunFolder.open(simulate(request, Silent()).folder)


@pytest.mark.parametrize(
    ("quantization", "dtype", "tuning"),
    [
        ("nf4", "float32", {"rank": 4, "alpha": 64}),
        ("nf4", "bfloat16", {"rank": 4, "alpha": 16}),
        ("nf4", "float32", {"rank": 4, "alpha": 64, "initial": "loftq"}),
        ("int8", "float32", {"rank": 4, "alpha": 64, "dora": True}),
    ],
)
def test_what_is_merged_computes_what_was_tuned_on_few_bits(
    tmp_path: Path, backbone: Path, quantization: str, dtype: str, tuning: dict[str, Any]
) -> None:
    place = Place.make(tmp_path, backbone)
    run = run_of(place, model={"dtype": dtype, "quantization": quantization}, tuning=tuning)
    bench = Bench(plans.parse(run.plan_text), place.path / "backbone")
    assert any(isinstance(one, RoundedLinear) for one in bench.tuned.model.modules())
    with torch.no_grad():
        untuned = bench.tuned.model(input_ids=IDS).logits
        bench.load(run.load(2).adapter)
        wanted = bench.tuned.model(input_ids=IDS).logits
        export(run.path, tmp_path / "merged", merged=True)
        model = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        assert "quantization_config" not in model.config.to_dict()
        off = float((model(input_ids=IDS).logits - wanted).norm())
    moved = float((wanted - untuned).norm())
    # In bfloat16 a weight and its change are rounded once more, to 8 bits of their sum.
    assert off < (1e-4 if dtype == "float32" else moved / 8)
    assert moved > 0.5


def test_an_emulator_is_cut_from_what_the_bits_stand_for(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, write_backbone(tmp_path / "deep", layers=4))
    public = tmp_path / "public.txt"
    public.write_text("the cat sat on the mat and looked at the moon . " * 400, encoding="utf-8")
    run = run_of(
        place,
        public,
        model={"dtype": "float32", "quantization": "nf4"},
        delivery={"kind": "emulator", "first": 1, "last": 1},
        emulator={"select": "uniform", "blocks": 1},
        distillation={"steps": 2},
    )
    plan = plans.parse(run.plan_text)
    away, home = Bench(plan, Path(run.info.emulator or "")), Bench(plan, place.path / "backbone")
    few = {name for name, one in away.tuned.model.named_modules() if isinstance(one, RoundedLinear)}
    assert few
    assert not any(".layers.1." in name for name in few), "the stand-in is in its own format"
    for name in few:
        if ".layers.0." in name:
            one: Any = away.tuned.model.get_submodule(name)
            other: Any = home.tuned.model.get_submodule(name)
            assert torch.equal(one.packed, other.packed)
            assert torch.equal(one.scales, other.scales)
    export(run.path, tmp_path / "merged", merged=True)

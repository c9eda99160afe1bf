"""What other programs read: `peft` and transformers load what we export, and compute with it what we did."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import Place, Silent, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.export import export
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import Faults
from farfield.emulator.bench import Bench
from farfield.protocols.errors import BackboneError, RunError, TuningError

hf: Any = transformers  # whose constructors are untyped

# `peft` 0.21 asks the plain transformers model for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


IDS = torch.tensor([[5, 40, 41, 42, 43, 44, 45, 46], [90, 80, 70, 60, 50, 40, 30, 20]])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def trained(place: Place, **sections: dict[str, Any]) -> RunFolder:
    """A run whose adapter has moved far enough to be seen in the logits."""
    keys = {"training": {"rounds": 2, "steps": 2, "learning_rate": 0.05}} | sections
    plan = place.plan(**keys)
    result = simulate(Request(plan, data=place.path / "data", runs=place.path / "runs"), Silent())
    return RunFolder.open(result.folder)


@dataclass(frozen=True)
class Logits:
    """Of the adapter beside the backbone, as the clients compute them, and of the backbone alone."""

    ours: torch.Tensor
    untuned: torch.Tensor


def logits_of(run: RunFolder, place: Place) -> Logits:
    bench = Bench(plans.parse(run.plan_text), place.path / "backbone")
    with torch.no_grad():
        untuned = bench.tuned.model(input_ids=IDS).logits
        bench.load(run.load(run.rounds()[-1]).adapter)
        return Logits(bench.tuned.model(input_ids=IDS).logits, untuned)


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to rounding in float32: logits here are below 1, and sums of 64 products are taken in another order."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exported_computes_what_was_trained(tmp_path: Path, backbone: Path, dtype: str) -> None:
    place = Place.make(tmp_path, backbone)
    run = trained(place, model={"dtype": dtype}, tuning={"rank": 4, "alpha": 64})
    expected = logits_of(run, place)
    moved = float((expected.ours - expected.untuned).float().abs().max())
    assert moved > 0.1, "training must show by many times the tolerance, or equal logits show nothing"

    assert export(run.path, tmp_path / "adapter", merged=False) == 2
    assert export(run.path, tmp_path / "merged", merged=True) == 2
    kind = getattr(torch, dtype)
    with torch.no_grad():
        merged = loaded(tmp_path / "merged", kind)
        assert type(merged).__name__ == "LlamaForCausalLM"
        logits = merged(input_ids=IDS).logits
        for adapter in (run.adapter_folder, tmp_path / "adapter"):
            beside = peft.PeftModel.from_pretrained(loaded(backbone, kind), str(adapter), autocast_adapter_dtype=False)
            # The same numbers in the same order, so there is nothing to round apart.
            assert torch.equal(beside(input_ids=IDS).logits, expected.ours)
        if dtype == "float32":
            close(logits, expected.ours)
        else:
            # Merging rounds each weight W + s·B·A once more, to the same 8 bits to which every sum that it enters is
            # rounded anyway. So the merged model may be off from exact arithmetic as far as the unmerged one is, plus
            # as much again for the weights; twice that for the luck of the largest of thousands of logits.
            exact = beside.float()(input_ids=IDS).logits
            noise = float((expected.ours.float() - exact).abs().max())
            assert float((logits.float() - exact).abs().max()) < 4 * noise < moved / 2
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {kind}  # noqa: SIM118 - not a mapping
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(one) for one in (tmp_path / "merged", backbone))
    assert ours("the cat sat") == theirs("the cat sat")


def test_what_is_exported_names_no_path_of_this_machine(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    run = trained(place)
    export(run.path, tmp_path / "out" / "adapter", merged=False)
    export(run.path, tmp_path / "out" / "merged", merged=True)
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
        assert str(backbone) not in file.read_text(), file
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_run_that_was_stopped_is_exported_as_far_as_it_came(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    run = trained(place, training={"rounds": 3, "steps": 1})
    (run.path / "checkpoints" / "round-0003.safetensors").unlink()
    expected = logits_of(run, place)
    assert export(run.path, tmp_path / "merged", merged=True) == 2
    with torch.no_grad():
        close(loaded(tmp_path / "merged", torch.float32)(input_ids=IDS).logits, expected.ours)


def test_what_cannot_be_exported_is_said(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    run = trained(place)
    with pytest.raises(RunError, match="not a run folder"):
        export(tmp_path, tmp_path / "out", merged=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(RunError, match="exists and is not empty"):
            export(run.path, taken, merged=True)
    with pytest.raises(RunError, match="cannot be written: not a directory"):
        export(run.path, tmp_path / "full" / "file" / "out", merged=False)

    (tmp_path / "backbone").unlink()
    with pytest.raises(BackboneError, match="no such folder"):
        export(run.path, tmp_path / "out", merged=False)
    shutil.copytree(backbone, tmp_path / "backbone")
    config = tmp_path / "backbone" / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    with pytest.raises(RunError, match="the backbone has changed since this run"):
        export(run.path, tmp_path / "out", merged=False)
    for number in (1, 2):
        (run.path / "checkpoints" / f"round-000{number}.safetensors").unlink()
    with pytest.raises(RunError, match="no round has been finished yet"):
        export(run.path, tmp_path / "out", merged=False)
    assert not (tmp_path / "out").exists()


def test_a_prompt_cannot_be_merged(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    run = trained(place, tuning={"kind": "prompt-tuning", "rank": None, "tokens": 2})
    with pytest.raises(TuningError, match="nothing to fold"):
        export(run.path, tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()
    export(run.path, tmp_path / "adapter", merged=False)
    expected = logits_of(run, place)
    model = peft.PeftModel.from_pretrained(loaded(backbone, torch.float32), str(tmp_path / "adapter"))
    with torch.no_grad():
        close(model(input_ids=IDS).logits, expected.ours)


def test_a_run_without_a_counted_update_exports_the_start(tmp_path: Path, backbone: Path) -> None:
    place = Place.make(tmp_path, backbone)
    request = Request(place.plan(), data=place.path / "data", runs=place.path / "runs", faults=Faults(dropout=1.0))
    run = RunFolder.open(simulate(request, Silent()).folder)
    assert export(run.path, tmp_path / "merged", merged=True) == 3
    with torch.no_grad():
        close(loaded(tmp_path / "merged", torch.float32)(input_ids=IDS).logits, logits_of(run, place).untuned)

"""What an emulator's folder says of itself, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import built, plan_of, write_all
from safetensors.torch import load_file, save_file

from farfield.emulator import build as building
from farfield.emulator import bundle, stored
from farfield.emulator.architecture import describe
from farfield.emulator.inspection import inspected
from farfield.protocols.errors import BackboneError, EmulatorError

LOW_RANK = {"emulator": {"select": "clusters", "blocks": 2, "low_rank": 0.5, "quantization": "nf4"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_all(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def emulator(made: tuple[Path, Path]) -> Path:
    out = made[0].parent / "emulator"
    built(plan_of(**LOW_RANK), made[0], out, made[1])
    return out


def test_it_says_what_is_there(emulator: Path) -> None:
    found = inspected(emulator)
    model, record = stored.load(emulator, task="causal-lm", dtype="float32")
    manifest = bundle.describe(emulator, "emulator")
    assert (found.digest, found.bundle_bytes) == (manifest.digest, manifest.size)
    assert found.bundle_bytes == sum(file.stat().st_size for file in emulator.iterdir() if file.is_file())
    assert found.layout == record.layout
    assert len(found.layout.origins) == 6
    assert (found.plan, found.distilled, found.round) == (record.plan, record.distilled, 0)
    assert (found.architecture, found.dtype) == ("LlamaForCausalLM", "float32")
    assert found.ranks == (min(record.layout.ranks.values()), max(record.layout.ranks.values()))
    assert found.weight_bytes == building.all_bytes(model)
    assert found.weight_bytes == found.outer_bytes + found.stand_in_bytes + found.other_bytes
    blocks = describe(model).blocks
    trained = sum(one.numel() for number in (0, 5) for one in blocks[number].parameters())
    assert found.outer_bytes == 4 * trained
    assert found.full_state_bytes == 24 * trained
    assert found.other_bytes == 4 * (model.config.vocab_size * 2 * 32 + 32)
    document = json.loads(json.dumps(found.document()))
    assert document["origins"] == list(record.layout.origins)
    assert "estimated" in document["to_train"]["estimate"]


def test_parameters_are_those_that_the_model_computes_with(made: tuple[Path, Path], tmp_path: Path) -> None:
    """In 4 bits there are as many as in 32."""
    counts, sizes = [], []
    for number_format in ("none", "nf4"):
        out = tmp_path / number_format
        asked: dict[str, Any] = {"distillation": {"steps": 0}, "emulator": {"blocks": 2, "quantization": number_format}}
        built(plan_of(**asked), made[0], out, made[1])
        found = inspected(out)
        assert found.ranks is None
        counts.append(found.parameters)
        sizes.append(found.stand_in_bytes)
    model, _ = stored.load(tmp_path / "none", task="causal-lm", dtype="float32")
    assert counts == [sum(one.numel() for one in model.parameters())] * 2
    assert sizes[1] < sizes[0] / 6


def _record(folder: Path, **changed: Any) -> None:
    path = folder / "emulator.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = load_file(folder / stored.WEIGHTS)
    change(content)
    save_file(content, folder / stored.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "emulator.json").unlink(), r"there is no emulator\.json"),
        (lambda folder: (folder / "emulator.json").write_text("{"), "not the record of an emulator"),
        (lambda folder: _record(folder, distilled=-1), "not the record of an emulator: distilled"),
        (lambda folder: (folder / stored.WEIGHTS).write_bytes(b"\0" * 40), "no valid safetensors"),
        (lambda folder: _weights(folder, lambda held: held.update(more=torch.zeros(1))), "a tensor too many: 'more'"),
        (lambda folder: _weights(folder, lambda held: held.update({"model.norm.weight": torch.zeros(7)})), "of shape"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'), "config.json"),
    ],
)
def test_a_folder_that_is_not_right_is_refused(
    spoil: Callable[[Path], None], said: str, emulator: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(emulator, folder)
    inspected(folder)
    spoil(folder)
    with pytest.raises((EmulatorError, BackboneError), match=said) as caught:
        inspected(folder)
    assert "\n" not in str(caught.value)


def test_a_backbone_is_no_emulator(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match=r"there is no emulator\.json"):
        inspected(made[0])
    with pytest.raises(EmulatorError):
        inspected(tmp_path / "nothing")

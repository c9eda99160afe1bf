"""Full fine-tuning of blocks: which weights are trained, and what is written of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, deep, text
from safetensors.torch import load_file

from farfield.emulator.methods import Setting, Tuned, registered
from farfield.emulator.streams import run

FULL = registered()["full"].model_validate({"kind": "full"})
OUTER = (0, 4, 5)


def installed(family: str, blocks: tuple[int, ...] | None) -> Tuned:
    return FULL.install(deep(family), Setting(FAMILIES[family].task, 0, 1, blocks))


@pytest.mark.parametrize("blocks", [OUTER, None], ids=["outer", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_these_blocks_is_trained_and_a_classifiers_head(family: str, blocks: tuple[int, ...] | None) -> None:
    expected, model = FAMILIES[family], deep(family)
    inside = tuple(f"{expected.blocks}.{number}." for number in (range(6) if blocks is None else blocks))
    head = tuple(f"{path}." for path in expected.head) if expected.task == "sequence-classification" else ()
    wanted = {name for name, _ in model.named_parameters() if name.startswith(inside + head)}
    assert set(installed(family, blocks).trainable()) == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_written_is_what_is_trained_and_nothing_else(family: str, tmp_path: Path) -> None:
    tuned = installed(family, OUTER)
    for parameter in tuned.trainable().values():
        parameter.data.add_(0.1)
    FULL.save(tuned, tmp_path / "adapter")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["trained.safetensors"]
    held = load_file(tmp_path / "adapter" / "trained.safetensors")
    assert held.keys() == tuned.trainable().keys()
    plain = deep(family)
    plain.load_state_dict(plain.state_dict() | held)
    assert torch.equal(run(plain, text(family)).logits, run(tuned.model, text(family)).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merged_it_is_the_model_itself(family: str) -> None:
    tuned = installed(family, OUTER)
    merged = FULL.merge(tuned)
    assert merged is tuned.model
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_it_adds_up_exactly_and_can_be_kept_to_blocks() -> None:
    assert FULL.sharing.exact
    assert FULL.by_block
    assert not FULL.by_example

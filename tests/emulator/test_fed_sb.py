"""Fed-SB against its equation, and what `peft` makes of what it saves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, batch, build
from safetensors.torch import load_file
from test_methods import logits, method_of
from torch.nn import functional

from farfield.emulator.methods import Setting, Tuned
from farfield.emulator.methods.fed_sb import _subspaces
from farfield.protocols.errors import TuningError

RANK = 8

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def moved(family: str, dtype: torch.dtype = torch.float32) -> Tuned:
    """Installed, with every R drawn at random."""
    tuned = method_of("fed-sb", rank=RANK).install(build(family, dtype), Setting(FAMILIES[family].task, 5, None))
    tuned.model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if ".core." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / RANK)
    return tuned


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_target_computes_its_equation(family: str) -> None:
    tuned = moved(family)
    layers: list[Any] = [module for module in tuned.model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 2 * len(FAMILIES[family].linears)
    for layer in layers:
        base, a = layer.get_base_layer(), layer.lora_A["default"].weight
        r, b = (part.weight for part in layer.lora_B["default"])
        weight = base.weight.T if family == "gpt2" else base.weight
        assert (a.shape, r.shape, b.shape) == ((RANK, weight.shape[1]), (RANK, RANK), (weight.shape[0], RANK))
        x = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = functional.linear(x, weight + b @ r @ a, base.bias)
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
            assert float((expected - base(x)).abs().max()) > 0.01


def test_the_frozen_factors_are_orthonormal_and_unlike_each_other() -> None:
    seen = []
    modules: Iterable[Any] = moved("llama").model.modules()
    for module in modules:
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].basis.weight
            for basis in (a, b.T):
                # Values are below 1 and rounded to 8 bits.
                torch.testing.assert_close(basis @ basis.T, torch.eye(RANK), rtol=0, atol=0.02)
                seen.append(basis)
    assert len({tuple(one.flatten().tolist()) for one in seen}) == len(seen) == 28


def test_the_frozen_factors_have_8_bits_so_that_a_processors_last_ones_are_not_seen() -> None:
    for name, parameter in moved("llama").model.named_parameters():
        if ".basis." in name or ".lora_A." in name:
            assert torch.equal(parameter, parameter.bfloat16().float())
    weight = torch.randn(96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = 1e-15 * torch.randn(96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for one, other in zip(_subspaces(weight, 16, 3), _subspaces(weight + noise, 16, 3), strict=True):
        assert torch.equal(one, other)


def test_the_frozen_factors_span_what_the_weight_does_most() -> None:
    """A matrix with RANK large singular values: what is left of it outside the two spaces is small."""
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64, generator=generator))[0] for n in (96, 64))
    weight = left @ torch.diag(torch.tensor([1.0] * RANK + [0.05] * (40 - RANK), dtype=torch.float64)) @ right.T
    rows, columns = (basis.double() for basis in _subspaces(weight, RANK, 3))
    assert torch.linalg.matrix_norm(weight - columns @ columns.T @ weight, 2) < 0.1
    assert torch.linalg.matrix_norm(weight - weight @ rows @ rows.T, 2) < 0.1


def test_a_weight_of_zeros_has_bases_too() -> None:
    for basis in _subspaces(torch.zeros(12, 10), 4, 3):
        torch.testing.assert_close(basis.float().T @ basis.float(), torch.eye(4), rtol=0, atol=0.02)


def test_what_is_trained_is_one_linear_layer_per_target_from_zero() -> None:
    tuned = method_of("fed-sb", rank=RANK).install(build("llama"), Setting("causal-lm", 5, None))
    owners = dict(tuned.model.named_modules())
    for name, parameter in tuned.trainable().items():
        owner = owners[name.removesuffix(".weight")]
        assert type(owner) is torch.nn.Linear
        assert owner.bias is None
        assert parameter.shape == (RANK, RANK)
        assert not parameter.any()
    torch.testing.assert_close(logits(tuned.model.eval(), "llama"), logits(build("llama"), "llama"))


def test_saving_leaves_the_model_as_it_was_and_writes_a_plain_lora(tmp_path: Path) -> None:
    tuned, method = moved("llama"), method_of("fed-sb", rank=RANK)
    before, names = logits(tuned.model, "llama"), sorted(tuned.trainable())
    method.save(tuned, tmp_path)
    assert sorted(tuned.trainable()) == names
    assert torch.equal(logits(tuned.model, "llama"), before)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".lora_")[1] for name in saved} == {"A.weight", "B.weight"}
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha) == (RANK, RANK)


def test_saving_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    tuned = moved("llama")
    before = logits(tuned.model, "llama")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"exists|directory"):
        method_of("fed-sb", rank=RANK).save(tuned, tmp_path / "file")
    assert torch.equal(logits(tuned.model, "llama"), before)
    tuned.model(**batch("llama")).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tuned.trainable().values())


def test_a_rank_that_a_layer_cannot_hold_is_refused() -> None:
    with pytest.raises(TuningError, match=r"k_proj: this layer maps 32 features to 16, which cannot hold rank 17"):
        method_of("fed-sb", rank=17).install(build("llama"), Setting("causal-lm", 5, None))

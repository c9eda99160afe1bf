"""SSF against its equation, layer by layer, and folded into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, batch, build, deep
from test_methods import logits, method_of

from farfield.emulator.adapters import Scaled
from farfield.emulator.architecture import describe
from farfield.emulator.methods import Setting, Tuned
from farfield.emulator.methods.own import restore
from farfield.protocols.errors import TuningError


def installed(family: str, *, moved: bool = True, **settings: Any) -> Tuned:
    """Installed, and with `moved` every scale and shift drawn at random, near where it begins."""
    tuned = method_of("ssf", **settings).install(build(family), Setting(FAMILIES[family].task, 5, None))
    tuned.model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trainable().values() if moved else ():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "bert"])
def test_every_layer_computes_its_equation(family: str) -> None:
    tuned, plain, architecture = installed(family), build(family), describe(build(family))
    values, generator = tuned.trainable(), torch.Generator().manual_seed(2)
    paths = {linear.path: linear.in_features for linear in architecture.linears}
    paths |= dict.fromkeys(architecture.norms(), architecture.hidden_size)
    assert {path for path, module in tuned.model.named_modules() if isinstance(module, Scaled)} == set(paths)
    for path, width in paths.items():
        x = torch.randn(3, 5, width, generator=generator)
        with torch.no_grad():
            expected = values[f"{path}.scale"] * plain.get_submodule(path)(x) + values[f"{path}.shift"]
            torch.testing.assert_close(tuned.model.get_submodule(path)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_begins_as_it_is(family: str) -> None:
    tuned = installed(family, moved=False)
    assert torch.equal(logits(tuned.model, family), logits(build(family), family))


def test_the_gradients_are_the_sums_that_the_equation_gives() -> None:
    layer = torch.nn.Linear(6, 4).double().requires_grad_(False)
    scaled = Scaled(layer, 4, shift=True, transposed=False).double()
    x, pull = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    (scaled(x) * pull).sum().backward()
    assert scaled.shift is not None
    torch.testing.assert_close(scaled.scale.grad, (pull * layer(x)).sum((0, 1)))
    torch.testing.assert_close(scaled.shift.grad, pull.sum((0, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_shifts_where_there_are_biases_every_model_can_be_merged(family: str) -> None:
    tuned = installed(family, shift="with-bias")
    before = logits(tuned.model, family)
    biased = {linear.path for linear in describe(build(family)).linears if linear.bias}
    shifted = {name.removesuffix(".shift") for name in tuned.trainable() if name.endswith(".shift")}
    assert {path for path in shifted if "norm" not in path.lower() and ".ln_" not in path} == biased
    merged = method_of("ssf", shift="with-bias").merge(tuned)
    assert merged.state_dict().keys() == build(family).state_dict().keys()
    assert not any(isinstance(module, Scaled) for module in merged.modules())
    torch.testing.assert_close(logits(merged, family), before, rtol=0, atol=1e-5)
    assert not torch.allclose(before, logits(build(family), family), atol=0.1)


@pytest.mark.parametrize(("family", "from_one"), [("gemma", 1), ("llama", 0)])
def test_a_norm_that_counts_from_one_keeps_doing_so(family: str, from_one: int) -> None:
    path = "model.layers.1.input_layernorm"
    tuned = installed(family, shift="with-bias")
    scale = tuned.trainable()[f"{path}.scale"].detach().clone()
    old: Any = build(family).get_submodule(path)
    new: Any = method_of("ssf").merge(tuned).get_submodule(path)
    torch.testing.assert_close(new.weight, (from_one + old.weight) * scale - from_one)


def test_a_shift_that_has_no_place_is_refused_and_the_model_stays_as_it_is() -> None:
    tuned = installed("qwen2")
    before, names = logits(tuned.model, "qwen2"), sorted(tuned.trainable())
    with pytest.raises(TuningError, match=r"no bias here.*with-bias"):
        method_of("ssf").merge(tuned)
    assert sorted(tuned.trainable()) == names
    assert torch.equal(logits(tuned.model, "qwen2"), before)
    for name, parameter in tuned.trainable().items():
        if name.endswith(".shift"):
            parameter.data.zero_()
    before = logits(tuned.model, "qwen2")
    torch.testing.assert_close(logits(method_of("ssf").merge(tuned), "qwen2"), before, rtol=0, atol=1e-5)


def test_targets_norms_and_blocks_are_those_asked_for() -> None:
    method = method_of("ssf", targets=["up_proj"], norms=False, shift="with-bias")
    tuned = method.install(deep("llama"), Setting("causal-lm", 5, None, (0, 5)))
    assert set(tuned.trainable()) == {f"model.layers.{number}.mlp.up_proj.scale" for number in (0, 5)}
    tuned = method_of("ssf").install(deep("llama"), Setting("causal-lm", 5, None, (0, 5)))
    assert {name.split(".")[2] for name in tuned.trainable()} == {"0", "5"}
    assert "model.layers.5.input_layernorm.scale" in tuned.trainable()


def test_it_learns() -> None:
    tuned = installed("llama", moved=False)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = tuned.model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_what_is_saved_can_be_installed_again(tmp_path: Path) -> None:
    tuned = installed("llama", shift="with-bias")
    method_of("ssf", shift="with-bias").save(tuned, tmp_path)
    again = restore(tmp_path, build("llama"), Setting("causal-lm", 9, None))
    again.model.eval()
    assert torch.equal(logits(again.model, "llama"), logits(tuned.model, "llama"))

"""LoRA-FA against its equation, and against `peft`'s optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batch, build, deep
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.tuners.lora import LoraLayer
from test_methods import method_of

from farfield.emulator.frozen_factor import FrozenFactor
from farfield.emulator.methods import Setting, Tuned
from farfield.protocols.sections import Training

RANK, ALPHA = 4, 12
RATE = 0.01
TRAINING = Training(rounds=1, steps=1, learning_rate=RATE)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def installed(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Tuned:
    method = method_of("lora-fa", rank=RANK, alpha=ALPHA, **settings)
    task = "sequence-classification" if family == "bert" else "causal-lm"
    return method.install(build(family, dtype), Setting(task, 5, None))


def masters(tuned: Tuned) -> dict[str, torch.Tensor]:
    """float32 values behind what is trained, each with a gradient."""
    generator = torch.Generator().manual_seed(2)
    values = {name: one.detach().float().clone() for name, one in tuned.trainable().items()}
    for value in values.values():
        value.grad = torch.randn(value.shape, generator=generator)
    return values


def factor(tuned: Tuned, name: str) -> torch.Tensor:
    """A beside the B of this name."""
    return dict(tuned.model.named_parameters())[name.replace(".lora_B.", ".lora_A.")].detach()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_the_gradient_of_b_is_corrected_by_the_equation(family: str, dtype: torch.dtype, rslora: bool) -> None:
    tuned = installed(family, dtype, rslora=rslora)
    assert tuned.optimizer is not None
    values = masters(tuned)
    raw = {name: value.grad.double().clone() for name, value in values.items() if value.grad is not None}
    tuned.optimizer(TRAINING, values).step()
    s = ALPHA / (RANK**0.5 if rslora else RANK)
    for name, value in values.items():
        a = factor(tuned, name).double()
        expected = raw[name] @ torch.linalg.inv(a @ a.T) / s**2
        assert value.grad is not None
        torch.testing.assert_close(value.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_corrected_step_is_the_gradient_of_the_matrix_as_far_as_a_reaches() -> None:
    """What the equation is for: s·g_B·A is the projection of W's gradient G onto the rows of A."""
    tuned = installed()
    assert tuned.optimizer is not None
    values, s = masters(tuned), ALPHA / RANK
    whole = {}
    for name, value in values.items():
        a = factor(tuned, name)
        whole[name] = torch.randn(len(value), a.shape[1], generator=torch.Generator().manual_seed(3))
        value.grad = s * whole[name] @ a.T
    tuned.optimizer(TRAINING, values).step()
    for name, value in values.items():
        a = factor(tuned, name)
        projection = torch.linalg.pinv(a) @ a
        assert value.grad is not None
        torch.testing.assert_close(s * value.grad @ a, whole[name] @ projection, rtol=0, atol=1e-4)


def test_it_is_what_pefts_optimizer_does_but_for_its_bfloat16() -> None:
    tuned = installed()
    assert tuned.optimizer is not None
    ours = masters(tuned)
    theirs = {name: value.clone() for name, value in ours.items()}
    exact = {name: value.double() for name, value in ours.items()}
    optimizer, adam = tuned.optimizer(TRAINING, ours), torch.optim.AdamW(exact.values(), lr=RATE, weight_decay=0)
    groups: Any = [
        {
            "params": [factor(tuned, name), value],
            "names": [name.replace(".lora_B.", ".lora_A."), name],
            "scaling_factors": [ALPHA / RANK] * 2,
        }
        for name, value in theirs.items()
    ]
    peft_optimizer = LoraFAOptimizer(groups, lr=RATE)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
            a = factor(tuned, name).double()
            exact[name].grad = gradient.double() @ torch.linalg.inv(a @ a.T) / (ALPHA / RANK) ** 2
        optimizer.step()
        peft_optimizer.step()
        adam.step()

    def off(values: dict[str, torch.Tensor]) -> float:
        return max(float((values[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert off(ours) < 1e-5
    assert 1e-2 < off(theirs) < 0.1


def test_a_head_has_the_optimiser_as_it_is() -> None:
    tuned = installed("bert")
    assert tuned.optimizer is not None
    values = masters(tuned)
    raw = {name: value.grad for name, value in values.items()}
    tuned.optimizer(TRAINING, values).step()
    kept = {name for name, value in values.items() if value.grad is raw[name]}
    assert kept == {name for name in values if "modules_to_save" in name}
    assert kept


def test_names_may_be_those_of_a_backbone_with_more_blocks() -> None:
    def named(name: str) -> str:
        return name.replace("layers.1.", "layers.7.")

    tuned = method_of("lora-fa", rank=RANK).install(build("llama"), Setting("causal-lm", 5, None, named=named))
    assert tuned.optimizer is not None
    values = {named(name): value for name, value in masters(tuned).items()}
    raw = {name: value.grad for name, value in values.items()}
    tuned.optimizer(TRAINING, values).step()
    assert any(".layers.7." in name for name in values)
    assert not any(value.grad is raw[name] for name, value in values.items())


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "adafactor"])
def test_every_optimiser_that_it_allows_takes_a_step(kind: Any) -> None:
    tuned = installed()
    assert tuned.optimizer is not None
    values = masters(tuned)
    before = {name: value.clone() for name, value in values.items()}
    tuned.optimizer(Training(rounds=1, steps=1, optimizer=kind), values).step()
    assert all(not torch.equal(value, before[name]) for name, value in values.items())


def kept(tuned: Tuned) -> int:
    """Bytes that autograd keeps between forward and backward, but for the model's own."""
    own = {one.untyped_storage().data_ptr() for one in [*tuned.model.parameters(), *tuned.model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = tuned.model(**batch("llama"), use_cache=False).loss
    assert out.requires_grad
    return sum(sizes.values())


def test_it_keeps_no_input_of_a_layer() -> None:
    setting = Setting("causal-lm", 5, None)
    lora, fa = (method_of(kind, rank=2).install(deep("llama", 6), setting) for kind in ("lora", "lora-fa"))
    assert kept(fa) < 0.85 * kept(lora)


def test_it_trains_the_tensors_of_lora_with_a_frozen_and_adds_up_exactly() -> None:
    frozen = method_of("lora", rank=RANK, freeze_a=True)
    method = method_of("lora-fa", rank=RANK)
    assert method.sharing == frozen.sharing
    assert method.adapter_of == frozen.adapter_of
    theirs = frozen.install(build("llama"), Setting("causal-lm", 5, None))
    ours = installed()
    assert ours.trainable().keys() == theirs.trainable().keys()
    for name in ours.trainable():
        assert torch.equal(factor(ours, name), factor(theirs, name))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_layers_that_add_in_place_compute_and_learn_what_pefts_own_do(family: str, dropout: float) -> None:
    tuned = installed(family, dropout=dropout)
    generator = torch.Generator().manual_seed(6)
    for parameter in tuned.trainable().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    layers = [module for module in tuned.model.modules() if isinstance(module, LoraLayer)]
    assert layers
    assert all(isinstance(layer.lora_variant["default"], FrozenFactor) for layer in layers)

    def results() -> list[torch.Tensor]:
        tuned.model.train()
        tuned.model.zero_grad()
        torch.manual_seed(7)
        loss = tuned.model(**batch(family)).loss
        loss.backward()
        gradients = [one.grad.clone() for one in tuned.trainable().values() if one.grad is not None]
        assert len(gradients) == len(tuned.trainable())
        return [loss.detach(), *gradients]

    ours = results()
    for layer in layers:
        layer.lora_variant.clear()
    for one, other in zip(ours, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

"""MEFT: the equations on real models, what it keeps, and what it says where it cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, batch, build, deep, text
from test_methods import logits, method_of

from farfield.emulator.architecture import checkpoint_blocks, describe
from farfield.emulator.head import off, plain_head
from farfield.emulator.methods import Setting, Tuned
from farfield.kernels import reversible
from farfield.protocols.errors import TuningError

SOME = ("llama", "gpt2", "bloom", "bert", "distilbert", "vit")
"""Norm before and after, a stream that comes alone or in a tuple, arguments by place and by name, no text."""


class InFloatingPoint:
    """A `Pass` that is not reversible: the same equations, whose streams autograd keeps."""

    def __init__(self, hidden: torch.Tensor, bits: int, unlike: Exception) -> None:
        self.side = self.stream = hidden.double()
        self.scale, self.dtype, self.main = 2.0**-bits, hidden.dtype, hidden

    def through(self, f: Any, g: Any, parameters: Any = ()) -> torch.Tensor:
        new = self.scale * (self.side - self.stream) + f(self.stream.to(self.dtype))
        self.side = self.stream if g is None else self.stream + g(new.to(self.dtype))
        self.stream, self.main = new, new.to(self.dtype)
        return self.main

    def end(self) -> torch.Tensor:
        return self.main


def moved(
    family: str, depth: int, dtype: torch.dtype = torch.float32, blocks: tuple[int, ...] | None = None, **settings: Any
) -> Tuned:
    """Installed in a model of so many blocks, with adapters that do something."""
    method = method_of("meft", rank=4, **settings)
    model: Any = deep(family, depth)
    tuned = method.install(model.to(dtype), Setting(FAMILIES[family].task, 5, None, blocks))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if ".adapter." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tuned


def gradients(tuned: Tuned, family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)  # for dropout
    tuned.model(**batch(family, dtype)).loss.backward()
    found = {name: one.grad for name, one in tuned.trainable().items()}
    for parameter in tuned.trainable().values():
        parameter.grad = None
    return {name: one.double() for name, one in found.items() if one is not None}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Does something with the streams in floating point."""

    def do(something: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reversible, "Pass", InFloatingPoint)
            return something()

    return do


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("depth", [12, 24])
def test_gradients_are_those_of_autograd_however_deep(depth: int, bits: int, plainly: Any) -> None:
    tuned = moved("llama", depth, bits=bits)
    expected = plainly(lambda: gradients(tuned, "llama"))
    assert len(expected) == 2 * depth
    assert apart(gradients(tuned, "llama"), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_its_blocks_what_they_need_both_times(family: str, plainly: Any) -> None:
    tuned = moved(family, 3)
    expected = plainly(lambda: gradients(tuned, family))
    assert expected.keys() == tuned.trainable().keys()
    assert apart(gradients(tuned, family), expected) < 1e-4


def test_bfloat16_is_off_by_no_more_than_its_own_noise(plainly: Any) -> None:
    tuned = moved("llama", 12, torch.bfloat16)
    exact = gradients(moved("llama", 12), "llama")
    ours = gradients(tuned, "llama", torch.bfloat16)
    plain = plainly(lambda: gradients(tuned, "llama", torch.bfloat16))
    assert apart(ours, exact) < 1.5 * apart(plain, exact)
    assert apart(ours, exact) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dropout_drops_the_same_when_a_block_is_computed_again(family: str, plainly: Any) -> None:
    tuned = moved(family, 3)
    for module in tuned.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    tuned.model.train()
    before = torch.get_rng_state()
    expected = plainly(lambda: gradients(tuned, family))
    assert apart(gradients(tuned, family), expected) < 1e-4
    tuned.model.eval()
    assert apart(gradients(tuned, family), expected) > 1e-2, "nothing was dropped"
    torch.set_rng_state(before)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", SOME)
def test_it_starts_as_near_to_the_pretrained_function_as_its_bits_say(family: str, bits: int) -> None:
    """The blocks of these models are random and change more than they leave; those of trained ones change little."""
    tuned = method_of("meft", bits=bits).install(deep(family), Setting(FAMILIES[family].task, 5, None))
    plain = logits(deep(family), family)
    distance = float((logits(tuned.model, family) - plain).norm() / plain.std() / plain.numel() ** 0.5)
    assert 0 < distance < 3 * 2.0**-bits


@pytest.mark.parametrize("family", SOME)
def test_one_block_starts_at_the_pretrained_function_itself(family: str) -> None:
    tuned = method_of("meft").install(deep(family, 1), Setting(FAMILIES[family].task, 5, None))
    torch.testing.assert_close(logits(tuned.model, family), logits(deep(family, 1), family), rtol=0, atol=1e-6)


def test_adapters_are_in_the_tuned_blocks_only_and_work_there(plainly: Any) -> None:
    tuned = moved("llama", 6, blocks=(0, 4, 5))
    assert {name.split(".")[2] for name in tuned.trainable()} == {"0", "4", "5"}
    expected = plainly(lambda: gradients(tuned, "llama"))
    assert apart(gradients(tuned, "llama"), expected) < 1e-4


def test_a_block_that_stands_in_two_places_is_computed_in_both(plainly: Any) -> None:
    model: Any = deep("llama", 5)
    model.model.layers[3] = model.model.layers[2]
    tuned = method_of("meft", rank=4).install(model, Setting("causal-lm", 5, None, (0, 1, 4)))
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1)
    expected = plainly(lambda: gradients(tuned, "llama"))
    assert apart(gradients(tuned, "llama"), expected) < 1e-4


def kept(tuned: Tuned, family: str) -> int:
    """Bytes that autograd keeps between forward and backward, but for the model's own."""
    own = {one.untyped_storage().data_ptr() for one in [*tuned.model.parameters(), *tuned.model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = tuned.model(**text(family), use_cache=False).logits
    assert out.requires_grad
    return sum(sizes.values())


def test_a_block_more_costs_its_bits_and_no_activation() -> None:
    values = batch("llama")["input_ids"].numel() * describe(build("llama")).hidden_size
    of_12, of_24 = (kept(moved("llama", depth), "llama") for depth in (12, 24))
    assert of_24 - of_12 == 12 * values * 4 // 8
    lora = method_of("lora", rank=4).install(deep("llama", 12), Setting("causal-lm", 5, None))
    assert kept(lora, "llama") > 20 * of_12


def test_checkpointing_beside_it_changes_nothing() -> None:
    tuned = moved("llama", 3)
    expected = gradients(tuned, "llama")
    model: Any = tuned.model
    checkpoint_blocks(model)
    tuned.model.train()
    assert apart(gradients(tuned, "llama"), expected) == 0


def test_generation_uses_its_cache() -> None:
    model: Any = moved("llama", 3).model
    ids = batch("llama")["input_ids"][:2]
    with torch.no_grad():
        ahead = model(input_ids=ids[:, :5], use_cache=True)
        last = model(input_ids=ids[:, 5:], past_key_values=ahead.past_key_values, use_cache=True).logits
        torch.testing.assert_close(last, model(input_ids=ids).logits[:, 5:], rtol=0, atol=1e-4)


def test_the_head_stays_plain() -> None:
    tuned = moved("llama", 3)
    head: Any = plain_head(tuned.model)
    assert head is not None
    whole = tuned.model(**text("llama")).logits
    with off(head):
        hidden = tuned.model(**text("llama")).logits
    assert torch.equal(head(hidden), whole)


def test_a_model_that_leaves_blocks_out_is_refused() -> None:
    hf: Any = transformers
    config = deep("opt", 2).config
    config.layerdrop = 0.1
    with pytest.raises(TuningError, match="leaves blocks out at random"):
        method_of("meft").install(hf.OPTForCausalLM(config), Setting("causal-lm", 5, None))


def test_a_model_that_changes_its_stream_between_blocks_is_refused() -> None:
    model: Any = deep("llama", 3)
    tuned = method_of("meft").install(model, Setting("causal-lm", 5, None))
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(TuningError, match="between its blocks"):
        tuned.model(**batch("llama"))


def test_a_block_that_does_not_compute_the_same_twice_ends_training() -> None:
    tuned = moved("llama", 3)
    model: Any = tuned.model
    calls: list[int] = []

    def moody(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return out * (1 + 1e-3 * len(calls))

    model.model.layers[1].mlp.register_forward_hook(moody)
    with pytest.raises(TuningError, match="something else when it was computed again"):
        gradients(tuned, "llama")

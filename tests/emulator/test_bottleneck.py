"""Bottleneck adapters against their equation, written out in the blocks that they are in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, HIDDEN, batch, build, deep
from test_methods import logits, method_of

from farfield.emulator.adapters import Bottleneck
from farfield.emulator.architecture import checkpoint_blocks, describe
from farfield.emulator.methods import Setting, Tuned
from farfield.emulator.methods.own import restore
from farfield.protocols.errors import TuningError

hf: Any = transformers
WIDTH, SCALE = 4, 1.7
PLACEMENTS = ["serial", "parallel"]
Adapt = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def installed(family: str, *, seed: int = 5, moved: bool = True, model: Any = None, **settings: Any) -> Tuned:
    """Installed, and with `moved` every adapter's values drawn at random."""
    method = method_of("bottleneck", **{"width": WIDTH, "scale": SCALE, **settings})
    tuned = method.install(model or build(family), Setting(FAMILIES[family].task, seed, None))
    tuned.model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if moved and ".adapter." in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return tuned


def of_llama(block: Any, h: torch.Tensor, kept: dict[str, Any], adapt: Adapt) -> torch.Tensor:
    x = block.input_layernorm(h)
    h = h + adapt("self_attn.o_proj", x, block.self_attn(hidden_states=x, **kept)[0])
    x = block.post_attention_layernorm(h)
    return torch.add(h, adapt("mlp.down_proj", x, block.mlp(x)))


def of_gpt2(block: Any, h: torch.Tensor, kept: dict[str, Any], adapt: Adapt) -> torch.Tensor:
    x = block.ln_1(h)
    h = h + adapt("attn.c_proj", x, block.attn(x, **kept)[0])
    x = block.ln_2(h)
    return torch.add(h, adapt("mlp.c_proj", x, block.mlp(x)))


def of_bert(block: Any, h: torch.Tensor, kept: dict[str, Any], adapt: Adapt) -> torch.Tensor:
    one, two = block.attention.output, block.output
    attended = one.dense(block.attention.self(h, **kept)[0])
    h = one.LayerNorm(adapt("attention.output.dense", h, attended) + h)
    normed: torch.Tensor = two.LayerNorm(adapt("output.dense", h, two.dense(block.intermediate(h))) + h)
    return normed


BY_HAND = {"llama": of_llama, "gpt2": of_gpt2, "bert": of_bert}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", BY_HAND)
def test_a_block_computes_its_equation(family: str, placement: str) -> None:
    tuned = installed(family, placement=placement)
    path = FAMILIES[family].blocks + ".0"
    seen: dict[str, Any] = {}
    tuned.model.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, output: seen.update(h=args[0], kept=kwargs, more=args[1:], output=output),
        with_kwargs=True,
    )
    logits(tuned.model, family)
    values = dict(tuned.trainable())

    def adapt(name: str, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        d, a, u, b = (
            values[f"{path}.{name}.adapter.{one}"] for one in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        assert d.shape == (WIDTH, HIDDEN)
        read = left if placement == "serial" else entered
        return left + SCALE * ((read @ d.T + a).clamp(min=0) @ u.T + b)

    kept = {key: value for key, value in seen["kept"].items() if key not in ("past_key_values", "use_cache")}
    if family == "bert" and seen["more"]:
        kept["attention_mask"] = seen["more"][0]
    elif family == "gpt2":
        kept |= dict(zip(("past_key_values", "attention_mask"), seen["more"], strict=False)) | {"past_key_values": None}
    with torch.no_grad():
        expected = BY_HAND[family](build(family).get_submodule(path), seen["h"], kept, adapt)
    output = seen["output"][0] if isinstance(seen["output"], tuple) else seen["output"]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tuned.model, family), logits(build(family), family), atol=0.1)


def test_the_gradients_are_those_of_its_differences() -> None:
    adapter = Bottleneck(6, 3, SCALE, torch.Generator().manual_seed(1)).double()
    names = [name for name, _ in adapter.named_parameters()]
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 5, 6), *(tuple(one.shape) for one in adapter.parameters())]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.func.functional_call(adapter, dict(zip(names, parameters, strict=True)), x)
        return made

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_begins_as_it_is(family: str, placement: str) -> None:
    tuned = installed(family, placement=placement, moved=False)
    assert torch.equal(logits(tuned.model, family), logits(build(family), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_for_each_sublayer_or_for_each_feedforward_network(family: str) -> None:
    sublayers = describe(build(family)).sublayers()
    for after, parts in (("both", {"attention", "feedforward"}), ("feedforward", {"feedforward"})):
        named = {
            name.partition(".adapter.")[0] for name in installed(family, after=after).trainable() if ".adapter." in name
        }
        assert named == {one.exit for one in sublayers if one.part in parts}


def test_nothing_is_kept_or_computed_backwards_for_the_blocks_that_have_none() -> None:
    tuned = installed("llama", model=deep("llama"), drop=4)
    assert {name.split(".")[2] for name in tuned.trainable()} == {"4", "5"}
    entered = []
    for number in range(6):
        block: Any = tuned.model.get_submodule(f"model.layers.{number}")
        block.register_forward_hook(
            lambda _, args, output: entered.append((args[0].requires_grad, output.requires_grad))
        )
    tuned.model(**batch("llama"))
    assert entered == [(False, False)] * 4 + [(False, True), (True, True)]


def test_of_tuned_blocks_the_first_are_dropped_and_others_stay_as_they_are() -> None:
    method = method_of("bottleneck", width=WIDTH, drop=1)
    tuned = method.install(deep("llama"), Setting("causal-lm", 5, None, (0, 4, 5)))
    assert {name.split(".")[2] for name in tuned.trainable()} == {"4", "5"}
    with pytest.raises(TuningError, match=r"tuning\.drop: without the first 3 of 3 blocks"):
        method_of("bottleneck", drop=3).install(deep("llama"), Setting("causal-lm", 5, None, (0, 4, 5)))


def test_what_is_drawn_goes_by_the_names_of_the_backbone() -> None:
    whole = installed("llama", moved=False, model=deep("llama")).trainable()
    setting = Setting("causal-lm", 5, None, (1,), lambda name: name.replace("layers.1", "layers.5"))
    part = method_of("bottleneck", width=WIDTH).install(build("llama"), setting).trainable()
    name = "mlp.down_proj.adapter.down.weight"
    drawn = part[f"model.layers.1.{name}"].detach()
    assert torch.equal(drawn, whole[f"model.layers.5.{name}"])
    assert not torch.equal(whole[f"model.layers.1.{name}"], whole[f"model.layers.5.{name}"])
    assert float(drawn.abs().max()) <= HIDDEN**-0.5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointed_it_has_the_same_gradients(placement: str) -> None:
    found = []
    for checkpointing in (False, True):
        tuned = installed("llama", placement=placement)
        if checkpointing:
            checkpoint_blocks(tuned.model)  # type: ignore[arg-type]
        tuned.model.train()
        tuned.model(**batch("llama"), use_cache=False).loss.backward()
        found.append({name: one.grad for name, one in tuned.trainable().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # type: ignore[arg-type]
    assert all(one is not None and one.any() for one in found[0].values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_copy_of_the_model_has_adapters_of_its_own(placement: str) -> None:
    tuned = installed("llama", placement=placement)
    before, other = logits(tuned.model, "llama"), copy.deepcopy(tuned.model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".adapter." in name:
                parameter.zero_()
    assert torch.equal(logits(other, "llama"), logits(build("llama"), "llama"))
    assert torch.equal(logits(tuned.model, "llama"), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_learns(placement: str) -> None:
    tuned = installed("llama", placement=placement, moved=False)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = tuned.model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_saved_can_be_installed_again(placement: str, tmp_path: Path) -> None:
    tuned = installed("bert", placement=placement)
    method_of("bottleneck", width=WIDTH, scale=SCALE, placement=placement).save(tuned, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["method.json", "trained.safetensors"]
    again = restore(tmp_path, build("bert"), Setting("sequence-classification", 9, None))
    again.model.eval()
    assert torch.equal(logits(again.model, "bert"), logits(tuned.model, "bert"))
    with pytest.raises(TuningError, match="not trained in this model"):
        restore(tmp_path, deep("bert"), Setting("sequence-classification", 9, None))
    (tmp_path / "method.json").write_text('{"kind": "unheard-of"}')
    with pytest.raises(TuningError, match="no saved tuning method could be read"):
        restore(tmp_path, build("bert"), Setting("sequence-classification", 9, None))


def test_a_mixture_of_experts_is_refused() -> None:
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    with pytest.raises(
        TuningError, match=r"model\.layers\.0: attention and a feed-forward network were not both found"
    ):
        installed("llama", model=model)

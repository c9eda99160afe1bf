"""Ladder side-tuning against its equations, what it keeps for the gradients, and what it leaves to its backbone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import FAMILIES, HIDDEN, LAYERS, VOCABULARY, batch, build, deep
from test_methods import logits, method_of

from farfield.emulator.architecture import checkpoint_blocks, describe
from farfield.emulator.head import off, plain_head
from farfield.emulator.methods import Setting, Tuned
from farfield.emulator.methods.own import restore
from farfield.emulator.streams import all_after
from farfield.protocols.errors import TuningError

hf: Any = transformers
REDUCTION = 4
NARROW = HIDDEN // REDUCTION
DECODERS = [name for name, family in FAMILIES.items() if family.task == "causal-lm"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def installed(family: str, *, moved: bool = True, model: Any = None, **settings: Any) -> Tuned:
    """Installed, and with `moved` all of the side network moved from where it begins."""
    method = method_of("lst", **{"reduction": REDUCTION, **settings})
    tuned = method.install(model or build(family), Setting(FAMILIES[family].task, 5, None))
    tuned.model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if moved and name.startswith("ladder."):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuned


def by_hand(values: dict[str, torch.Tensor], numbers: list[int], streams: list[torch.Tensor]) -> torch.Tensor:
    """U·s: from the stream before the blocks, and behind each."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    side = streams[0] @ values["ladder.first.weight"].T
    for number in numbers:
        d, gate, g, a, b = (
            values[f"ladder.steps.{number}.{one}"]
            for one in ("down.weight", "gate", "norm.weight", "entry.weight", "exit.weight")
        )
        mu = 1 / (1 + torch.exp(-gate))
        z = mu * (streams[number + 1] @ d.T) + (1 - mu) * side
        inner = norm(z, g) @ a.T
        side = z + (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ b.T
    return side @ values["ladder.up.weight"].T


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_adds_its_equations_to_the_last_stream(family: str, every: int) -> None:
    plain, inputs = deep(family), {name: one for name, one in batch(family).items() if name != "labels"}
    streams = all_after(plain, describe(plain).blocks, inputs)
    tuned = installed(family, model=deep(family), every=every)
    values = {name: one.detach() for name, one in tuned.trainable().items()}
    numbers = [1, 3, 5] if every == 2 else list(range(6))
    assert {int(name.split(".")[2]) for name in values if ".steps." in name} == set(numbers)
    added = by_hand(values, numbers, streams)
    assert float(added.abs().max()) > 0.1
    seen = []
    blocks = tuned.model.get_submodule(FAMILIES[family].blocks)
    last: Any = blocks[-1]  # type: ignore[index]
    last.register_forward_hook(lambda _, __, output: seen.append(output))
    logits(tuned.model, family)
    torch.testing.assert_close(seen[0], streams[-1] + added, rtol=0, atol=1e-5)


def test_its_gradients_are_those_of_the_equations() -> None:
    plain, inputs = deep("llama"), {name: one for name, one in batch("llama").items() if name != "labels"}
    streams = [one.double() for one in all_after(plain, describe(plain).blocks, inputs)]
    tuned = installed("llama", model=deep("llama"))
    ladder = tuned.model.get_submodule("ladder").double()
    pull = torch.randn(streams[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((ladder(streams[0], streams[1:]) * pull).sum(), list(ladder.parameters()))
    values = {f"ladder.{name}": one.detach().requires_grad_() for name, one in ladder.named_parameters()}
    expected = torch.autograd.grad((by_hand(values, list(range(6)), streams) * pull).sum(), list(values.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_begins_as_it_is(family: str) -> None:
    assert torch.equal(logits(installed(family, moved=False).model, family), logits(build(family), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_takes_part_in_the_gradients(family: str) -> None:
    tuned = installed(family)
    graphs = []
    for number in range(LAYERS):
        block: Any = tuned.model.get_submodule(f"{FAMILIES[family].blocks}.{number}")
        block.register_forward_pre_hook(
            lambda _, args, kwargs: graphs.append((args[0] if args else kwargs["hidden_states"]).requires_grad),
            with_kwargs=True,
        )
    tuned.model(**batch(family)).loss.backward()
    assert graphs == [False] * LAYERS
    assert all(one.grad is not None and one.grad.any() for one in tuned.trainable().values())


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_sees_nothing_of_what_comes_later(family: str) -> None:
    tuned, ids = installed(family), batch(family)["input_ids"][:1]
    other = ids.clone()
    other[0, 5:] = (ids[0, 5:] + 7) % VOCABULARY
    with torch.no_grad():
        one, two = (tuned.model(input_ids=tokens).logits for tokens in (ids, other))
    torch.testing.assert_close(one[:, :5], two[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 5:], two[:, 5:], atol=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_it_generates_with_a_cache_what_it_generates_without(family: str) -> None:
    model: Any = installed(family).model
    model.ladder.up.weight.data.mul_(10)
    ids = batch(family)["input_ids"][:1, :4]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    texts = [model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*texts)
    plain: Any = build(family)
    assert not torch.equal(texts[0], plain.generate(ids, **settings))


def test_the_plain_head_is_found_and_logits_need_not_be_whole() -> None:
    tuned = installed("llama")
    head: Any = plain_head(tuned.model)
    assert head is tuned.model.get_submodule("lm_head")
    with off(head):
        hidden = logits(tuned.model, "llama")
    assert torch.equal(head(hidden), logits(tuned.model, "llama"))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_checkpointing_changes_nothing(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        tuned = installed(family)
        if checkpointing:
            checkpoint_blocks(tuned.model)  # type: ignore[arg-type]
        tuned.model.train()
        tuned.model(**batch(family)).loss.backward()
        found.append({name: one.grad for name, one in tuned.trainable().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_begins_with_what_weighs_most_of_each_blocks_own_matrices(family: str) -> None:
    values = installed(family, moved=False).trainable()
    plain = build(family)
    first, second = {"llama": ("mlp.up_proj", "mlp.down_proj"), "gpt2": ("mlp.c_fc", "mlp.c_proj")}.get(
        family, ("intermediate.dense", "output.dense")
    )

    def matrix(number: int, name: str) -> torch.Tensor:
        weight: Any = plain.get_submodule(f"{FAMILIES[family].blocks}.{number}.{name}").weight
        return weight.T if family == "gpt2" else weight  # type: ignore[no-any-return]

    pairs = [(matrix(number, first), matrix(number, second)) for number in range(LAYERS)]
    weights = [sum(float(up[:, i].abs().sum() + down[i].abs().sum()) for up, down in pairs) for i in range(HIDDEN)]
    positions = sorted(sorted(range(HIDDEN), key=lambda i: -weights[i])[:NARROW])
    assert torch.equal(values["ladder.first.weight"].argmax(1), torch.tensor(positions))
    for number, (up, down) in enumerate(pairs):
        up, down = up[:, positions], down[positions]
        mass = up.abs().sum(1) + down.abs().sum(0)
        inner = sorted(mass.argsort(descending=True)[: len(up) // REDUCTION].tolist())
        assert torch.equal(values[f"ladder.steps.{number}.entry.weight"], up[inner])
        assert torch.equal(values[f"ladder.steps.{number}.exit.weight"], down[:, inner])
        assert torch.equal(values[f"ladder.steps.{number}.down.weight"], values["ladder.first.weight"])
        assert not values[f"ladder.steps.{number}.gate"].any()
    assert not values["ladder.up.weight"].any()


def test_a_gate_that_is_fused_gives_its_second_half() -> None:
    config = hf.Phi3Config(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.Phi3ForCausalLM(config).requires_grad_(False)
    fused = model.model.layers[0].mlp.gate_up_proj
    assert fused.weight.shape == (128, HIDDEN)
    fused.weight[:64] = 7.0
    entry = installed("llama", moved=False, model=model).trainable()["ladder.steps.0.entry.weight"]
    assert entry.shape == (64 // REDUCTION, NARROW)
    assert float(entry.detach().abs().max()) < 1


def saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of all that autograd keeps for a backward pass, but for parameters; what is kept twice counts once."""
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs, use_cache=False).loss  # noqa: B018
    return sum(len(storage) for storage in kept.values())


def test_it_keeps_less_than_half_of_what_lora_keeps() -> None:
    """A Llama of 12 blocks in bfloat16, and LoRA as `peft` installs it."""
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )

    def fresh() -> Any:
        return hf.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()

    ids = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids}
    ladder = method_of("lst").install(fresh(), Setting("causal-lm", 5, None)).model
    lora = peft.get_peft_model(fresh(), peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert saved_bytes(ladder, inputs) < saved_bytes(lora, inputs) / 2


def test_a_copy_of_the_model_has_a_ladder_of_its_own() -> None:
    tuned = installed("llama")
    before, other = logits(tuned.model, "llama"), copy.deepcopy(tuned.model)
    with torch.no_grad():
        other.get_parameter("ladder.up.weight").zero_()
    assert torch.equal(logits(other, "llama"), logits(build("llama"), "llama"))
    assert torch.equal(logits(tuned.model, "llama"), before)


def test_it_learns() -> None:
    tuned = installed("llama", moved=False)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=3e-2)
    losses = []
    for _ in range(20):
        loss = tuned.model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_what_is_saved_can_be_installed_again(tmp_path: Path) -> None:
    tuned = installed("llama")
    method_of("lst", reduction=REDUCTION).save(tuned, tmp_path)
    again = restore(tmp_path, build("llama"), Setting("causal-lm", 9, None))
    again.model.eval()
    assert torch.equal(logits(again.model, "llama"), logits(tuned.model, "llama"))


def test_a_stream_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(TuningError, match=r"tuning\.reduction: the stream is 32 wide"):
        installed("llama", reduction=33)

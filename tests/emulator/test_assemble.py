"""An emulator computes what its blocks compute, in every family, and shares its memory with the backbone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from families import _LLAMA_LIKE, FAMILIES, build, deep, text
from transformers import PreTrainedModel

from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble, own_middle, tensors
from farfield.emulator.layout import Layout
from farfield.emulator.split import split
from farfield.emulator.streams import run, stream
from farfield.protocols.errors import EmulatorError

hf: Any = transformers  # whose constructors are untyped

PARTS = split(6, (1, 2))
WHOLE = Layout(PARTS, tuple(PARTS.middle))
REMAINING = {"dropped": (1, 3), "repeated": (2, 2, 3), "one": (2,), "none": ()}
DECODERS = [name for name, family in FAMILIES.items() if family.task == "causal-lm"]


def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    found: torch.Tensor = run(model, text(family)).logits
    return found


def by_hand(model: PreTrainedModel, family: str, origins: tuple[int, ...]) -> PreTrainedModel:
    """The family's own model with so many layers, each with a copy of the weights of the block that it stands for."""
    path = FAMILIES[family].blocks
    shorter: Any = deep(family, len(origins))
    weights = model.state_dict()
    for name in shorter.state_dict():
        if name.startswith(f"{path}."):
            number, _, inside = name.removeprefix(f"{path}.").partition(".")
            weights[name] = model.state_dict()[f"{path}.{origins[int(number)]}.{inside}"]
    shorter.load_state_dict({name: weights[name] for name in shorter.state_dict()})
    return shorter  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_blocks_it_is_the_backbone(family: str) -> None:
    model = deep(family)
    emulator = assemble(model, WHOLE)
    assert type(emulator) is type(model)
    assert torch.equal(logits(emulator, family), logits(model, family))


@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_other_blocks_it_is_the_familys_own_model_of_that_depth(family: str, remaining: str) -> None:
    model = deep(family)
    layout = Layout(PARTS, REMAINING[remaining])
    emulator = assemble(model, layout)
    assert torch.equal(logits(emulator, family), logits(by_hand(model, family, layout.origins), family))
    # As a trainer calls it, too: a block that runs twice must not find its own keys of before.
    plain: Any = emulator
    assert torch.equal(plain(**text(family)).logits, logits(emulator, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_in_it_is_the_backbones_own_memory(family: str) -> None:
    model = deep(family)
    theirs = {tensor.data_ptr() for tensor in tensors(model).values()}
    emulator = assemble(model, Layout(PARTS, (2, 2, 3)))
    assert all(tensor.data_ptr() in theirs for tensor in tensors(emulator).values())
    assert not any(parameter.requires_grad for parameter in emulator.parameters())
    assert not emulator.training
    blocks = describe(emulator).blocks
    assert blocks[1] is blocks[2]
    assert not any(tensor.is_meta for tensor in (*emulator.parameters(), *emulator.buffers()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stand_in_with_memory_of_its_own_can_change_alone(family: str) -> None:
    model = deep(family)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    layout = Layout(PARTS, (2, 2, 3))
    emulator = assemble(model, layout)
    was = logits(emulator, family)
    own_middle(emulator, layout)
    assert torch.equal(logits(emulator, family), was)
    blocks = describe(emulator).blocks
    assert blocks[1] is blocks[2]
    theirs = {tensor.data_ptr() for tensor in tensors(model).values()}
    for number, block in enumerate(blocks):
        assert all((one.data_ptr() in theirs) == (number in layout.outer) for one in block.parameters())
        for parameter in block.parameters():
            if number in layout.inner:
                parameter.data += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert not torch.equal(logits(emulator, family), was)


def test_gradients_of_the_emulator_do_not_reach_the_backbone() -> None:
    model = deep("llama")
    emulator = assemble(model, WHOLE)
    emulator.requires_grad_(True)
    logits(emulator, "llama").sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in emulator.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bloom", "opt"])
def test_a_tied_head_stays_tied(family: str) -> None:
    model: Any = deep(family)
    emulator: Any = assemble(model, Layout(PARTS, (1,)))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert emulator.get_output_embeddings().weight is emulator.get_input_embeddings().weight


def _windowed(kind: str, **more: Any) -> PreTrainedModel:
    """A model whose blocks are of two kinds, as its configuration lists them, with weights that show it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "GPTNeo":
            more |= {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_layers": 6,
                "num_heads": 4,
                "max_position_embeddings": 64,
            }
            more |= {"attention_types": [[["global", "local"], 3]], "window_size": 2, "intermediate_size": 64}
            more |= {"bos_token_id": 1, "eos_token_id": 2}
        else:
            more = {**_LLAMA_LIKE, "num_hidden_layers": 6, "sliding_window": 2} | more
        config = getattr(hf, f"{kind}TextConfig", None) or getattr(hf, f"{kind}Config")
        model = getattr(hf, f"{kind}ForCausalLM")(config(**more))
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("GPTNeo", {}),
        ("Gemma2", {"head_dim": 8}),
        ("Gemma3", {"head_dim": 8}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        # As many ids that end a text as there are blocks: no list of blocks.
        ("Cohere2", {"eos_token_id": [2, 3, 4, 5, 6, 7]}),
    ],
)
def test_each_block_stays_of_the_kind_that_the_configuration_makes_it(kind: str, more: dict[str, Any]) -> None:
    model: Any = _windowed(kind, **more)
    layout = Layout(split(6, (1, 1)), (2, 3, 3))
    emulator: Any = assemble(model, layout)
    names = "attention_layers" if kind == "GPTNeo" else "layer_types"
    kinds = getattr(model.config, names)
    assert list(getattr(emulator.config, names)) == [kinds[number] for number in layout.origins]
    assert emulator.config.eos_token_id == model.config.eos_token_id
    # The model itself, with blocks that do nothing, and one that runs twice.
    ids = {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    blocks = describe(model).blocks

    def idle(own: Any, states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        given = own(states, *rest, **more)
        return (states, *given[1:]) if isinstance(given, tuple) else states

    def twice(own: Any, states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return own(stream(own(states, *rest, **more)), *rest, **more)

    for number, instead in ((1, idle), (4, idle), (3, twice)):
        blocks[number].forward = functools.partial(instead, blocks[number].forward)
    expected = run(model, ids).logits
    assert torch.equal(run(emulator, ids).logits, expected)


@pytest.mark.parametrize(
    ("build_numbered", "what"),
    [
        (
            lambda: hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=64, n_embd=32, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2,
                    scale_attn_by_inverse_layer_idx=True,
                )
            ),
            r"attn\.scaling",
        ),
        (
            lambda: hf.Qwen2MoeForCausalLM(
                hf.Qwen2MoeConfig(
                    **_LLAMA_LIKE | {"num_hidden_layers": 6}, num_experts=2, decoder_sparse_step=2,
                    moe_intermediate_size=8, shared_expert_intermediate_size=8,
                )
            ),
            "mlp",
        ),
    ],
    ids=["gpt2", "qwen2-moe"],
)  # fmt: skip
def test_blocks_that_depend_on_their_number_are_refused(build_numbered: Any, what: str) -> None:
    model = build_numbered().eval()
    assemble(model, WHOLE)
    with pytest.raises(EmulatorError, match=rf"block 3 would be another one as block 2: {what}.* Keep all blocks"):
        assemble(model, Layout(PARTS, (1, 3)))


def test_nothing_of_the_backbone_changes() -> None:
    model = build("llama")
    config = model.config.to_dict()
    deep_one = deep("llama")
    before = {name: tensor.clone() for name, tensor in tensors(deep_one).items()}
    assemble(deep_one, Layout(PARTS, (1,)))
    assert deep_one.config.num_hidden_layers == 6
    assert {**deep_one.config.to_dict(), "num_hidden_layers": 2} == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(deep_one).items())

"""What `describe` finds by structure in each family, and what it says of models that are built otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, HIDDEN, LAYERS, build

from farfield.emulator.architecture import KeyValueCache, describe, key_value_cache
from farfield.protocols.errors import BackboneError

hf: Any = transformers  # whose constructors are untyped

FUSED = {"gpt2", "gpt_neox", "falcon", "bloom"}
DECODERS = {name for name, family in FAMILIES.items() if family.task == "causal-lm"} | {"llama-classifier"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_where_the_family_has_them(family: str) -> None:
    expected, model = FAMILIES[family], build(family)
    found = describe(model)
    assert found.blocks_path == expected.blocks
    assert found.blocks == tuple(model.get_submodule(f"{expected.blocks}.{index}") for index in range(LAYERS))
    assert (found.embeddings, found.norm, found.head) == (expected.embeddings, expected.norm, expected.head)
    assert found.hidden_size == HIDDEN
    paths = [linear.path for linear in found.linears]
    assert paths == sorted(f"{expected.blocks}.{index}.{one}" for index in range(LAYERS) for one in expected.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_and_layout_of_a_linear_layer_agree_with_its_weight(family: str) -> None:
    model = build(family)
    for linear in describe(model).linears:
        layer: Any = model.get_submodule(linear.path)
        weight = layer.weight.T if linear.transposed else layer.weight
        assert tuple(weight.shape) == (linear.out_features, linear.in_features)
        assert linear.transposed == (family == "gpt2")
        assert linear.bias == (layer.bias is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_values_and_the_second_feedforward_matrix(family: str) -> None:
    found = describe(build(family))
    assert len(found.keys_and_values()) == LAYERS * (1 if family in FUSED else 2)
    assert len(found.feedforward_outputs()) == LAYERS
    by_path = {linear.path: linear for linear in found.linears}
    assert all(by_path[path].in_features > by_path[path].out_features == HIDDEN for path in found.feedforward_outputs())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_kept_by_decoders_only(family: str) -> None:
    model = build(family).train()
    cache = key_value_cache(model)
    assert model.training
    assert (cache is not None) == (family in DECODERS)


@pytest.mark.parametrize(
    ("family", "cache"),
    {
        "llama": KeyValueCache(LAYERS, heads=2, head_width=8),  # four heads share two keys
        "qwen3": KeyValueCache(LAYERS, heads=2, head_width=16),  # heads wider than hidden / heads
        "falcon": KeyValueCache(LAYERS, heads=1, head_width=8),  # all heads share one key
        "gpt2": KeyValueCache(LAYERS, heads=4, head_width=8),
    }.items(),
)
def test_the_shape_of_the_cache(family: str, cache: KeyValueCache) -> None:
    assert key_value_cache(build(family)) == cache


def test_an_encoder_decoder_is_refused_with_both_stacks_named() -> None:
    tiny = hf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(BackboneError, match=r"more than one stack .*decoder\.block, encoder\.block"):
        describe(hf.T5ForConditionalGeneration(tiny))


def test_a_model_without_blocks_is_refused() -> None:
    class Bag(transformers.PreTrainedModel):  # type: ignore[no-untyped-call]  # its __init_subclass__
        config_class = hf.BertConfig

        def __init__(self, config: transformers.BertConfig) -> None:
            super().__init__(config)
            self.layer = torch.nn.Linear(4, 4)

    with pytest.raises(BackboneError, match="Bag: no list of transformer blocks was found"):
        describe(Bag(hf.BertConfig()))

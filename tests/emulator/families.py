"""Tiny, randomly initialised models of every family that Farfield must understand by their structure alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

# The constructors of models and configurations are untyped or take more than their types say.
hf: Any = transformers

# Two threads only get in each other's way on kernels this small.
torch.set_num_threads(1)

VOCABULARY, HIDDEN, LAYERS, HEADS, LABELS = 64, 32, 2, 4, 3

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "num_labels": LABELS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Family:
    """One kind of model: how it is built, what it is for, and what `describe` must find in it."""

    task: str
    build: Callable[[], PreTrainedModel]
    blocks: str
    embeddings: str
    norm: str | None
    head: tuple[str, ...]
    linears: frozenset[str]


def _neox_like(attention: str) -> frozenset[str]:
    return frozenset({f"{attention}.query_key_value", f"{attention}.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"})


_GATED = frozenset({f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")})
_BERT = frozenset(
    {f"attention.self.{x}" for x in ("query", "key", "value")}
    | {"attention.output.dense", "intermediate.dense", "output.dense"}
)


def _llama_like(model: str, config: str, **more: Any) -> Family:
    return Family(
        "causal-lm",
        lambda: getattr(hf, model)(getattr(hf, config)(**{**_LLAMA_LIKE, **more})),
        "model.layers",
        "model.embed_tokens",
        "model.norm",
        ("lm_head",),
        _GATED,
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("LlamaForCausalLM", "LlamaConfig"),
    "mistral": _llama_like("MistralForCausalLM", "MistralConfig", sliding_window=16),
    "qwen2": _llama_like("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": _llama_like("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    "gemma": _llama_like("GemmaForCausalLM", "GemmaConfig", head_dim=16),
    "phi": Family(
        "causal-lm",
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**_LLAMA_LIKE, "resid_pdrop": 0.0})),
        "model.layers",
        "model.embed_tokens",
        "model.final_layernorm",
        ("lm_head",),
        frozenset(
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"}
        ),
    ),
    "gpt2": Family(
        "causal-lm",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=64,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=1,
                eos_token_id=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        ("lm_head",),
        frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ),
    "opt": Family(
        "causal-lm",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                ffn_dim=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                word_embed_proj_dim=HIDDEN,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                dropout=0.0,
            )
        ),
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        ("lm_head",),
        frozenset({f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")} | {"fc1", "fc2"}),
    ),
    "gpt_neox": Family(
        "causal-lm",
        lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        ("lm_head",),
        _neox_like("attention"),
    ),
    "falcon": Family(
        "causal-lm",
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        ("lm_head",),
        _neox_like("self_attention"),
    ),
    "bloom": Family(
        "causal-lm",
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, pad_token_id=0)
        ),
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        ("lm_head",),
        _neox_like("self_attention"),
    ),
    "llama-classifier": Family(
        "sequence-classification",
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_LLAMA_LIKE, num_labels=LABELS)),
        "model.layers",
        "model.embed_tokens",
        "model.norm",
        ("score",),
        _GATED,
    ),
    "bert": Family(
        "sequence-classification",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT_LIKE)),
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings",
        None,
        ("classifier",),
        _BERT,
    ),
    "roberta": Family(
        "sequence-classification",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT_LIKE)),
        "roberta.encoder.layer",
        "roberta.embeddings.word_embeddings",
        None,
        ("classifier",),
        _BERT,
    ),
    "distilbert": Family(
        "sequence-classification",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=VOCABULARY,
                dim=HIDDEN,
                hidden_dim=64,
                n_layers=LAYERS,
                n_heads=HEADS,
                max_position_embeddings=64,
                num_labels=LABELS,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
            )
        ),
        "distilbert.transformer.layer",
        "distilbert.embeddings.word_embeddings",
        None,
        ("pre_classifier", "classifier"),
        frozenset({f"attention.{x}_lin" for x in ("q", "k", "v", "out")} | {"ffn.lin1", "ffn.lin2"}),
    ),
    "vit": Family(
        "sequence-classification",
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                image_size=16,
                patch_size=8,
                num_labels=LABELS,
            )
        ),
        "vit.layers",
        "vit.embeddings.patch_embeddings",
        "vit.layernorm",
        ("classifier",),
        frozenset({f"attention.{x}_proj" for x in "qkvo"} | {"mlp.fc1", "mlp.fc2"}),
    ),
}


@functools.cache
def _template(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, built once; tests get copies. Every weight is random, norms and biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = FAMILIES[family].build()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return cast("PreTrainedModel", model.to(dtype).requires_grad_(False).eval())


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the family's tiny model, frozen, in evaluation mode."""
    return copy.deepcopy(_template(family, dtype))


@functools.cache
def _deep_template(family: str, depth: int) -> PreTrainedModel:
    shallow: Any = _template(family, torch.float32)
    key = shallow.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    # What a configuration says of each layer it works out by itself.
    settings = {name: value for name, value in shallow.config.to_dict().items() if name != "layer_types"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        model: Any = type(shallow)(type(shallow.config)(**settings | {key: depth}))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return cast("PreTrainedModel", model.requires_grad_(False).eval())


def deep(family: str, depth: int = 6) -> PreTrainedModel:
    """A fresh copy of the family's tiny model with `depth` blocks in float32, frozen, in evaluation mode."""
    return copy.deepcopy(_deep_template(family, depth))


def text(family: str) -> dict[str, torch.Tensor]:
    """The batch without its labels."""
    return {name: tensor for name, tensor in batch(family).items() if name != "labels"}


def batch(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Four examples with labels; the text is padded on the right, as a trainer pads it."""
    generator = torch.Generator().manual_seed(11)
    if family == "vit":
        pixels = torch.randn(4, 3, 16, 16, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])}
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[3, 6:], mask[3, 6:] = 0, 0
    if FAMILIES[family].task == "causal-lm":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}

"""The head comes off where logits are a product and nothing else; the loss is the same, and logits are never whole."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from families import FAMILIES, build

from farfield.emulator.head import off, plain_head
from farfield.emulator.methods import Setting, registered

DECODERS = [name for name, family in FAMILIES.items() if family.task == "causal-lm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_head_of_a_language_model_and_of_nothing_else(family: str) -> None:
    model = build(family, torch.float32).requires_grad_(False)
    if FAMILIES[family].task != "causal-lm":
        assert plain_head(model) is None
        return
    assert plain_head(model) is cast("Any", model).get_output_embeddings()


@pytest.mark.parametrize("kind", ["lora", "prompt-tuning", "prefix-tuning"])
def test_hidden_states_times_its_weight_are_the_logits(kind: str) -> None:
    tuned = (
        registered()[kind]
        .model_validate({"kind": kind})
        .install(build("llama", torch.float32), Setting("causal-lm", 1, 4))
    )
    tuned.model.eval()
    head: Any = plain_head(tuned.model)
    ids = torch.randint(1, 60, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = tuned.model(**inputs).logits
        with off(head):
            hidden = tuned.model(**inputs).logits
        assert hidden.shape[-1] == head.in_features
        assert torch.equal(head(hidden), logits)
        assert torch.equal(tuned.model(**inputs).logits, logits)


def test_stays_where_it_is_trained_or_its_logits_are_changed_afterwards() -> None:
    trained = build("llama", torch.float32).requires_grad_(True)
    assert plain_head(trained) is None
    bounded = build("llama", torch.float32).requires_grad_(False)
    head = cast("Any", bounded).get_output_embeddings()
    whole = bounded.forward

    def softly(*args: Any, **kwargs: Any) -> Any:
        out = whole(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    bounded.forward = softly
    assert plain_head(bounded) is None
    assert "forward" not in vars(head)

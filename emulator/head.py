"""The output layer of a language model, taken off so that its logits need never be there all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn


def plain_head(model: nn.Module) -> nn.Module | None:
    """The frozen layer whose product with the hidden states is the logits, and all that they are.

    None where there is none: a classifier's head, a trained one, or logits that are scaled or bounded afterwards. It is
    found out by computing those of one token both ways.
    """
    backbone = cast("Any", getattr(model, "get_base_model", lambda: model)())
    head = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or any(one.requires_grad for one in head.parameters()):
        return None
    token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        with off(head):
            hidden = model(**inputs).logits
        same = hidden.shape[-1] == head.in_features and torch.equal(head(hidden), logits)
    model.train(was_training)
    return head if same else None


@contextmanager
def off(head: nn.Module) -> Iterator[None]:
    """Within it the layer hands on what it gets, so that the model gives hidden states for logits."""
    head.forward = _as_it_comes
    try:
        yield
    finally:
        del head.forward


def _as_it_comes(hidden: torch.Tensor) -> torch.Tensor:
    return hidden

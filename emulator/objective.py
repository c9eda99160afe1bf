"""What a model is measured by on public text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from farfield.kernels import cross_entropy

from .streams import Batch, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether the model's head gives a token; a classifier's gives a class."""
    return cast("Any", model).get_output_embeddings() is not None


def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean loss in nats per predicted token.

    A classifier has no classes of public text. There it is the mean square of its logits' difference from zero, whose
    gradient reaches every weight: it tells how far two models agree, not how good they are.
    """
    logits: torch.Tensor = run(model, batch).logits
    if not predicts_tokens(model):
        return logits.float().square().mean()
    labels = _labels(batch).to(logits.device)
    return cross_entropy.summed(logits[:, :-1], labels) / (labels != cross_entropy.IGNORED).sum()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Loss in nats per predicted token over all batches together."""
    total, targets = 0.0, 0
    for batch in batches:
        labels = _labels(batch)
        logits = run(model, batch).logits[:, -batch["input_ids"].shape[1] : -1]  # virtual tokens stand before
        total += float(cross_entropy.summed(logits, labels.to(logits.device)))
        targets += int((labels != cross_entropy.IGNORED).sum())
    return total / targets


def _labels(batch: Batch) -> torch.Tensor:
    """The token after each, int64[batch, length − 1]; padding is not predicted."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, cross_entropy.IGNORED)[:, 1:]

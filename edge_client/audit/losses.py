"""The loss of single examples under an adapter: what attacks on a model go by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from farfield.edge_client.data import IGNORED, Example, batches, collate
from farfield.edge_client.train import forward
from farfield.emulator.bench import Bench
from farfield.emulator.head import off
from farfield.kernels import cross_entropy
from farfield.protocols.tensors import State

WORST: Final = 1e6
"""What a loss that is no number counts as, in nats: noise can leave a model that predicts nothing."""


@torch.no_grad()
def losses(bench: Bench, adapter: State, examples: Sequence[Example]) -> list[float]:
    """The mean loss of each example over its own targets, in nats and to seven decimals, without dropout."""
    bench.load(adapter)
    tuned, head = bench.tuned, bench.tuned.head
    device = next(tuned.model.parameters()).device
    tuned.model.eval()
    found = []
    for batch in batches(examples, bench.plan.evaluation.batch_size, seed=None, epoch=0):
        collated = collate(batch, bench.pad_id)
        if head is None:
            outputs, labels = forward(tuned, collated, device)
        else:
            with off(head):
                outputs, labels = forward(tuned, collated, device)
        found += [_mean(head, outputs[row], labels[row]) for row in range(len(batch))]
    return found


def _mean(head: Any, outputs: torch.Tensor, labels: torch.Tensor) -> float:
    if head is None:
        summed = cross_entropy.summed(outputs, labels)
    else:
        summed, _ = cross_entropy.summed_and_hits(outputs, head.weight, head.bias, labels)
    mean = float(summed) / int((labels != IGNORED).sum())
    return round(min(mean, WORST), 7) if math.isfinite(mean) else WORST

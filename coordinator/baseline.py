"""The yardstick of a simulation: the same training on all clients' examples in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .rounds import sample_evaluators

if TYPE_CHECKING:
    from farfield.emulator.bench import Bench

    from .simulation import Fleet


@dataclass(frozen=True, slots=True)
class Centralised:
    """What `steps` optimiser steps on the pooled examples came to; loss in nats per target."""

    steps: int
    eval_loss: float | None
    eval_accuracy: float | None


def centralised(
    plan: Plan, bench: Bench, fleet: Fleet, initial: State, steps: int, on_step: Callable[[float], None]
) -> Centralised:
    """Train from `initial` for `steps` steps on the pooled examples, and measure on what the evaluators held out.

    The figures are None where no step was made, nothing was held out, or training diverged.

    Batch size, optimiser and learning rate are the Plan's; its schedule runs over `steps`, and FedProx's term, which
    holds a client near what it received, is left out.
    """
    from farfield.edge_client.train import evaluate, train

    if not steps:
        return Centralised(0, None, None)
    pooled = [example for name in fleet.names for example in fleet.data(name).train]
    bench.load(initial)
    train(
        bench.tuned,
        initial | bench.local(),
        pooled,
        plan.training.model_copy(update={"proximal_mu": 0.0}),
        pad_id=bench.pad_id,
        seed=derive(plan.training.seed, "centralised"),
        steps=steps,
        first_step=0,
        horizon=steps,
        on_step=on_step,
    )
    measured = [
        evaluate(bench.tuned, held_out, plan.evaluation.batch_size, pad_id=bench.pad_id)
        for name in sample_evaluators(plan, fleet.names)
        if (held_out := fleet.data(name).held_out[: plan.evaluation.examples])
    ]
    targets = sum(one.targets for one in measured)
    loss = sum(one.loss * one.targets for one in measured) / targets if targets else math.nan
    if not math.isfinite(loss):
        return Centralised(steps, None, None)
    return Centralised(steps, loss, sum(one.correct for one in measured) / targets)

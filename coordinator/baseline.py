"""The yardsticks of a simulation: the same training in one place, or on the whole backbone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .rounds import sample_evaluators

if TYPE_CHECKING:
    from farfield.emulator.bench import Bench

    from .runs import Checkpoint
    from .simulation import Fleet, Observer, Source


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
    from farfield.edge_client.train import train

    if not steps:
        return Centralised(0, None, None)
    pooled = [example for name in fleet.names for example in fleet.data(name).train]
    bench.load(initial)
    train(
        bench.tuned,
        initial | bench.own(),
        pooled,
        plan.training.model_copy(update={"proximal_mu": 0.0}),
        pad_id=bench.pad_id,
        seed=derive(plan.training.seed, "centralised"),
        steps=steps,
        first_step=0,
        horizon=steps,
        on_step=on_step,
    )
    loss, accuracy = _held_out(plan, bench, fleet)
    return Centralised(steps, loss, accuracy)


def _held_out(plan: Plan, bench: Bench, fleet: Fleet) -> tuple[float | None, float | None]:
    """Loss and accuracy of what the bench has loaded, on what the evaluators held out; None where that is no number."""
    from farfield.edge_client.train import evaluate

    measured = [
        evaluate(bench.tuned, held_out, plan.evaluation.batch_size, pad_id=bench.pad_id)
        for name in sample_evaluators(plan, fleet.names)
        if (held_out := fleet.data(name).held_out[: plan.evaluation.examples])
    ]
    targets = sum(one.targets for one in measured)
    loss = sum(one.loss * one.targets for one in measured) / targets if targets else math.nan
    if not math.isfinite(loss):
        return None, None
    return loss, sum(one.correct for one in measured) / targets


@dataclass(frozen=True, slots=True)
class Offsite:
    """Losses on what the clients held out, in nats per target: what tuning on an emulator is worth to the backbone.

    Attributes:
        zero_shot: of the backbone as it was.
        emulator: of the tuned emulator.
        plug_in: of the backbone with the adapter that was tuned on the emulator.
        full: of the backbone with the same blocks tuned on itself, by the same federation.
    """

    zero_shot: float
    emulator: float
    plug_in: float
    full: float

    @property
    def recovered(self) -> float | None:
        """R: the share of what tuning on the backbone gains that plugging in gains; None where it gains nothing."""
        gain = self.zero_shot - self.full
        return (self.zero_shot - self.plug_in) / gain if gain > 0 else None


def compared(
    plan: Plan, model_folder: Path, clients: Sequence[Source], last: Checkpoint, observer: Observer
) -> Offsite | None:
    """Hold a finished run on an emulator against the same run on the backbone, which is done now and not kept.

    None where no loss may be measured, or one is no number.

    Args:
        last: the end of the run on the emulator.
    """
    whole = on_backbone(plan)
    full = tuned_whole(whole, model_folder, clients, observer)
    before, plugged, after = judged(whole, model_folder, clients, [None, last.adapter, full])
    losses = before[0], last.record.eval_loss, plugged[0], after[0]
    if any(one is None for one in losses):
        return None
    return Offsite(*(one for one in losses if one is not None))


def tuned_whole(whole: Plan, model_folder: Path, clients: Sequence[Source], observer: Observer) -> State:
    """The adapter at the end of a simulation of the Plan, of which nothing else is kept."""
    from farfield.emulator.bench import Bench

    from .runs import RunFolder, RunInfo
    from .simulation import Faults, Fleet, Simulation

    bench = Bench(whole, model_folder)
    with tempfile.TemporaryDirectory() as kept:
        folder = RunFolder.create(Path(kept) / "run", RunInfo("yardstick", whole.digest, str(model_folder), ""), "")
        simulation = Simulation(whole, folder, Fleet(whole, bench, clients), Faults(), observer)
        return simulation.go(bench.adapter()).adapter


def judged(
    plan: Plan, model_folder: Path, clients: Sequence[Source], adapters: Iterable[State | None]
) -> list[tuple[float | None, float | None]]:
    """Loss and accuracy of each adapter in the backbone, on what the clients held out; None is an untrained one."""
    from farfield.emulator.bench import Bench

    from .simulation import Fleet

    bench = Bench(plan, model_folder)
    fleet, untrained, found = Fleet(plan, bench, clients), bench.adapter(), []
    for adapter in adapters:
        bench.load(untrained if adapter is None else adapter)
        found.append(_held_out(plan, bench, fleet))
    return found


def on_backbone(plan: Plan) -> Plan:
    """The Plan with the backbone in the place of its emulator: the same blocks are tuned, in the same rounds."""
    assert plan.delivery.ends is not None
    first, last = plan.delivery.ends
    delivery = plan.delivery.model_copy(
        update={"kind": "adapter", "first": first, "last": last, "redistill_every": None}
    )
    evaluation = plan.evaluation.model_copy(update={"every": plan.training.rounds})
    return plan.model_copy(update={"delivery": delivery, "evaluation": evaluation})

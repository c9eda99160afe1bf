"""Whether a Plan's tuning method fits its backbone, found out without the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from farfield.protocols.plan import Plan

from . import backbone
from .architecture import checkpoint_blocks, describe
from .layout import Layout
from .methods import Setting, TuningMethod
from .split import split


def rehearse(plan: Plan, folder: Path) -> None:
    """Install the method in a model that has the shapes of the backbone in `folder` and nothing in them.

    It takes a second and no memory, whatever the size of the backbone.

    Raises:
        BackboneError, TuningError, EmulatorError: what would end a run before its first round.
    """
    assert isinstance(plan.tuning, TuningMethod)
    backbone.check(folder)
    config, kind = backbone.model_class(folder, task=plan.model.task, labels=plan.model.labels)
    with backbone.silent_transformers(), torch.device("meta"):
        model = cast("Any", kind)._from_config(config, dtype=getattr(torch, plan.model.dtype))
    outer: tuple[int, ...] | None = None
    if plan.delivery.ends is not None:
        parts = split(len(describe(model).blocks), plan.delivery.ends, folder)
        outer = Layout(parts, tuple(parts.middle)).outer
    steps = plan.training.rounds * plan.training.steps if plan.training.steps else None
    setting = Setting(
        plan.model.task, plan.training.seed, steps, outer, original=lambda path: model.get_submodule(path).weight
    )
    plan.tuning.install(model.requires_grad_(False).eval(), setting)
    if plan.training.checkpointing:
        checkpoint_blocks(model)

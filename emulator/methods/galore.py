"""GaLore: full fine-tuning of blocks with an optimiser whose moments are of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from farfield.protocols.sections import PositiveFloat, Training

from .full import Full
from .method import Setting, Tuned, TuningMethod, register
from .peft_method import Rank
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register
class Galore(TuningMethod):
    """All parameters of the blocks, as `full`, by steps W ← W - η·α·P·Adam(Pᵀ·G) (Zhao et al. 2024, algorithm 2).

    P spans the r strongest directions of the gradient of a matrix, found anew every `interval` steps; Adam's moments
    are those of Pᵀ·G. Vectors, and matrices with no side longer than r, have plain AdamW. An optimiser starts anew in
    every round, and so does P.

    What is saved is memory for moments. All gradients are there at once, and so are the float32 values behind the
    model's; the paper's update of one layer at a time is not done.

    Attributes:
        rank: r.
        interval: T, the steps between two decompositions of a gradient.
        scale: α, by which a step is shorter than Adam's.
    """

    kind: Literal["galore"] = "galore"
    rank: Rank = 128
    interval: Annotated[int, Field(ge=1)] = 200
    scale: PositiveFloat = 0.25

    @property
    def on_quantised(self) -> bool:
        return Full().on_quantised

    @property
    def optimizers(self) -> tuple[str, ...]:
        return ("adamw",)

    @property
    def adapter_of(self) -> str:
        return Full().adapter_of

    @property
    def sharing(self) -> Sharing:
        return Full().sharing

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        return replace(Full().install(model, setting), optimizer=self._optimizer)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        return Full().merge(tuned)

    def save(self, tuned: Tuned, folder: Path) -> None:
        """Write the trained weights as `full` does."""
        Full().save(tuned, folder)

    def _optimizer(self, training: Training, values: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        from farfield.emulator.galore import GaLore

        return GaLore(
            values.values(),
            training.learning_rate,
            rank=self.rank,
            interval=self.interval,
            scale=self.scale,
            weight_decay=training.weight_decay,
        )

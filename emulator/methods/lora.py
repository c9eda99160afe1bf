"""LoRA: a trained low-rank matrix beside each frozen one, with its variants rsLoRA, DoRA and FFA-LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .method import Setting, register
from .peft_method import Adapter, Alpha, Dropout, PeftMethod, Rank, Targets, names_for_peft, select, transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class Lora(PeftMethod):
    """W + s·B·A, with A ∈ ℝ^(r×k) drawn at random and B ∈ ℝ^(d×r) zero (Hu et al. 2021, eq. 3); s = α / r.

    Attributes:
        rank: r.
        alpha: α.
        dropout: probability with which values of the input of A are dropped in training.
        targets: `all-linear`, or names of linear layers.
        rslora: s = α / √r, so that the step does not shrink as the rank grows (Kalajdzievski 2023, theorem 3.2).
        dora: train the magnitude m and the direction of each column of W apart (Liu et al. 2024, eq. 5).
        freeze_a: FFA-LoRA (Sun et al. 2024, section 4): A keeps its initial values, which every client draws alike from
            the seed. Then the mean of the clients' B·A is exactly the mean of B times A; and half as much travels.
    """

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16
    dropout: Dropout = 0.0
    targets: Targets = "all-linear"
    rslora: bool = False
    dora: bool = False
    freeze_a: bool = False

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import LoraConfig

        linears = select(self.targets, architecture)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names_for_peft(model, architecture, tuple(linear.path for linear in linears)),
            fan_in_fan_out=transposed(linears),
            use_rslora=self.rslora,
            use_dora=self.dora,
        )
        return Adapter(config, frozen=r"\.lora_A\." if self.freeze_a else None)

"""LoRA: a trained low-rank matrix beside each frozen one, with variants in one client and variants of its average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import model_validator

from . import loftq
from .method import Setting, register
from .peft_method import Adapter, Alpha, Dropout, PeftMethod, Rank, Targets, names_for_peft, select, transposed
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture

_A: Final = r"\.lora_A\."
_B: Final = r"\.lora_B\."


@register
class Lora(PeftMethod):
    """W + s·B·A, with A ∈ ℝ^(r×k) drawn at random and B ∈ ℝ^(d×r) zero (Hu et al. 2021, eq. 3); s = α / r.

    The mean of the clients' A times the mean of their B is not the mean of their B·A. With one of `freeze_a`,
    `alternate` and `local_b` only one factor is averaged at a time, and it is (unless `dora` is set: the norm of a
    column is not linear in anything).

    Attributes:
        rank: r.
        alpha: α.
        dropout: probability with which values of the input of A are dropped in training.
        targets: `all-linear`, or names of linear layers.
        rslora: s = α / √r, so that the step does not shrink as the rank grows (Kalajdzievski 2023, theorem 3.2).
        dora: train the magnitude m and the direction of each column of W apart (Liu et al. 2024, eq. 5).
        freeze_a: FFA-LoRA (Sun et al. 2024, section 4): A keeps its initial values, which every client draws alike from
            the seed; half as much travels.
        alternate: RoLoRA (Chen et al. 2024, section 3): B is trained in odd rounds and A in even ones. Half as much
            travels up; down goes all of it, since not every client was in the round before.
        local_b: FedSA-LoRA (Guo et al. 2025, section 3): A is averaged, and each client keeps a B of its own at home.
            Every client gets its own adapter; half as much travels.
        initial: `zero`, or `loftq`: on a quantised backbone, s·B·A begins as the best of its rank for what quantising
            has taken from W (LoftQ, Li et al. 2024, algorithm 1 with one step; `loftq.py`). Whoever begins the run
            computes it, and the clients are sent it.
    """

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16
    dropout: Dropout = 0.0
    targets: Targets = "all-linear"
    rslora: bool = False
    dora: bool = False
    freeze_a: bool = False
    alternate: bool = False
    local_b: bool = False
    initial: Literal["zero", "loftq"] = "zero"

    @model_validator(mode="after")
    def _one_way_to_average(self) -> Self:
        if self.freeze_a + self.alternate + self.local_b > 1:
            raise ValueError("'freeze_a', 'alternate' and 'local_b' are three ways to the same end; give one of them")
        return self

    @model_validator(mode="after")
    def _initial_values_that_are_sent(self) -> Self:
        if self.initial == "loftq" and (self.freeze_a or self.alternate or self.local_b or self.dora):
            raise ValueError(
                'initial = "loftq" begins with an A and a B that belong together, so both must be sent in every '
                "round: leave out 'freeze_a', 'alternate', 'local_b' and 'dora'"
            )
        return self

    @property
    def corrects_rounding(self) -> bool:
        return self.initial == "loftq"

    @property
    def by_example(self) -> bool:
        return not self.dora

    @property
    def adapter_of(self) -> str:
        return "lora, B alone" if self.freeze_a else "lora, with magnitudes" if self.dora else "lora"

    @property
    def adapter_rank(self) -> int | None:
        return None if self.freeze_a or self.alternate or self.local_b else self.rank

    @property
    def sharing(self) -> Sharing:
        return Sharing(
            exact=(self.freeze_a or self.alternate or self.local_b) and not self.dora,
            local=_B if self.local_b else None,
            resting=(_A, _B) if self.alternate else (),
        )

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import LoraConfig

        from farfield.emulator import frozen_factor

        linears = select(self.targets, architecture)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self._alpha(setting.of_rank),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=names_for_peft(model, architecture, tuple(linear.path for linear in linears)),
            fan_in_fan_out=transposed(linears),
            use_rslora=self.rslora,
            use_dora=self.dora,
        )
        initial = loftq.correction(setting) if self.initial == "loftq" else None
        installed = frozen_factor.use if self.freeze_a and not self.dora else None
        return Adapter(config, frozen=_A if self.freeze_a else None, installed=installed, initial=initial)

    def _alpha(self, of_rank: int | None) -> float:
        """The α with which s is that of the whole adapter, of this rank, where only a part of it is trained here."""
        if of_rank is None or of_rank == self.rank:
            return self.alpha
        share = self.rank / of_rank
        return self.alpha * (math.sqrt(share) if self.rslora else share)

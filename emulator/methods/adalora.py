"""AdaLoRA: low-rank changes whose ranks are spent where they matter, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from farfield.protocols.errors import TuningError

from .method import Setting, register
from .peft_method import Adapter, Alpha, Dropout, PeftMethod, Rank, Targets, names_for_peft, select, transposed
from .sharing import Sharing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture

Momentum = Annotated[float, Field(gt=0, lt=1)]


@register
class AdaLora(PeftMethod):
    """W + P·Λ·Q with a diagonal Λ, whose least important entries are set to zero (Zhang et al. 2023, algorithm 1).

    The budget shrinks on each client by what that client saw; what is pruned is put back to zero before each of its
    optimiser steps. The regulariser (eq. 4) enters with its gradient, so that it holds for any loss; as `peft` does, it
    averages the norm γ·‖PᵀP − I‖ over all P and Q where the paper sums the squares.

    Attributes:
        initial_rank: r of every layer at the start; the budget b⁽⁰⁾ divided by the number of targets.
        target_rank: the average rank at the end; b⁽ᵀ⁾ divided by the number of targets.
        alpha: α; the change is scaled by α / r.
        dropout: probability with which values of the input are dropped in training.
        warmup: t_i, the steps before pruning begins, as a share of all steps.
        cooldown: t_f, the steps after the last change of the budget, as a share of all steps.
        interval: ΔT, steps between two allocations.
        beta1, beta2: β₁ and β₂ of the smoothed importance and its uncertainty (eq. 9 and 10).
        orthogonality: γ.
        targets: `all-linear`, or names of linear layers.
    """

    kind: Literal["adalora"] = "adalora"
    initial_rank: Rank = 12
    target_rank: Rank = 8
    alpha: Alpha = 32
    dropout: Dropout = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    cooldown: Annotated[float, Field(ge=0, lt=1)] = 0.3
    interval: Annotated[int, Field(ge=1)] = 10
    beta1: Momentum = 0.85
    beta2: Momentum = 0.85
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    targets: Targets = "all-linear"

    @model_validator(mode="after")
    def _a_budget_that_shrinks(self) -> Self:
        if self.target_rank > self.initial_rank:
            raise ValueError(f"'target_rank' ({self.target_rank}) is more than 'initial_rank' ({self.initial_rank})")
        if self.warmup + self.cooldown >= 1:
            raise ValueError("'warmup' and 'cooldown' leave no steps between them")
        return self

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import AdaLoraConfig

        if setting.steps is None:
            raise TuningError(
                "AdaLoRA spends its budget over a known number of steps",
                where="training.epochs",
                hint="Give the budget of a round as training.steps.",
            )
        linears = select(self.targets, architecture)
        config = AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.target_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            tinit=int(self.warmup * setting.steps),
            tfinal=int(self.cooldown * setting.steps),
            deltaT=self.interval,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=0.0,  # `_Budget` adds it, also where the trainer computes its own loss
            total_step=setting.steps,
            target_modules=names_for_peft(model, architecture, tuple(linear.path for linear in linears)),
            fan_in_fan_out=transposed(linears),
        )
        budget = _Budget(self.orthogonality)
        return Adapter(config, before_training=budget.begin, after_backward=budget.step)


class _Budget:
    """What AdaLoRA does between backward and the optimiser: regularise, then allocate the budget (`peft`).

    The pattern of kept ranks is held here between steps, not in the adapter's configuration: `peft` cuts the tensors
    that it saves by it. But the optimiser moves pruned values off zero again, and the file would not hold what the
    model computes with.
    """

    def __init__(self, orthogonality: float) -> None:
        self.orthogonality = orthogonality
        self.pattern: dict[str, list[bool]] | None = None

    def begin(self, model: PeftModel) -> None:
        self.pattern = None
        cast("Any", model.base_model).rankallocator.reset_ipt()

    def step(self, model: PeftModel, step: int) -> None:
        self._regularise(model)
        base, config = cast("Any", model.base_model), cast("Any", model.active_peft_config)
        if self.pattern is None and step >= config.total_step - config.tfinal:
            # The task begins where the budget has been spent already: whom to keep is decided by its first gradients.
            base.rankallocator.update_ipt(base.model)
            _, self.pattern = base.rankallocator.update_and_allocate(base.model, step, force_mask=True)
            return
        config.rank_pattern = self.pattern
        base.update_and_allocate(step)
        self.pattern, config.rank_pattern = config.rank_pattern, None

    def _regularise(self, model: PeftModel) -> None:
        """Add the gradient of γ·mean ‖PᵀP − I‖_F; here P is `lora_B` (d, r) and Q is `lora_A` (r, k)."""
        import torch

        norms = []
        for name, matrix in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                rows = matrix if ".lora_A." in name else matrix.T
                norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows)).to(rows)))
        torch.autograd.backward(self.orthogonality * torch.stack(norms).mean())

"""LoRA-FA: LoRA whose A stays as drawn, with steps of B that come closest to those of the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from farfield.protocols.sections import Training

from .lora import Lora
from .method import Setting, Tuned, TuningMethod, register
from .peft_method import Alpha, Dropout, Rank, Targets
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register
class LoraFa(TuningMethod):
    """W + s·B·A with A frozen as drawn, and g_B ← s⁻²·g_B·(A·Aᵀ)⁻¹ for B's gradient (Zhang et al. 2023, section 3).

    Of all changes of B the corrected one changes W by what is nearest to the gradient of W itself. Then the Plan's
    optimiser takes its step; SGD is refused, since nothing would bound the length of a step.

    For B's gradient only A·x is kept, r values where x has the width of the layer. The mean is exact, since A is drawn
    from the seed and alike everywhere. It is `lora` with `freeze_a` (FFA-LoRA) but for the correction.

    Attributes:
        rank: r.
        alpha: α; s = α / r.
        dropout: probability with which values of the input of A are dropped in training.
        targets: `all-linear`, or names of linear layers.
        rslora: s = α / √r (Kalajdzievski 2023, theorem 3.2).
    """

    kind: Literal["lora-fa"] = "lora-fa"
    rank: Rank = 8
    alpha: Alpha = 16
    dropout: Dropout = 0.0
    targets: Targets = "all-linear"
    rslora: bool = False

    @property
    def by_example(self) -> bool:
        return self._lora().by_example

    @property
    def optimizers(self) -> tuple[str, ...]:
        return ("adamw", "adamw-8bit", "adafactor")

    @property
    def adapter_of(self) -> str:
        return self._lora().adapter_of

    @property
    def sharing(self) -> Sharing:
        return self._lora().sharing

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        tuned = self._lora().install(model, setting)
        corrections = {setting.named(name): one for name, one in _corrections(tuned.model)}
        return replace(tuned, optimizer=partial(_optimizer, corrections))

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        return self._lora().merge(tuned)

    def save(self, tuned: Tuned, folder: Path) -> None:
        """Write an ordinary LoRA."""
        self._lora().save(tuned, folder)

    def _lora(self) -> Lora:
        return Lora(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            rslora=self.rslora,
            freeze_a=True,
        )


def _corrections(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The name of each B, and s⁻²·(A·Aᵀ)⁻¹, float32[r, r]; computed once, since A never changes."""
    import torch
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a: Any = module.lora_A["default"].weight
            inverse = torch.linalg.pinv(a.detach().double() @ a.detach().double().T, hermitian=True)
            yield f"{path}.lora_B.default.weight", (inverse / module.scaling["default"] ** 2).float()


def _optimizer(
    corrections: Mapping[str, torch.Tensor], training: Training, values: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    """The Plan's optimiser, which gets corrected gradients.

    Not `LoraFAOptimizer` of `peft` 0.21: it multiplies in bfloat16 wherever the machine can, which leaves float32
    gradients three digits; it inverts the same matrices in every step; and it is AdamW, never one of fewer bits. A
    test holds ours against it.
    """
    from farfield.emulator.schedule import make_optimizer

    def correct(*_: object) -> None:
        for name, correction in corrections.items():
            if name in values and (gradient := values[name].grad) is not None:
                values[name].grad = gradient @ correction.to(gradient)

    optimizer = make_optimizer(training, values)
    optimizer.register_step_pre_hook(correct)
    return optimizer

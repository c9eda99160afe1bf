"""How a LoRA layer whose A is frozen computes: by `farfield.kernels.low_rank` instead of `peft`'s three operations."""

from __future__ import annotations

from typing import Any, final

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant

from farfield.kernels import low_rank


@final
class FrozenFactor(LoraVariant):
    """A variant of LoRA to `peft`, which asks it for what a layer gives, and for nothing else: it is merged as any."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, inputs = module.scaling[active_adapter], module.lora_dropout[active_adapter](x)
        if not b.weight.requires_grad:  # whoever finds B's gradient for each example follows the calls of its layer
            summed: torch.Tensor = result + b(a(inputs)) * scale
            return summed
        return low_rank.add_(result, inputs, a.weight, b.weight, scale)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        merged: torch.Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return merged


def use(model: torch.nn.Module) -> None:
    """Have every LoRA layer of the model compute so."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant["default"] = FrozenFactor()

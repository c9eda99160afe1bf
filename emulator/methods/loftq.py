"""LoftQ: LoRA's two factors begin with what quantising the backbone has taken away (Li et al. 2024).

With Q the matrix that few bits stand for, A and B are such that ‖W − (Q + s·B·A)‖ is least at their rank: the singular
vectors of W − Q. This is algorithm 1 of the paper with T = 1. Its further steps quantise W − s·B·A in turn, and with
that every client's backbone would be another one than the one that it has been sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from farfield.protocols.errors import TuningError
from farfield.protocols.seeds import derive

from .method import Setting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

OVERSAMPLED: Final = 2
"""How many times the rank the subspace has in which singular vectors are looked for."""

STEPS: Final = 8
"""Steps of subspace iteration: what rounding takes away is much like noise, so singular values lie close together."""


def correction(setting: Setting) -> Callable[[PeftModel], None]:
    """What sets the A and B of every LoRA layer that stands beside a matrix of few bits.

    Raises:
        TuningError: the model is not the backbone, so that nobody knows what was taken away.
    """
    original = setting.original
    if original is None:
        raise TuningError(
            'initial = "loftq" needs the backbone as it was before it was quantised', hint='Use initial = "zero".'
        )

    def correct(model: PeftModel) -> None:
        import torch
        from peft.tuners.lora import LoraLayer

        from farfield.emulator.layers import RoundedLinear

        for path, module in model.named_modules():
            base = module.get_base_layer() if isinstance(module, LoraLayer) else None
            if not isinstance(base, RoundedLinear):
                continue
            layer: Any = module
            name = path.removeprefix("base_model.model.")
            lost = residual(original(name), base.matrix(torch.float32))
            rank, scale = layer.r["default"], layer.scaling["default"]
            a, b = factors(lost / scale, rank, derive(setting.seed, "loftq", name))
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)

    return correct


def residual(original: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """W − Q, float32[out, in]; GPT-2 has its matrices (in, out) in its files."""
    weight = original.to(rounded.device).float()
    ways = [one - rounded for one in (weight, weight.T) if one.shape == rounded.shape]
    return min(ways, key=lambda one: float(one.norm()))


def factors(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] = √Σ Vᵀ and B [out, rank] = U √Σ of the `rank` largest singular values of `matrix` [out, in]."""
    import torch

    wide = min(OVERSAMPLED * rank + 8, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, q=wide, niter=STEPS)
    scale = values[:rank].sqrt()
    return scale.unsqueeze(1) * right[:, :rank].T, left[:, :rank] * scale

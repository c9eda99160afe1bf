"""The modules that adapters put into a model's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Bottleneck(nn.Module):
    """x ↦ s·(U·relu(D·x + a) + b), through `width` features; zero for every x at first.

    It stands beside a sub-layer, of which it knows the layer that leads out, and for the parallel form one that leads
    in. As hooks of these layers it works wherever a family has them, and leaves their names as they are.
    """

    def __init__(self, hidden: int, width: int, scale: float, generator: torch.Generator) -> None:
        """D is drawn on the CPU, evenly between ±1/√hidden; all else is zero."""
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(hidden, width, device="meta")
        self.up = nn.Linear(width, hidden, device="meta")
        drawn = (2 * torch.rand(width, hidden, generator=generator) - 1) * hidden**-0.5
        self.down.weight, self.down.bias = nn.Parameter(drawn), nn.Parameter(torch.zeros(width))
        self.up.weight, self.up.bias = nn.Parameter(torch.zeros(hidden, width)), nn.Parameter(torch.zeros(hidden))
        self._entered: torch.Tensor | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → [..., hidden]."""
        result: torch.Tensor = self.scale * self.up(torch.relu(self.down(inputs)))
        return result

    def follow(self, leaving: nn.Module) -> None:
        """Add to what `leaving` gives what the adapter makes of it."""
        leaving.register_forward_hook(self._serial)

    def accompany(self, entering: nn.Module, leaving: nn.Module) -> None:
        """Add to what `leaving` gives what the adapter makes of the input of `entering`, which runs before it."""
        entering.register_forward_pre_hook(self._enter)
        leaving.register_forward_hook(self._parallel)

    # Methods, not closures: a copy of the model has hooks of its own.

    def _serial(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.add(output, self(output))

    def _enter(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._entered = inputs[0]

    def _parallel(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        assert self._entered is not None
        inputs, self._entered = self._entered, None
        return torch.add(output, self(inputs))


class Scaled(nn.Module):
    """x ↦ γ ⊙ layer(x) + β for a linear layer or a norm; γ is one and β zero at first, and β may be left out."""

    def __init__(self, layer: nn.Module, width: int, *, shift: bool, transposed: bool) -> None:
        """`width` is that of the layer's output; `transposed` says that its weight is (in, out)."""
        super().__init__()
        self.layer, self.transposed = layer, transposed
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As the layer."""
        result: torch.Tensor = self.layer(inputs) * self.scale
        return result if self.shift is None else result + self.shift

    def fits(self) -> bool:
        """Whether the layer has a bias for β, if there is any β."""
        biased = getattr(self.layer, "bias", None) is not None
        return biased or self.shift is None or not self.shift.any()

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The layer with γ and β in its own weight and bias (computed in float32), which must fit."""
        layer: Any = self.layer
        scale = self.scale.float()
        weight = layer.weight.float()
        if weight.ndim == 1:
            from_one = self._counts_from_one()
            weight = (weight + from_one) * scale - from_one
        else:
            weight = weight * (scale if self.transposed else scale[:, None])
        layer.weight.copy_(weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(layer.bias.float() * scale + (0 if self.shift is None else self.shift.float()))
        return self.layer

    def _counts_from_one(self) -> int:
        """1 for a norm that multiplies by 1 + weight (Gemma's), 0 for one that multiplies by its weight."""
        norm: Any = self.layer
        kept = norm.weight.clone()
        norm.weight.zero_()
        probe = torch.linspace(-1, 1, len(kept), dtype=kept.dtype, device=kept.device)
        bias = getattr(norm, "bias", None)
        silent = torch.equal(norm(probe), torch.zeros_like(probe) if bias is None else bias)
        norm.weight.copy_(kept)
        return 0 if silent else 1

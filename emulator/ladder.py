"""A narrow network beside a model's blocks, which reads what they give and through which alone gradients go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from .streams import stream

EPSILON: Final = 1e-6
"""Of the norms; what torch takes by default for bfloat16 would drown a stream as small as that of embeddings."""


@dataclass(frozen=True, slots=True)
class Rung:
    """What one block of the side network starts with.

    Attributes:
        block: the number of the model's block that it reads.
        entry: A, [inner, narrow].
        exit: B, [narrow, inner].
    """

    block: int
    entry: torch.Tensor
    exit: torch.Tensor


class Ladder(nn.Module):
    """The side network: s₀ = D₀·h₀, then for each block i that is read, and at the end for the stream h_L

        z = μᵢ·Dᵢ·hᵢ + (1 − μᵢ)·s,   s ← z + Bᵢ·gelu(Aᵢ·norm(z)),   μᵢ = sigmoid(αᵢ)
        h_L ← h_L + U·s

    hᵢ is the stream behind block i, taken without its history. At first α and U are zero, D picks `positions`, and
    norms (Zhang and Sennrich 2019) only divide. The side stream is not normed in the end: it is as large as what it is
    added to, which in a deep model is far from one, and U would be long on its way.
    """

    def __init__(self, hidden: int, positions: torch.Tensor, rungs: Sequence[Rung]) -> None:
        """All tensors are float32, on the CPU; `positions` are the numbers of `narrow` of the stream's `hidden`."""
        super().__init__()
        picked = functional.one_hot(positions, hidden).float()
        self.first = _linear(picked)
        # No ModuleList: that of the blocks is to be the model's only one with linear layers.
        self.steps = nn.ModuleDict({str(rung.block): _Step(picked, rung) for rung in rungs})
        self.up = _linear(torch.zeros(hidden, len(positions)))
        self._entering: torch.Tensor | None = None
        self._behind: list[torch.Tensor] = []

    def forward(self, entering: torch.Tensor, behind: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is added to the last stream, [batch, length, hidden], from that before the blocks and those behind."""
        side = self.first(entering)
        for step, states in zip(self.steps.values(), behind, strict=True):
            side = step(states, side)
        result: torch.Tensor = self.up(side)
        return result

    def lean(self, blocks: Sequence[nn.Module]) -> None:
        """Read along as `blocks` run, all of a model's, and add to what the last of them gives."""
        blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for number in self.steps:
            blocks[int(number)].register_forward_hook(self._read)
        blocks[-1].register_forward_hook(self._land)

    # Methods, not closures: a copy of the model has hooks of its own. What is checkpointed is a block's `forward`, so
    # that its hooks run once, and nothing in a block needs a gradient that would have it run again.

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        self._entering, self._behind = states.detach(), []

    def _read(self, _: nn.Module, __: Any, output: Any) -> None:
        self._behind.append(stream(output).detach())

    def _land(self, _: nn.Module, __: Any, output: Any) -> Any:
        assert self._entering is not None
        entering, behind = self._entering, self._behind
        self._entering, self._behind = None, []
        landed = stream(output) + self(entering, behind)
        return (landed, *output[1:]) if isinstance(output, tuple) else landed


class _Step(nn.Module):
    """One rung."""

    def __init__(self, picked: torch.Tensor, rung: Rung) -> None:
        super().__init__()
        self.down = _linear(picked)
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.RMSNorm(len(picked), EPSILON)
        self.entry, self.exit = _linear(rung.entry), _linear(rung.exit)

    def forward(self, states: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        """[..., hidden] and [..., narrow] → [..., narrow]."""
        mixed = torch.lerp(side, self.down(states), torch.sigmoid(self.gate))
        result: torch.Tensor = mixed + self.exit(functional.gelu(self.entry(self.norm(mixed))))
        return result


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A layer without bias that has a copy of this weight, for which nothing is drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer

"""A pool of directions, and how far a model's weights have gone along each: all that has to be known of a change."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farfield.kernels import perturb

from .zeroth_order import Directions


class SeedPool(torch.nn.Module):
    """The scalars aⱼ of W = W₀ - Σⱼ aⱼ·zⱼ, a part of the model whose weights W are.

    Attributes:
        scalars: a, float32 [K] whatever the dtype of the model.
        witness: values of two directions, which show that another machine makes the same ones.
        seed: of the directions.
    """

    scalars: torch.nn.Parameter
    witness: torch.Tensor

    def __init__(self, directions: Directions, size: int, seed: int) -> None:
        """The weights are W₀ now; a copy of them is kept."""
        super().__init__()
        self.seed = seed
        self._directions = directions
        self._origin = {parameter: parameter.detach().clone() for parameter in directions.parameters}
        device = directions.parameters[0].device
        self.scalars = torch.nn.Parameter(torch.zeros(size, device=device))
        self._made: torch.Tensor | None = self.scalars.detach().clone()
        witness = torch.zeros(256, device=device)
        perturb.add_(witness, (seed, 0), perturb.mixture({0: 1.0, size - 1: 2.0}))
        self.register_buffer("witness", witness)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the weights from the scalars, unless they were made from the same ones already."""
        scalars = self.scalars.detach()
        if self._made is not None and torch.equal(self._made, scalars):
            return
        self._made = None
        for parameter, value in self._origin.items():
            parameter.copy_(value)
        self._directions.add({number: -scale for number, scale in enumerate(scalars.tolist())})
        self._made = scalars.clone()

    @torch.no_grad()
    def begin(self, scalars: torch.Tensor) -> None:
        """Make the weights from these scalars. From now on they are moved by others, too."""
        self.scalars.copy_(scalars)
        self.settle()
        self._made = None

    @torch.no_grad()
    def gone(self, moved: Mapping[int, float]) -> torch.Tensor:
        """The change of the scalars, float32 [K], that stands for steps of the weights by these multiples of zⱼ."""
        change = torch.zeros(len(self.scalars))
        for number, scale in moved.items():
            change[number] = -scale
        self.scalars.add_(change.to(self.scalars.device))
        return change

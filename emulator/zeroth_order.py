"""Descent without gradients: the loss at both ends of a random direction says how far to go along it.

    g = (L(θ + εz) - L(θ - εz)) / 2ε,    θ ← θ - ηgz

(SPSA; Spall 1992. In place and with z from a seed: MeZO, Malladi et al. 2023, algorithm 1.) No activation is kept, and
no direction: `farfield.kernels.perturb` makes z anew from its number wherever it is needed.

The paper walks from θ to θ + εz, θ - εz and back to θ, which in bfloat16 does not lead back: each way rounds. Here each
block is given weights of its own while it runs and has the old ones back afterwards, bit by bit. That takes the memory
of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from farfield.kernels import perturb
from farfield.protocols.errors import TuningError
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Arrays, Made

if TYPE_CHECKING:
    from .architecture import Linear
    from .descent import Loss


class Directions:
    """Numbered random directions of some parameters of a model, all from one seed."""

    def __init__(self, modules: Iterable[torch.nn.Module], names: Mapping[torch.nn.Parameter, str], seed: int) -> None:
        """
        Args:
            modules: within whose forward the parameters are used, and nowhere else; none inside another.
            names: of the parameters; with the seed they decide the directions.
        """
        within = {module: [one for one in module.parameters() if one in names] for module in modules}
        assert sum(len(found) for found in within.values()) == len(names)
        self._within = {module: found for module, found in within.items() if found}
        self._keys: dict[torch.nn.Parameter, perturb.Key] = {
            one: (seed, derive(0, name)) for one, name in names.items()
        }
        self._names = names

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._keys)

    def slope(self, number: int, epsilon: float, loss: Loss) -> tuple[float, float]:
        """g along direction `number`, and the mean of the two losses: that at θ, but for what is quadratic in ε."""
        ahead, behind = (self._loss_at(number, step, loss) for step in (epsilon, -epsilon))
        return (ahead - behind) / (2 * epsilon), (ahead + behind) / 2

    def move(self, number: int, scale: float, rounding: int) -> None:
        """θ ← θ + scale·z, in place. bfloat16 is rounded stochastically, by the bits of that number."""
        mixed = perturb.mixture({number: scale})
        for parameter, key in self._keys.items():
            perturb.add_(parameter.data, key, mixed, rounding=rounding)

    def add(self, scales: Mapping[int, float]) -> None:
        """θ ← θ + Σⱼ sⱼ·z_j, in place and rounded once, to nearest."""
        mixed = perturb.mixture(scales)
        for parameter, key in self._keys.items():
            perturb.add_(parameter.data, key, mixed)

    def total(self, scales: Mapping[int, float]) -> Made:
        """Σⱼ sⱼ·z_j in float32, by the names of the parameters; each is made when it is asked for."""
        mixed, by_name = perturb.mixture(scales), {name: parameter for parameter, name in self._names.items()}

        def make(name: str) -> NDArray[np.float32]:
            parameter = by_name[name]
            change = torch.zeros(parameter.shape, device=parameter.device)
            perturb.add_(change, self._keys[parameter], mixed)
            found: NDArray[np.float32] = change.cpu().numpy()
            return found

        return Made(by_name, make)

    def _loss_at(self, number: int, step: float, loss: Loss) -> float:
        with self._shifted(perturb.mixture({number: step})):
            return loss(False)

    @contextmanager
    def _shifted(self, mixed: perturb.Mixture) -> Iterator[None]:
        """Within it the model computes with every parameter moved by `mixed`."""
        kept: dict[torch.nn.Parameter, torch.Tensor] = {}

        def shift(module: torch.nn.Module, _: Any) -> None:
            for parameter in self._within[module]:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.clone()
                perturb.add_(parameter.data, self._keys[parameter], mixed)

        def restore(module: torch.nn.Module, *_: Any) -> None:
            for parameter in self._within[module]:
                parameter.data = kept.pop(parameter)

        with ExitStack() as hooks:
            for module in self._within:
                hooks.enter_context(module.register_forward_pre_hook(shift))
                hooks.enter_context(module.register_forward_hook(restore))
            try:
                yield
            finally:
                for parameter, value in kept.items():  # of a block whose forward did not come to its end
                    parameter.data = value


class SlopeDescent:
    """Steps down the slope along one random direction each."""

    def __init__(
        self,
        directions: Directions,
        training: Training,
        seed: int,
        epsilon: float,
        choose: Callable[[int], int],
        update: Callable[[Mapping[int, float]], Arrays],
    ) -> None:
        """
        Args:
            seed: decides how bfloat16 is rounded.
            choose: the number of the direction that a step goes along, from the number of the step.
            update: what the whole descent changed, from how far it went along each direction.
        """
        self._directions, self._training, self._seed, self._epsilon = directions, training, seed, epsilon
        self._choose, self._update = choose, update
        self._gone: dict[int, float] = {}

    def step(self, number: int, rate: float, loss: Loss) -> float:
        direction = self._choose(number)
        slope, value = self._directions.slope(direction, self._epsilon, loss)
        if not math.isfinite(slope):
            return math.nan  # where nothing is to be learnt; the loss ends the training
        if limit := self._training.max_grad_norm:
            slope = max(-limit, min(limit, slope))
        self._directions.move(direction, -rate * slope, derive(self._seed, "rounding", number))
        self._gone[direction] = self._gone.get(direction, 0.0) - rate * slope
        return value

    def update(self) -> Arrays:
        return self._update(self._gone)


def refuse_packed(model: torch.nn.Module, linears: Iterable[Linear], kind: str) -> None:
    """Raises TuningError if the matrix of one of these layers is in 8 bits or fewer, into which no direction fits."""
    for linear in linears:
        layer = model.get_submodule(linear.path)
        if any(one.dtype in (torch.uint8, torch.int8) for one in (*layer.parameters(), *layer.buffers())):
            hint = "Use 'mezo' with over = \"lora\"."
            raise TuningError(
                f"{kind!r} moves the weights themselves, and these are packed", where=linear.path, hint=hint
            )

"""float32 values behind parameters of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from farfield.protocols.tensors import Arrays, State


class MasterWeights:
    """float32 values of the trained parameters, which the optimiser works on.

    A bfloat16 parameter has 8 bits of mantissa, so most optimiser steps would round to nothing: the model computes with
    the rounded parameter, and what it has really moved is kept here.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], start: Arrays) -> None:
        self._parameters, self._start = parameters, start
        self._values = {name: torch.from_numpy(np.array(start[name])).to(p.device) for name, p in parameters.items()}
        self.publish()

    @property
    def by_name(self) -> Mapping[str, torch.Tensor]:
        return self._values

    @property
    def values(self) -> list[torch.Tensor]:
        return list(self._values.values())

    @torch.no_grad()
    def absorb(self) -> None:
        """Take over what the tuning method itself has changed in the parameters since they were published."""
        for name, parameter in self._parameters.items():
            value = self._values[name]
            value.copy_(torch.where(parameter == value.to(parameter.dtype), value, parameter.float()))

    def take_gradients(self) -> None:
        """Move the parameters' gradients to the masters; a parameter that got none counts as zero."""
        for name, parameter in self._parameters.items():
            value = self._values[name]
            value.grad = torch.zeros_like(value) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def pull_back(self, strength: float) -> None:
        """Add the gradient of FedProx's term, μ/2 ‖w - w₀‖² (Li et al. 2020, eq. 2)."""
        for name, value in self._values.items():
            assert value.grad is not None
            start = torch.from_numpy(np.array(self._start[name])).to(value.device)
            value.grad.add_(value.detach() - start, alpha=strength)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])

    def update(self) -> State:
        """Trained minus starting value of each, made where the masters were: they are used up."""
        changes: State = {name: value.detach().cpu().numpy() for name, value in self._values.items()}
        for name, change in changes.items():
            change -= self._start[name]
        return changes

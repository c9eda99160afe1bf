"""What makes the noise of a Plan, run by itself: releases of a sum of zeros, and of one with a canary in it.

The code is that of a deployment; made up is only what goes in. A canary is the one unit that neighbours differ in: an
example's gradient or a client's update, of the clipping norm, in one direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from farfield.edge_client.private import NoisyOptimizer, sample
from farfield.protocols import summing
from farfield.protocols.plan import Plan
from farfield.protocols.privacy import central, distributed
from farfield.protocols.privacy.mechanism import ClientMechanism, ExampleMechanism, mechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg.parameters import at_most
from farfield.protocols.summing import Layout, Part, Subject, Words

EXAMPLES: Final = 64
"""Made-up examples of a client, of which a batch is drawn."""


class Source(ABC):
    """Releases sums of `dimension` values, and behind them what follows an adaptive clipping norm.

    Attributes:
        marks: how many those are; 0 where the norm is fixed.
        unit: the standard deviation that the ledger reckons with.
        claimed: what the code says of itself; the larger of the two, where rounding has to be hidden too.
        step: of the grid on which the noise lies; 0 where it is too fine to matter.
        norm: of a canary.
    """

    dimension: int
    marks: int
    unit: float
    claimed: float
    step: float
    norm: float

    @abstractmethod
    def release(self, canary: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """The sum of zeros, or of zeros and the canary, float32[dimension], with its noise: float64[dimension + marks].

        What the marks come to without noise is taken off.
        """

    def noise(self, releases: int, random: np.random.Generator) -> NDArray[np.float64]:
        """float64[releases, dimension + marks], spread evenly over the steps of its grid, so that it is continuous."""
        rows = np.stack([self.release() for _ in range(releases)])
        return rows + self.step * (random.random(rows.shape) - 0.5)


def source(plan: Plan, dimension: int, clients: int) -> Source:
    """What makes the Plan's noise, for updates of so many values.

    Raises:
        PrivacyError: so much noise does not fit.
    """
    made = mechanism(plan)
    if isinstance(made, ExampleMechanism):
        return Examples(made, dimension)
    assert isinstance(made, ClientMechanism)
    if made.noise == "distributed":
        return Shares(plan, made, dimension, clients)
    return Central(plan, made, dimension, clients)


@final
class Examples(Source):
    """DP-SGD at the client: a step of its optimiser."""

    def __init__(self, made: ExampleMechanism, dimension: int) -> None:
        self.dimension, self.marks, self.norm, self.step = dimension, 0, made.clipping_norm, 0.0
        self.unit = self.claimed = made.noise_multiplier * made.clipping_norm
        self._rate = made.sampling_rate
        first = dimension // 2
        self._parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (first, dimension - first) if size]
        plain = torch.optim.SGD(self._parameters, lr=1.0)
        self._optimizer = NoisyOptimizer(plain, made, Randomness(), EXAMPLES)
        self._batch = made.sampling_rate * EXAMPLES

    def release(self, canary: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        return self.noisy(np.zeros((1, self.dimension), np.float32) if canary is None else canary[None])

    def noisy(self, gradients: NDArray[np.float32]) -> NDArray[np.float64]:
        """The noisy sum of the gradients [examples, dimension] of a batch, as the optimiser takes it for its step."""
        self._given(gradients)
        self._optimizer.step()
        step = torch.cat([parameter.grad for parameter in self._parameters])  # type: ignore[misc]
        self._optimizer.zero_grad()
        return step.double().numpy() * self._batch

    def clipped(self, gradients: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sum before there is noise on it."""
        self._given(gradients)
        self._optimizer.clip_and_accumulate()
        total = torch.cat([parameter.summed_grad for parameter in self._parameters])  # type: ignore[attr-defined]
        self._optimizer.zero_grad()
        return total.numpy().copy()

    def batches(self, count: int) -> NDArray[np.bool_]:
        """bool[count, EXAMPLES]: who is in each of so many batches, as DP-SGD draws them."""
        random, there = Randomness(), np.zeros((count, EXAMPLES), np.bool_)
        for batch in there:
            batch[sample(EXAMPLES, self._rate, random)] = True
        return there

    def _given(self, gradients: NDArray[np.float32]) -> None:
        at = 0
        for parameter in self._parameters:
            size = parameter.numel()
            parameter.grad_sample = torch.from_numpy(gradients[:, at : at + size].copy())  # type: ignore[attr-defined]
            at += size


@final
class Central(Source):
    """Clients' updates, summed as the Plan has it, and noise on the sum as the coordinator adds it."""

    def __init__(self, plan: Plan, made: ClientMechanism, dimension: int, clients: int) -> None:
        self.dimension, self.norm, self.step = dimension, made.clipping_norm, 0.0
        self._made, self._clients, self._bound = made, clients, made.bound(made.clipping_norm)
        self._layout = _layout(plan, dimension, clients) if plan.protection.kind == "secagg" else None
        self._slack = central.summing_slack(clients, self._bound)
        if self._layout is not None:
            self._slack = self._layout.read(self._summed(None), clients).slack
        self.marks = summing.marks(made, self.norm).size
        self.unit = made.noise_multiplier * self._bound
        self.claimed = central.deviation(dimension + self.marks, self._bound, made.noise_multiplier, slack=self._slack)

    def release(self, canary: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        sums = np.zeros(self.dimension) if canary is None else canary.astype(np.float64)
        if self._layout is not None:
            total = self._layout.read(self._summed(canary), self._clients)
            sums = np.asarray(total.update["canary"], np.float64)
        noised = central.noised(
            {"canary": sums, "mark": np.zeros(self.marks)},
            self._bound,
            self._made.noise_multiplier,
            Randomness(),
            slack=self._slack,
        )
        return np.concatenate([noised["canary"], noised["mark"]])

    def _summed(self, canary: NDArray[np.float32] | None) -> Words:
        assert self._layout is not None
        zeros = np.zeros(self.dimension, np.float32)
        total = self._layout.pack(Part({"canary": zeros if canary is None else canary}), Randomness())
        for _ in range(self._clients - 1):
            total += self._layout.pack(Part({"canary": zeros}), Randomness())
        return total


@final
class Shares(Source):
    """Noise in shares: as few clients' vectors as the ledger counts on, each with its own."""

    def __init__(self, plan: Plan, made: ClientMechanism, dimension: int, clients: int) -> None:
        self.dimension, self.norm = dimension, made.clipping_norm
        self._layout = _layout(plan, dimension, clients)
        survivors = summing.smallest_sum(plan, clients)
        self._honest = max(1, survivors - at_most(plan.protection.corrupt, clients))
        mark = summing.marks(made, self.norm, made.counted.copies(dimension) if made.counted else 1)
        noise, bound = made.noise_multiplier, made.bound(self.norm)
        design = distributed.smallest(dimension + mark.size, clients, self._honest, noise)
        self.marks, self._mark = mark.size, mark * self._honest
        self.step = 1 / design.scale(bound)
        self.unit = noise * bound
        self.claimed = math.sqrt(self._honest * design.share_variance + 1 / 12) * self.step

    def release(self, canary: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        zeros = np.zeros(self.dimension, np.float32)
        total = self._layout.pack(Part({"canary": zeros if canary is None else canary}), Randomness())
        for _ in range(self._honest - 1):
            total += self._layout.pack(Part({"canary": zeros}), Randomness())
        found = self._layout.read(total, self._honest)
        return np.concatenate([found.update["canary"], found.mark - self._mark])


def _layout(plan: Plan, dimension: int, clients: int) -> Layout:
    """Where everything stands in a sum of made-up updates."""
    norm = plan.privacy.clipping_norm
    limit = norm if plan.value_range is None else min(norm, plan.value_range)
    digest = bytes(32)
    subject = Subject(bytes.fromhex(plan.digest), b"", b"", "train", digest, norm, (limit,))
    shapes = {"canary": (dimension,)}
    return summing.layout(plan, subject, shapes, clients, summing.smallest_sum(plan, clients))

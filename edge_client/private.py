"""Local training in which no single example shows: DP-SGD (Abadi et al. 2016, algorithm 1) at the client.

What is private is one example, and an example is one record only if records are neither packed nor cut in pieces: the
Plan sees to that. Neighbouring datasets differ in one example whose gradient is replaced by zero; how many examples
there are is public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.nn.functional import cross_entropy

from farfield.emulator.masters import MasterWeights
from farfield.emulator.methods import Tuned
from farfield.emulator.schedule import learning_rate, make_optimizer
from farfield.kernels import clip
from farfield.protocols.privacy.central import noised, summing_slack
from farfield.protocols.privacy.mechanism import ExampleMechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Arrays

from .data import IGNORED, Example, collate
from .per_example import Recorder, recording
from .train import Outcome, forward


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser, with our clipping, which no gradient that overflows gets past, and our noise.

    Opacus draws its noise from a generator of torch, which gives its state away, and adds it in floating point.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mechanism: ExampleMechanism,
        random: Randomness,
        examples: int,
    ) -> None:
        """`examples`: how many there are in all."""
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clipping_norm,
            expected_batch_size=mechanism.sampling_rate * examples,
        )
        self._random = random
        rounding = mechanism.clipping_norm * clip.SUM_ERROR
        self._slack = rounding + summing_slack(examples, mechanism.clipping_norm)

    @property
    def params(self) -> list[Any]:
        """What is optimised, all of it: Opacus passes over, without noise, what autograd gives no gradient."""
        return [value for group in self.param_groups for value in group["params"]]

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the examples in `grad_sample` to `summed_grad`."""
        sums = clip.clipped_sums([value.grad_sample for value in self.params], self.max_grad_norm)
        for value, found in zip(self.params, sums, strict=True):
            value.summed_grad = found if value.summed_grad is None else value.summed_grad.add_(found)

    def add_noise(self) -> None:
        """Make `grad` of `summed_grad`, which is gone then: noise is added to each sum once."""
        summed = torch.cat([value.summed_grad.flatten() for value in self.params])
        noisy = noised(
            {"": summed.cpu().numpy()}, self.max_grad_norm, self.noise_multiplier, self._random, slack=self._slack
        )
        parts = torch.split(torch.from_numpy(noisy[""]).to(summed), [value.numel() for value in self.params])
        for value, part in zip(self.params, parts, strict=True):
            value.grad, value.summed_grad = part.view_as(value).to(value.dtype), None


def train(
    tuned: Tuned,
    start: Arrays,
    examples: Sequence[Example],
    training: Training,
    mechanism: ExampleMechanism,
    random: Randomness,
    *,
    pad_id: int,
    seed: int,
    first_step: int,
    horizon: int,
    on_step: Callable[[float], None] | None = None,
) -> Outcome:
    """Make the mechanism's steps from `start`, as `train.train` does but each from a noisy sum of clipped gradients.

    In each step every example is in the batch with probability q = `sampling_rate`, independently of all else; a batch
    may be empty. The loss of an example is the mean over its own targets, and its gradient by all trained parameters
    together is clipped to a norm of C = `clipping_norm`. The sum, with Gaussian noise of standard deviation σ·C,
    σ = `noise_multiplier`, is divided by the expected size of a batch, q times the number of examples. With that the
    Plan's optimiser makes its step; so the steps compose the Poisson-subsampled Gaussian mechanism, and the update is
    post-processing.

    A batch is worked through in parts of `training.batch_size`. `training.max_grad_norm` does not apply.

    Args:
        random: decides who is in a batch, and the noise.
        seed: decides dropout masks, which need not be secret.
        on_step: called after each step with NaN: the loss is not covered by the noise.

    Returns:
        What training did, with a loss of 0 over 0 targets: they are not released.

    Raises:
        TuningError: the method trains what has no gradient of each example (`per_example.check`).
        PrivacyError: more parameters are trained than one release has room for.
    """
    device = next(tuned.model.parameters()).device
    parameters = tuned.trainable()
    masters = MasterWeights(parameters, start)
    values = dict(zip(parameters, masters.values, strict=True))
    optimizer = NoisyOptimizer(make_optimizer(training, masters.by_name), mechanism, random, len(examples))
    if training.proximal_mu:
        optimizer.attach_step_hook(lambda _: masters.pull_back(training.proximal_mu))
    with recording(tuned) as recorder, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        tuned.model.train()
        if tuned.before_training is not None:
            tuned.before_training()
        for step in range(first_step, first_step + mechanism.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step, horizon)
            batch = sample(len(examples), mechanism.sampling_rate, random)
            for begin in range(0, max(len(batch), 1), training.batch_size):
                part = [examples[index] for index in batch[begin : begin + training.batch_size]]
                for name, gradients in _gradients(recorder, tuned, part, pad_id, device).items():
                    values[name].grad_sample = gradients  # type: ignore[attr-defined]
                optimizer.signal_skip_step(begin + training.batch_size < len(batch))
                optimizer.step()
                optimizer.zero_grad()
            masters.publish()
            if on_step is not None:
                on_step(math.nan)
        tuned.model.eval()
    return Outcome(masters.update(), loss=0.0, targets=0, steps=mechanism.steps)


def sample(count: int, rate: float, random: Randomness) -> list[int]:
    """Which of `count` examples are in a batch: each with probability `rate` to 2⁻⁵³, independently of the others."""
    return [int(index) for index in np.flatnonzero(random.uniform(count) < rate)]


def _gradients(
    recorder: Recorder, tuned: Tuned, part: list[Example], pad_id: int, device: torch.device
) -> Mapping[str, torch.Tensor]:
    if not part:
        return recorder.gradients(lambda: torch.zeros(()), 0, 0)
    collated = collate(part, pad_id)
    return recorder.gradients(
        lambda: _summed_means(*forward(tuned, collated, device)), len(part), collated["input_ids"].shape[1]
    )


def _summed_means(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over the examples of each one's mean loss over its targets; one without targets adds nothing."""
    chosen = labels != IGNORED
    losses = cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    targets = chosen.reshape(len(labels), -1).sum(dim=1)
    return (losses / targets[chosen.nonzero()[:, 0]]).sum()

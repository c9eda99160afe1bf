"""Distillation: the stand-in learns to give the stream that the blocks it stands for would give.

    loss = v · LM + w · mean(((T − S) / rms(T))²)                   (Xiao et al. 2023, section 3.3; 1 and 30 there)

T is the stream after the backbone's middle and S after the stand-in's, at tokens of public text. Only the stand-in is
trained. Everything that a step depends on is in the checkpoint or follows from its number, so a distillation that is
killed goes on to the same weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Distillation

from .architecture import describe
from .layout import Layout
from .masters import MasterWeights
from .objective import loss, predicts_tokens
from .streams import Batch, entering, tokens, watched_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP: Final = 0.1
"""Share of the steps in which the learning rate rises to its peak; then it falls as a cosine, to a tenth."""

MAX_NORM: Final = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """What was measured on held-out public text after `step` steps.

    Attributes:
        hidden: mean(((T − S) / rms(T))²), the share of the stream that the stand-in gets wrong.
        lm: loss in nats per token; 0 where it does not count, or for a classifier, which has none.
    """

    step: int
    hidden: float
    lm: float

    def total(self, settings: Distillation) -> float:
        return settings.lm_weight * self.lm + settings.hidden_weight * self.hidden


Texts = Callable[[int], Batch]
"""The batch of a step, by its number."""


def distil(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    settings: Distillation,
    texts: Texts,
    held_out: Sequence[Batch],
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Train the stand-in of `student`, whose weights are its own, and leave it with the best that was measured.

    Args:
        teacher: the backbone, in whatever number format.
        texts: public text to train on; `held_out` is measured every `settings.check_every` steps, and at the ends.
        checkpoint: a file, kept up to date; what it holds already is gone on from.
        on_step: told the number of each step, and its loss.

    Returns:
        what was measured, in the order of the steps. Training is over after `settings.steps`, or when the measure has
        not improved `settings.patience` times in a row.

    Raises:
        EmulatorError: the checkpoint is of another distillation, or the loss is no longer a number.
    """
    job = _Distillation(teacher, student, layout, settings)
    if checkpoint is not None and checkpoint.exists():
        job.restore(checkpoint)
    if not job.checks:
        job.check(held_out, 0)
        _tell(on_check, job)
    while not job.over:
        number = job.checks[-1].step
        for step in range(number, min(number + settings.check_every, settings.steps)):
            done = job.step(texts(step), step)
            if on_step is not None:
                on_step(step, done)
        job.check(held_out, step + 1)
        if checkpoint is not None:
            job.save(checkpoint)
        _tell(on_check, job)
    job.take_best()
    return job.checks


def _tell(on_check: Callable[[Check], None] | None, job: _Distillation) -> None:
    if on_check is not None:
        on_check(job.checks[-1])


class _Distillation:
    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, layout: Layout, settings: Distillation
    ) -> None:
        self._teacher, self._student, self._layout, self._settings = teacher, student, layout, settings
        self._behind = describe(teacher).blocks[layout.split.depth - layout.split.last]
        blocks = describe(student).blocks
        self._exit = blocks[layout.inner.stop]
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        trained = {
            names[id(parameter)]: parameter for number in layout.inner for parameter in blocks[number].parameters()
        }
        self._parameters = dict(sorted(trained.items()))
        start = {name: one.detach().float().cpu().numpy() for name, one in self._parameters.items()}
        self._masters = MasterWeights(self._parameters, start)
        self._optimizer = torch.optim.AdamW(self._masters.values, lr=settings.learning_rate, weight_decay=0.0)
        self._best = [value.clone() for value in self._masters.values]
        self.checks: list[Check] = []

    @property
    def over(self) -> bool:
        best = min(range(len(self.checks)), key=lambda i: self.checks[i].total(self._settings))
        stale = len(self.checks) - 1 - best
        return self.checks[-1].step >= self._settings.steps or stale >= self._settings.patience

    def step(self, batch: Batch, number: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = _rate(self._settings, number)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        hidden, lm = self._losses(batch)
        total = self._settings.lm_weight * lm + self._settings.hidden_weight * hidden
        total.backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        value = float(total.detach())
        if not math.isfinite(value):
            raise EmulatorError(
                f"the loss of distillation is {value} in step {number + 1}",
                hint="Lower distillation.learning_rate.",
            )
        self._masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(self._masters.values, MAX_NORM)
        self._optimizer.step()
        self._masters.publish()
        return value

    @torch.no_grad()
    def check(self, held_out: Sequence[Batch], step: int) -> None:
        measured = [self._losses(batch) for batch in held_out]
        hidden = sum(float(one) for one, _ in measured) / len(measured)
        self.checks.append(Check(step, hidden, sum(float(one) for _, one in measured) / len(measured)))
        if self.checks[-1] == min(self.checks, key=lambda one: one.total(self._settings)):
            self._best = [value.clone() for value in self._masters.values]

    @torch.no_grad()
    def take_best(self) -> None:
        for value, best in zip(self._masters.values, self._best, strict=True):
            value.copy_(best)
        self._masters.publish()

    def save(self, path: Path) -> None:
        """Write all that the next step depends on, whole or not at all."""
        held: dict[str, torch.Tensor] = {}
        for name, value, best in zip(self._parameters, self._masters.values, self._best, strict=True):
            state = self._optimizer.state[value]
            held |= {f"value/{name}": value, f"best/{name}": best}
            held |= {f"{moment}/{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq", "step")}
        partial = path.with_name(path.name + ".partial")
        metadata = {"checks": json.dumps([asdict(one) for one in self.checks]), "settings": self._named()}
        save_file({name: one.detach().cpu().contiguous() for name, one in held.items()}, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                if file.metadata()["settings"] != self._named():
                    raise EmulatorError(
                        "a checkpoint of another distillation", where=path, hint="Give another folder, or remove it."
                    )
                self.checks = [Check(**one) for one in json.loads(file.metadata()["checks"])]
                for index, (name, value) in enumerate(zip(self._parameters, self._masters.values, strict=True)):
                    value.copy_(file.get_tensor(f"value/{name}"))
                    self._best[index].copy_(file.get_tensor(f"best/{name}"))
                    self._optimizer.state[value] = {
                        moment: file.get_tensor(f"{moment}/{name}").to(value.device if moment != "step" else "cpu")
                        for moment in ("exp_avg", "exp_avg_sq", "step")
                    }
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise EmulatorError(f"cannot be read: {error}", where=path, hint="Remove it to begin anew.") from None
        self._masters.publish()

    def _named(self) -> str:
        """What tells this distillation from others of the same backbone: its settings, and what it trains."""
        shapes = {name: list(parameter.shape) for name, parameter in self._parameters.items()}
        return json.dumps([self._settings.model_dump(mode="json"), asdict(self._layout), shapes], sort_keys=True)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The relative squared distance of the streams, and the language model's loss, 0 where it does not count."""
        with torch.no_grad():
            wanted = tokens(entering(self._teacher, self._behind, batch), batch)
        lm = torch.zeros((), device=wanted.device)
        if self._settings.lm_weight and predicts_tokens(self._student):
            seen: list[torch.Tensor] = []
            with watched_entry(self._exit, seen.append):
                lm = loss(self._student, batch)
            given = tokens(seen[0], batch)
        else:
            given = tokens(entering(self._student, self._exit, batch), batch)
        return ((wanted - given) / wanted.square().mean().sqrt()).square().mean(), lm


def _rate(settings: Distillation, step: int) -> float:
    warmup = max(1, round(WARMUP * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

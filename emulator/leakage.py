"""What the owner of a backbone gives away with an emulator of it, measured on public text.

Quality of a model with loss L, as a share of the full model's:

    quality = (L_floor − L) / (L_floor − L_best)

L_best is what the backbone itself comes to: its loss as it is, or tuned by the Plan's method, whichever is lower.
L_floor is what an attacker comes to who has the emulator's shape and all of it but the stand-in, whose weights are
drawn at random, with the same budget as the attacker who has the emulator. So 0 is what the tuned blocks, the
embeddings, the head and public text are worth anyhow, and what lies above it comes from the stand-in. It is no number
where L_floor is not above L_best by `LEAST`: there the text cannot tell the models apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from farfield.protocols.errors import EmulatorError
from farfield.protocols.plan import Plan
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive

from . import text
from .architecture import describe
from .bench import Bench, loaded
from .build import JUDGED, judged
from .disclosure import Disclosure, disclosed
from .fit import fit
from .layout import Layout, read
from .methods import Tuned
from .objective import mean_loss
from .quantise import dequantised
from .search import stream_error
from .streams import Batch
from .text import PublicText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST: Final = 0.01
"""Nats; a smaller distance between the floor and the best is taken for none."""

PARTS: Final = 4
"""In how many parts an attacker trains. After each it measures, and in the end it has the best that it had."""

WHOLE: Final = 0.99
"""A middle of which so much is there counts as given away."""

NEAR: Final = 0.15
"""So does one whose matrices are all there and off by no more of their norm; NF4 puts them off by 0.09 to 0.1."""


class Progress(Protocol):
    """Is told how the measuring goes on."""

    def on_stage(self, what: str) -> None: ...
    def on_step(self, done: int, steps: int, loss: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attacker may spend: steps of AdamW, on so many windows of at most so many tokens each."""

    steps: int
    batch_size: int
    length: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        """The most tokens that are seen, those that come again included."""
        return self.steps * self.batch_size * self.length

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch_size} × {self.length} tokens of public text ({self.tokens:,})"


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses in nats per token of public text that nothing was trained on.

    Attributes:
        backbone, emulator: as they are, zero-shot.
        emulator_tuned: of the emulator by itself, tuned by the Plan's method.
        plug_in: of the backbone with what was tuned on the emulator.
        backbone_tuned: of the backbone, the same blocks tuned on itself in as many steps.
        attacked: of the emulator after an attacker, who never sees the backbone, has trained all of its weights.
        floor: after the same attack on the emulator with a stand-in of random weights.
    """

    backbone: float
    emulator: float
    emulator_tuned: float
    plug_in: float
    backbone_tuned: float
    attacked: float
    floor: float

    @property
    def best(self) -> float:
        return min(self.backbone, self.backbone_tuned)

    def quality(self, loss: float) -> float | None:
        """A loss as a share of the full model's, see above; below 0 is worse than the floor. None is no number."""
        span = self.floor - self.best
        return (self.floor - loss) / span if span >= LEAST else None

    @property
    def recovered(self) -> float | None:
        """R: the share of what tuning on the backbone gains that plugging in gains; None where it gains nothing."""
        gain = self.backbone - self.backbone_tuned
        return (self.backbone - self.plug_in) / gain if gain >= LEAST else None

    def document(self) -> dict[str, Any]:
        losses = asdict(self)
        return losses | {
            "quality": {name: self.quality(loss) for name, loss in losses.items()},
            "recovered": self.recovered,
        }


@dataclass(frozen=True, slots=True)
class Leakage:
    """What was measured.

    Attributes:
        turns: how many emulators take turns; this is the first of them.
        hidden: share of the stream behind the middle that the stand-in gets wrong, see `search.stream_error`.
        losses: None for a classifier, whose classes public text does not have.
    """

    budget: Budget
    disclosed: Disclosure
    hidden: float
    losses: Losses | None
    turns: int = 1

    @property
    def failures(self) -> tuple[str, ...]:
        """In what it protects nothing, each as the end of a sentence that says so; empty if it keeps some back."""
        return (*_given_away(self.disclosed), *(_as_good(self.losses, self.budget) if self.losses else ()))

    @property
    def verdict(self) -> tuple[str, ...]:
        """What it comes to, in sentences. They claim no more than was measured."""
        if self.failures:
            return tuple(f"This emulator protects nothing{one}" for one in self.failures)
        given = self.disclosed.whole.given
        others = (
            (f"Clients get {self.turns} emulators that take turns, and this is about the first of them alone.",)
            if self.turns > 1
            else ()
        )
        parameters = f"{given:.0%} of the backbone's parameters are in it as they are or in 4 bits"
        if self.losses is None:
            return (
                f"Of the middle {1 - self.disclosed.middle.given:.0%} of the parameters are not in this emulator, and "
                f"it gets {self.hidden:.1%} of the stream behind the middle wrong; {parameters}.",
                "How good it is as a classifier, alone or after an attack, cannot be told from text without classes.",
                *others,
            )
        return (*_kept_back(self.losses, self.budget), f"Besides, {parameters}.", *others, _LIMITS)

    def document(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "budget": asdict(self.budget) | {"tokens": self.budget.tokens},
            "disclosed": self.disclosed.document(),
            "hidden": self.hidden,
            "losses": self.losses.document() if self.losses else None,
            "verdict": list(self.verdict),
        }


_LIMITS: Final = (
    "All this holds for this text, this tuning method and this budget: with other text, or with more of it, an "
    "attacker may come further."
)


def _given_away(found: Disclosure) -> tuple[str, ...]:
    if found.middle.given < WHOLE:
        if found.blocks < 1 or found.error > NEAR:
            return ()
        return (
            f": every block of the middle is in it, and its matrices are off by {found.error:.1%} of their norm, where "
            "4 bits put them off by some 10 %. Whoever has it has the backbone but for that.",
        )
    how = "" if found.middle.unchanged > found.middle.rounded else ", most of it rounded to 4 bits"
    return (f": {found.middle.given:.0%} of the middle's parameters are in it{how}. Whoever has it has the backbone.",)


def _as_good(losses: Losses, budget: Budget) -> tuple[str, ...]:
    found = []
    if losses.emulator_tuned <= losses.plug_in:
        found.append(
            f" on this text: tuned, it is by itself at least as good (loss {losses.emulator_tuned:.4f}) as the "
            f"backbone with the adapter plugged in ({losses.plug_in:.4f}). Who has tuned it does not need the backbone."
        )
    if losses.attacked <= min(losses.backbone, losses.plug_in):
        anyhow = ""
        if losses.floor <= min(losses.backbone, losses.plug_in):
            anyhow = " So is a stand-in of random weights: public text does it, whatever the emulator holds."
        found.append(
            f" against further training: after {budget} it is at least as good (loss {losses.attacked:.4f}) as the "
            f"backbone, with the adapter ({losses.plug_in:.4f}) or without ({losses.backbone:.4f}).{anyhow}"
        )
    return tuple(found)


def _kept_back(losses: Losses, budget: Budget) -> tuple[str, ...]:
    reached = losses.quality(losses.attacked)
    attack = f"An attacker who trains all of it with {budget} comes to a loss of {losses.attacked:.4f}"
    if reached is None:
        compared = f"{attack}; the floor, {losses.floor:.4f}, is too near the backbone for this text to tell more."
    else:
        compared = (
            f"{attack}: {reached:.0%} of the way from the floor ({losses.floor:.4f}: the same without the stand-in's "
            f"weights) to the backbone's best ({losses.best:.4f})."
        )
    useless = "" if losses.plug_in < losses.backbone else " But what was tuned on it makes the backbone no better."
    return (
        "This emulator keeps back some of the backbone: with the adapter plugged in the backbone is better than the "
        f"tuned emulator by {losses.emulator_tuned - losses.plug_in:.4f} nats a token ({losses.plug_in:.4f} against "
        f"{losses.emulator_tuned:.4f}).{useless}",
        compared,
    )


def measure(plan: Plan, backbone: Path, emulator: Path, public: PublicText, steps: int, progress: Progress) -> Leakage:
    """What the emulator in the folder `emulator` gives away of the backbone in `backbone`. Nothing is written.

    Tuning is by the Plan's method, for `steps` steps of `training.batch_size` windows at the Plan's rates. The attack
    is as many steps of AdamW on `distillation.batch_size` windows, its rate rising to `distillation.learning_rate` and
    falling as a cosine.

    Raises:
        BackboneError, EmulatorError: a folder cannot be used, or the emulator was made for another Plan; training
            diverges.
    """
    budget = Budget(steps, plan.distillation.batch_size, plan.data.max_length, plan.distillation.learning_rate)
    held_out = judged(public.held_out, plan.evaluation.batch_size, JUDGED)
    progress.on_stage("comparing weights")
    record = read(emulator)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [loaded(plan, folder, device, plain=True)[0] for folder in (backbone, emulator)]
    if len(describe(models[0]).blocks) != record.layout.split.depth:
        raise EmulatorError(
            f"made for a backbone of {record.layout.split.depth} blocks, and this one has "
            f"{len(describe(models[0]).blocks)}",
            where=emulator,
            hint="Give the Plan that it was built with.",
        )
    given = disclosed(models[0], models[1], record.layout)
    hidden = stream_error(models[0], models[1], record.layout, held_out)
    if plan.model.task != "causal-lm":
        return Leakage(budget, given, hidden, None, plan.emulator.turns)
    whole, part = (mean_loss(model, held_out) for model in models)
    del models
    emulator_tuned, plug_in, backbone_tuned = _tuned(plan, backbone, emulator, public, held_out, steps, progress)
    progress.on_stage("attacking the emulator")
    attacked = _attacked(plan, emulator, budget, public, held_out, progress.on_step, redraw=False)
    progress.on_stage("attacking what is left without its stand-in")
    floor = _attacked(plan, emulator, budget, public, held_out, progress.on_step, redraw=True)
    losses = Losses(whole, part, emulator_tuned, plug_in, backbone_tuned, attacked, floor)
    return Leakage(budget, given, hidden, losses, plan.emulator.turns)


def _tuned(
    plan: Plan,
    backbone: Path,
    emulator: Path,
    public: PublicText,
    held_out: Sequence[Batch],
    steps: int,
    progress: Progress,
) -> tuple[float, float, float]:
    """Losses of the tuned emulator, of the backbone with what was tuned on it, and of the backbone tuned itself."""
    seed = derive(plan.training.seed, "leakage")
    training = plan.training.model_copy(update={"steps": steps, "epochs": None, "seed": seed})
    drawn = _drawn(public, training.batch_size, seed)
    whole, part = Bench(plan, backbone).tuned, Bench(plan, emulator).tuned
    start = {name: parameter.detach().clone() for name, parameter in whole.trainable().items()}
    progress.on_stage("tuning the emulator")
    fit(part, training, drawn, lambda step, loss: progress.on_step(step, steps, loss))
    alone = mean_loss(part.model, held_out)
    _put(whole, part.trainable())
    plugged = mean_loss(whole.model, held_out)
    del part
    _put(whole, start)
    progress.on_stage("tuning the backbone itself, for comparison")
    fit(whole, training, drawn, lambda step, loss: progress.on_step(step, steps, loss))
    return alone, plugged, mean_loss(whole.model, held_out)


@torch.no_grad()
def _put(tuned: Tuned, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in tuned.trainable().items():
        parameter.copy_(values[name])


def _attacked(
    plan: Plan,
    emulator: Path,
    budget: Budget,
    public: PublicText,
    held_out: Sequence[Batch],
    on_step: Callable[[int, int, float], None],
    *,
    redraw: bool,
) -> float:
    """The lowest loss on the way of an attacker who trains every weight.

    Args:
        redraw: the weights of the stand-in are drawn at random first, so that nothing of them is left.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, layout, _ = loaded(plan, emulator, device, plain=True)
    assert layout is not None
    if layout.quantization == "nf4":
        model, layout = dequantised(model, layout)
    seed = derive(plan.training.seed, "attack")
    if redraw:
        redrawn(model, layout, seed)
    best = mean_loss(model, held_out)

    def told(step: int, loss: float) -> None:
        nonlocal best
        on_step(step, budget.steps, loss)
        if step in marks:
            model.train(mode=False)
            best = min(best, mean_loss(model, held_out))
            model.train()

    marks = {budget.steps * part // PARTS for part in range(1, PARTS + 1)}
    training = Training(
        rounds=1,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        schedule="cosine",
        warmup_steps=budget.steps // 10,
        seed=seed,
    )
    fit(Tuned(model.requires_grad_(True)), training, _drawn(public, budget.batch_size, seed), told)
    return best


@torch.no_grad()
def redrawn(emulator: PreTrainedModel, layout: Layout, seed: int) -> None:
    """Draw the weights of the stand-in at random, as its family does for a model that is trained from nothing."""
    blocks = describe(emulator).blocks
    whole: Any = emulator
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number in layout.inner:
            before = {name: one.clone() for name, one in blocks[number].named_parameters()}
            for module in blocks[number].modules():
                whole._init_weights(module)
            for name, one in blocks[number].named_parameters():
                if one.ndim > 1 and torch.equal(one, before[name]):  # a family may pass over what it has loaded
                    one.normal_(std=getattr(emulator.config, "initializer_range", 0.02))


def _drawn(public: PublicText, size: int, seed: int) -> Callable[[int], Batch]:
    return lambda step: text.batches(public.train, size, seed=seed, step=step)
